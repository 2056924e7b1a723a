from pgl.quant.calibrated import Calibration
from pgl.quant.config import GPTQConfig, QuantConfig, TensorRule
from pgl.quant.fake_quant import FakeQuantConfig, fake_quantize
from pgl.quant.gptq import gptq
from pgl.quant.groups import GROUPS, tensor_group
from pgl.quant.hessians import collect_hessians
from pgl.quant.losses import (
    QuantizationLoss,
    losses_by_group,
    quantization_losses,
    sum_losses,
)
from pgl.quant.prune import prune_by_magnitude
from pgl.quant.quantize import StateQuantizer, quantize_state, storage_kind
from pgl.quant.ranks import average_over_ranks
from pgl.quant.rows import RowCodes, RowGrid, dequantize_rows, quantize_rows
from pgl.quant.sensitivity import collect_output_energies
from pgl.quant.stored import StoredTensor, dequantize_state

__all__ = [
    "GROUPS",
    "Calibration",
    "FakeQuantConfig",
    "GPTQConfig",
    "QuantConfig",
    "QuantizationLoss",
    "RowCodes",
    "RowGrid",
    "StateQuantizer",
    "StoredTensor",
    "TensorRule",
    "average_over_ranks",
    "collect_hessians",
    "collect_output_energies",
    "dequantize_rows",
    "dequantize_state",
    "fake_quantize",
    "gptq",
    "losses_by_group",
    "prune_by_magnitude",
    "quantization_losses",
    "quantize_rows",
    "quantize_state",
    "storage_kind",
    "sum_losses",
    "tensor_group",
]
