from pgl.quant.config import GPTQConfig, QuantConfig, TensorRule
from pgl.quant.fake_quant import fake_quantize
from pgl.quant.gptq import gptq
from pgl.quant.groups import GROUPS, tensor_group
from pgl.quant.hessians import average_over_ranks, collect_hessians
from pgl.quant.prune import prune_by_magnitude
from pgl.quant.quantize import (
    QuantizationError,
    quantization_errors,
    quantize_state,
    storage_kind,
)
from pgl.quant.rows import RowCodes, RowGrid, dequantize_rows, quantize_rows
from pgl.quant.stored import StoredTensor, dequantize_state

__all__ = [
    "GROUPS",
    "GPTQConfig",
    "QuantConfig",
    "QuantizationError",
    "RowCodes",
    "RowGrid",
    "StoredTensor",
    "TensorRule",
    "average_over_ranks",
    "collect_hessians",
    "dequantize_rows",
    "dequantize_state",
    "fake_quantize",
    "gptq",
    "prune_by_magnitude",
    "quantization_errors",
    "quantize_rows",
    "quantize_state",
    "storage_kind",
    "tensor_group",
]
