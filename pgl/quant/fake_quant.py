"""Fake quantisation: the forward pass sees rounded weights, the gradient does not notice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.quant.groups import Group

SMALLEST_ROW_MAX = 1e-12  # keeps an all-zero row from dividing by zero

# Shape suffixes: O output row, I input column.


@dataclass(frozen=True)
class FakeQuantConfig:
    """Which linear layers are fake-quantised, and on what grid. The defaults are PR #324's."""

    attention: int | None = 6
    """Bits of the query, key, value and output projections, 2 to 8; null leaves them alone."""
    mlp: int | None = 5
    """Bits of the up and down projections."""
    bigram: int | None = 6
    """Bits of the bigram table's projection. The table itself is looked up and never rounded."""
    value_embedding: int | None = None
    """Bits of the value embedding's projection."""
    scale_floor: bool = False
    """Steps of at least 1 / (largest code), from the uncast weight (PR #549's late form, and the
    floor of that lineage's export grid), in place of free ones from the cast weight (PR #324)."""

    def __post_init__(self) -> None:
        for group in ("attention", "mlp", "bigram", "value_embedding"):
            bits = getattr(self, group)
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"qat.layers.{group} is {bits}: choose 2 to 8 bits, or null")

    def bits(self, group: Group) -> int | None:
        """Return the bits of a tensor group's layers; None where they are left alone."""
        return getattr(self, group, None)

    def __str__(self) -> str:
        names = ("attention", "mlp", "bigram", "value_embedding")
        grids = [f"{name} int{self.bits(name)}" for name in names if self.bits(name) is not None]
        return ", ".join([*grids, *(["floor"] if self.scale_floor else [])])


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
