"""Fake quantisation: the forward pass sees rounded weights, the gradient does not notice."""

import torch
from torch import Tensor

SMALLEST_ROW_MAX = 1e-12  # keeps an all-zero row from dividing by zero

# Shape suffixes: O output row, I input column.


def fake_quantize(
    weight_OI: Tensor, clip: int, dtype: torch.dtype, scale_floor: bool = False
) -> Tensor:
    """Round each row of a weight to the grid ``scale * (-clip - 1 .. clip)``, straight-through.

    The row's scale is its largest magnitude over ``clip``; it gets no gradient. The gradient of the
    result passes unchanged to ``weight_OI`` (straight-through estimator).

    Args:
        weight_OI: Master weight, float32.
        clip: Largest code, 15 for int5 or 31 for int6.
        dtype: Dtype of the result, the one the matrix product runs in.
        scale_floor: False is PR #324's form: the weight is cast to ``dtype`` first and the scale
            is free. True is PR #549's late form: the scale comes from the uncast weight and is at
            least ``1 / clip``, the floor of that lineage's export grid.

    Returns:
        The rounded weight in ``dtype``, (O, I).
    """
    cast_OI = weight_OI.to(dtype)
    with torch.no_grad():
        source_OI = weight_OI if scale_floor else cast_OI.float()
        row_max_O1 = source_OI.abs().amax(dim=1, keepdim=True)
        if scale_floor:
            scale_O1 = (row_max_O1 / clip).clamp_min(1.0 / clip)
        else:
            scale_O1 = row_max_O1.clamp_min(SMALLEST_ROW_MAX) / clip
        codes_OI = (source_OI / scale_O1).round().clamp(-clip - 1, clip)
        rounded_OI = (codes_OI * scale_O1).to(dtype)
    # The bracket is exactly zero, so the value is the rounded weight to the last bit.
    return rounded_OI + (cast_OI - cast_OI.detach())
