from pgl.quant.calibrated import Calibration
from pgl.quant.config import GPTQConfig, QuantConfig, TensorRule
from pgl.quant.errors import QuantizationError, errors_by_group, quantization_errors
from pgl.quant.fake_quant import FakeQuantConfig, fake_quantize
from pgl.quant.gptq import gptq
from pgl.quant.groups import GROUPS, tensor_group
from pgl.quant.hessians import average_over_ranks, collect_hessians
from pgl.quant.prune import prune_by_magnitude
from pgl.quant.quantize import StateQuantizer, quantize_state, storage_kind
from pgl.quant.rows import RowCodes, RowGrid, dequantize_rows, quantize_rows
from pgl.quant.sensitivity import average_energies_over_ranks, collect_output_energies
from pgl.quant.stored import StoredTensor, dequantize_state

__all__ = [
    "GROUPS",
    "Calibration",
    "FakeQuantConfig",
    "GPTQConfig",
    "QuantConfig",
    "QuantizationError",
    "RowCodes",
    "RowGrid",
    "StateQuantizer",
    "StoredTensor",
    "TensorRule",
    "average_energies_over_ranks",
    "average_over_ranks",
    "collect_hessians",
    "collect_output_energies",
    "dequantize_rows",
    "dequantize_state",
    "errors_by_group",
    "fake_quantize",
    "gptq",
    "prune_by_magnitude",
    "quantization_errors",
    "quantize_rows",
    "quantize_state",
    "storage_kind",
    "tensor_group",
]
