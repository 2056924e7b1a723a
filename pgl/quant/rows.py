"""Integer grids with one step per row: from weights to int5..int8 codes and back.

Shape legend: R rows (outputs), C columns (inputs), ``...`` any number of leading matrices.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

SMALLEST_NORMAL_FLOAT16 = 2.0**-14
LARGEST_FLOAT16 = 65504.0
WIDEST_CODE = 127


@dataclass
class RowGrid:
    """How the rows of a matrix become integers.

    A row's step is ``max(clip / m, scale_floor)`` with ``m = 2**(bits - 1) - 1``, a weight's code
    is ``round(weight / step)`` (half to even) held within ``-m .. m``.
    """

    bits: int = 6
    """Bits of a code, 5 to 8: the largest code is 15, 31, 63 or 127."""

    clip: Literal["max", "quantile", "search"] = "max"
    """What the largest code stands for: the row's largest |weight|, a quantile of it, or for each
    matrix the quantile of `search_quantiles` with the least squared error (PR #549)."""

    clip_quantile: float = 0.9999984
    """Quantile of |weight| in a row when `clip` is "quantile" (PR #236)."""

    search_quantiles: list[float] = field(
        default_factory=lambda: [0.999, 0.9995, 0.9999, 0.99999, 1.0]
    )
    """Quantiles tried when `clip` is "search"; the first of equals wins (PR #549)."""

    clip_weights: bool = False
    """Clamp the weights to the clip value before coding them, as PR #236 does. It matters where
    the floor binds: without it an outlier beyond the clip value still gets a code of its own."""

    scale_floor: float | None = 1 / 31
    """Smallest step, in units of the weights; null leaves only the smallest normal float16
    (PR #324). It is a rate control: rows of standard deviation .05, .1 and .2 take 2.7, 3.7 and
    4.7 bits per weight on a floor of 1/31, where they would take 5.3 without one."""

    round_scale_first: bool = True
    """Code with the float16 step that will be stored. False (PR #236) codes with the float32 step
    and stores its rounding, a gain error of up to 2**-11 for each row."""

    extra_negative_code: bool = False
    """Let codes reach ``-(m + 1)`` (PR #324, PR #388)."""

    step_factor: float = field(default=1.0, init=False)
    """Multiplies every step. Unless it is 1, codes may use 8 bits whatever `bits` says. No setting:
    :meth:`scaled` makes such grids for the search for the size limit."""

    def __post_init__(self) -> None:
        if not 5 <= self.bits <= 8:
            raise ValueError(
                f"artifact.quant.<group>.grid.bits is {self.bits}: choose 5, 6, 7 or 8"
            )
        if not 0 < self.clip_quantile <= 1:
            raise ValueError(
                f"artifact.quant.<group>.grid.clip_quantile is {self.clip_quantile}: choose a "
                "value in (0, 1]"
            )
        if not self.search_quantiles or not all(0 < p <= 1 for p in self.search_quantiles):
            raise ValueError(
                f"artifact.quant.<group>.grid.search_quantiles is {self.search_quantiles}: "
                "give at least one value, each in (0, 1]"
            )
        if self.scale_floor is not None and not (
            SMALLEST_NORMAL_FLOAT16 <= self.scale_floor <= LARGEST_FLOAT16
        ):
            raise ValueError(
                f"artifact.quant.<group>.grid.scale_floor is {self.scale_floor}: a step is stored "
                f"as float16, choose null or a value from {SMALLEST_NORMAL_FLOAT16} to "
                f"{LARGEST_FLOAT16:g}"
            )

    def scaled(self, step_factor: float) -> "RowGrid":
        """Return a grid whose steps are multiplied by a factor; 1 leaves it as it is."""
        assert step_factor > 0
        grid = copy(self)
        grid.step_factor = self.step_factor * step_factor
        return grid

    @property
    def clip_code(self) -> int:
        """Code that the clip value stands for at the grid's own step."""
        return 2 ** (self.bits - 1) - 1

    @property
    def max_code(self) -> int:
        """Largest code."""
        return self.clip_code if self.step_factor == 1 else WIDEST_CODE

    @property
    def min_code(self) -> int:
        """Smallest code."""
        return -self.max_code - int(self.extra_negative_code)


@dataclass(frozen=True)
class RowCodes:
    """Codes (..., R, C) int8 and the float16 step of each row (..., R)."""

    codes_RC: Tensor
    scale_R: Tensor


@dataclass(frozen=True)
class RowScales:
    """Steps to code with (..., R) float32, and the bound of the weights if they are clamped."""

    scale_R: Tensor
    clip_R: Tensor | None

    def select(self, index: Tensor) -> "RowScales":
        """Return the scales of some of the leading matrices."""
        clip_R = None if self.clip_R is None else self.clip_R[index]
        return RowScales(self.scale_R[index], clip_R)


def row_quantile(x_RC: Tensor, p: float) -> Tensor:
    """Quantile of each row by linear interpolation.

    Agrees with ``torch.quantile(x, p, dim=-1)`` bit for bit, but has no limit on the input's size
    and for the high quantiles used here sorts only the few largest entries.
    """
    num_columns = x_RC.shape[-1]
    # torch.quantile computes the rank in the input's precision; codes must match to the last bit.
    rank = torch.tensor(p, dtype=torch.float32) * (num_columns - 1)
    below = int(rank.floor())
    top = x_RC.topk(num_columns - below, dim=-1).values
    lower, upper = top[..., -1], top[..., -2 if int(rank.ceil()) > below else -1]
    return lower.lerp(upper, (rank - below).to(x_RC))


def row_scales(w_RC: Tensor, grid: RowGrid) -> Iterator[RowScales]:
    """Yield the candidate steps of a float32 matrix: one, or one for each searched quantile."""
    magnitude_RC = w_RC.abs()
    quantiles = {"max": [1.0], "quantile": [grid.clip_quantile], "search": grid.search_quantiles}
    floor = SMALLEST_NORMAL_FLOAT16 if grid.scale_floor is None else grid.scale_floor
    for p in quantiles[grid.clip]:
        clip_R = magnitude_RC.amax(-1) if p == 1 else row_quantile(magnitude_RC, p)
        scale_R = (clip_R / grid.clip_code).clamp(min=floor)
        if grid.step_factor != 1:
            scale_R = storable(scale_R * grid.step_factor, magnitude_RC)
        if grid.round_scale_first:
            scale_R = scale_R.half().float()
        yield RowScales(scale_R, clip_R if grid.clip_weights else None)


def storable(scale_R: Tensor, magnitude_RC: Tensor) -> Tensor:
    """Return steps that float16 holds, and that no weight of the row has a code beyond 127 for.

    Raises:
        ValueError: A row holds a value that is not finite, or too large for any such step.
    """
    least_R = magnitude_RC.amax(-1) / WIDEST_CODE if magnitude_RC.shape[-1] else scale_R
    stored_scale(least_R)
    scale_R = torch.maximum(scale_R, least_R)
    return scale_R.clamp(SMALLEST_NORMAL_FLOAT16, LARGEST_FLOAT16)


def encode(w_RC: Tensor, scales: RowScales, grid: RowGrid) -> Tensor:
    """Return the codes of float32 weights as float32 integers."""
    if scales.clip_R is not None:
        clip_R1 = scales.clip_R[..., None]
        w_RC = w_RC.clamp(-clip_R1, clip_R1)
    return (w_RC / scales.scale_R[..., None]).round_().clamp_(grid.min_code, grid.max_code)


def quantize_rows(w_RC: Tensor, grid: RowGrid) -> RowCodes:
    """Round each row of a matrix to its grid.

    Args:
        w_RC: Weights (..., R, C), any float dtype, on any device. Leading dimensions are
            independent matrices: `clip` = "search" picks a quantile for each.
        grid: The rule.

    Raises:
        ValueError: A row needs a step beyond float16, or holds a value that is not finite.
    """
    w_RC = w_RC.float()
    best: RowScales | None = None
    best_error = None
    for scales in row_scales(w_RC, grid):
        if grid.clip == "search":
            residual_RC = w_RC - encode(w_RC, scales, grid) * scales.scale_R[..., None]
            error = residual_RC.square().mean((-2, -1))
            if best is not None:
                better = error < best_error
                scales = _choose(better, scales, best)
                error = torch.where(better, error, best_error)
            best_error = error
        best = scales
    assert best is not None
    return RowCodes(encode(w_RC, best, grid).to(torch.int8), stored_scale(best.scale_R))


def dequantize_rows(rows: RowCodes) -> Tensor:
    """Return the float32 weights that codes stand for."""
    return rows.codes_RC.float() * rows.scale_R.float()[..., None]


def stored_scale(scale_R: Tensor) -> Tensor:
    """Round steps to float16.

    Raises:
        ValueError: A step is not finite in float16.
    """
    stored_R = scale_R.half()
    if not bool(stored_R.isfinite().all()):
        raise ValueError(
            "a row of weights is not finite or too large for a float16 step "
            f"(largest step {scale_R.max().item():g}): the weights have diverged"
        )
    return stored_R


def _choose(mask: Tensor, yes: RowScales, no: RowScales) -> RowScales:
    mask = mask[..., None]
    clip_R = None
    if yes.clip_R is not None and no.clip_R is not None:
        clip_R = torch.where(mask, yes.clip_R, no.clip_R)
    return RowScales(torch.where(mask, yes.scale_R, no.scale_R), clip_R)
