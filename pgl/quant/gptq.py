"""GPTQ with the full Hessian: code columns one by one, the rest makes up for each error.

Frantar et al., arXiv:2210.17323. PR #703's parent measured .0047 BPB against searching the clip
quantile alone (the loss of quantising falls from .0084 to .0037 BPB).

Shape legend: K matrices of one shape, R rows (outputs), C columns (inputs).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.quant.config import GPTQConfig
from pgl.quant.precision import full_float32
from pgl.quant.rows import RowCodes, RowGrid, RowScales, encode, row_scales, stored_scale

SMALLEST_MEAN_DIAGONAL = 1e-6  # keeps the damping positive where a layer never saw an input


def gptq(
    w_RC: Tensor, hessian_CC: Tensor, grid: RowGrid, config: GPTQConfig | None = None
) -> RowCodes:
    """Quantise matrices so that their outputs on the calibration data change little.

    The steps are those of the original rows under `grid`; only the choice of codes differs from
    :func:`pgl.quant.quantize_rows`. Runs in float32 on the weights' device whatever the autocast.

    Args:
        w_RC: One matrix (R, C) or a stack (K, R, C).
        hessian_CC: Its inputs' X^T X up to a factor, (C, C) or (K, C, C); one serves a whole stack
            if it has two dimensions.
        grid: Integer grid; with `clip` = "search" each matrix gets the best quantile of its own.
        config: Damping, order and selection.

    Raises:
        ValueError: A Hessian is not finite or not positive definite in spite of the damping, or the
            weights have diverged.
    """
    config = config or GPTQConfig()
    stacked = w_RC.ndim == 3
    w_KRC = (w_RC if stacked else w_RC[None]).detach().float()
    num_matrices, _, num_columns = w_KRC.shape
    hessian_KCC = hessian_CC.detach().float().to(w_KRC.device)
    hessian_KCC = hessian_KCC.expand(num_matrices, num_columns, num_columns)
    with torch.no_grad(), full_float32(w_KRC.device.type):
        rows = search_codes(w_KRC, factorise(hessian_KCC, config), hessian_KCC, grid, config)
    return rows if stacked else RowCodes(rows.codes_RC[0], rows.scale_R[0])


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the Hessians; it depends neither on the weights nor on the steps."""

    order_KC: Tensor
    """Order in which the columns are coded."""

    upper_KCC: Tensor
    """Upper triangular U of the damped and ordered Hessian, H^-1 = U^T U."""

    def select(self, index: Tensor) -> "Factor":
        """Return the factors of some of the matrices."""
        return Factor(self.order_KC[index], self.upper_KCC[index])


def factorise(hessian_KCC: Tensor, config: GPTQConfig) -> Factor:
    """Damp, order and factorise Hessians; call it in full float32 precision.

    Raises:
        ValueError: One is not finite or not positive definite in spite of the damping.
    """
    damped_KCC = damp(hessian_KCC, config.damping)
    order_KC = column_order(damped_KCC, config.act_order)
    ordered_KCC = take_columns(take_columns(damped_KCC, order_KC).mT, order_KC)
    return Factor(order_KC, inverse_factor(ordered_KCC))


def damp(hessian_KCC: Tensor, fraction: float) -> Tensor:
    """Add `fraction` of the mean diagonal entry to the diagonal, so that it can be inverted."""
    mean_K = hessian_KCC.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=SMALLEST_MEAN_DIAGONAL)
    identity_CC = torch.eye(hessian_KCC.shape[-1], device=hessian_KCC.device)
    return hessian_KCC + fraction * mean_K[..., None, None] * identity_CC


def inverse_factor(hessian_KCC: Tensor) -> Tensor:
    """Return the upper triangular U with H^-1 = U^T U.

    With J the reversal of rows and columns and J H J = L L^T, U = J L^-1 J: one factorisation and
    one triangular solve, where inverting first takes two factorisations and loses digits.
    """
    lower_KCC, info_K = torch.linalg.cholesky_ex(hessian_KCC.flip(-2, -1))
    if not bool((info_K == 0).all() & lower_KCC.isfinite().all()):
        raise ValueError(
            "a calibration Hessian is not positive definite: calibrate on more tokens or raise "
            "artifact.quant.gptq.damping"
        )
    identity_CC = torch.eye(hessian_KCC.shape[-1], device=hessian_KCC.device)
    identity_KCC = identity_CC.expand_as(lower_KCC)
    return torch.linalg.solve_triangular(lower_KCC, identity_KCC, upper=False).flip(-2, -1)


def column_order(hessian_KCC: Tensor, act_order: bool) -> Tensor:
    """Return the order (K, C) in which columns are coded: by descending diagonal, or as is."""
    diagonal_KC = hessian_KCC.diagonal(dim1=-2, dim2=-1)
    if act_order:
        return diagonal_KC.argsort(dim=-1, descending=True, stable=True)
    return torch.arange(diagonal_KC.shape[-1], device=diagonal_KC.device).expand_as(diagonal_KC)


def search_codes(
    w_KRC: Tensor, factor: Factor, hessian_KCC: Tensor, grid: RowGrid, config: GPTQConfig
) -> RowCodes:
    """Code matrices on the steps of a grid, each with the best of the quantiles it searches.

    Raises:
        ValueError: Of some matrix no quantile gives steps that float16 holds and a finite loss.
    """
    codes_KRC = torch.zeros_like(w_KRC, dtype=torch.int8)
    scale_KR = w_KRC.new_zeros(w_KRC.shape[:2])
    loss_K = w_KRC.new_full(w_KRC.shape[:1], torch.inf)
    tried: list[RowScales] = []
    for scales in row_scales(w_KRC, grid):
        # On a binding floor all quantiles give the same steps, and so the same codes.
        fresh_K = torch.ones_like(loss_K, dtype=torch.bool)
        for earlier in tried:
            fresh_K &= _differ(scales, earlier)
        tried.append(scales)
        index = fresh_K.nonzero()[:, 0]
        if not len(index):
            continue
        some = scales.select(index)
        found_KRC = code_columns(
            w_KRC[index], factor.select(index), some, grid, config.block_columns
        )
        error_KRC = w_KRC[index] - found_KRC.float() * some.scale_R[..., None]
        found_loss_K = _loss(error_KRC, hessian_KCC[index], config.select_by)
        better = found_loss_K < loss_K[index]
        winners = index[better]
        codes_KRC[winners] = found_KRC[better]
        scale_KR[winners] = some.scale_R[better]
        loss_K[winners] = found_loss_K[better]
    if not bool(loss_K.isfinite().all()):
        largest = w_KRC[~loss_K.isfinite()].abs().max().item()
        raise ValueError(
            "a row of weights is not finite or too large for a float16 step "
            f"(largest weight {largest:g}): the weights have diverged"
        )
    return RowCodes(codes_KRC, stored_scale(scale_KR))


def code_columns(
    w_KRC: Tensor, factor: Factor, scales: RowScales, grid: RowGrid, block_columns: int
) -> Tensor:
    """Return GPTQ's int8 codes of matrices whose steps are given."""
    factor_KCC = factor.upper_KCC
    w_KRC = take_columns(w_KRC, factor.order_KC)
    codes_KRC = torch.empty_like(w_KRC, dtype=torch.int8)
    num_columns = w_KRC.shape[-1]
    scale_KR1 = scales.scale_R[..., None]
    for start in range(0, num_columns, block_columns):
        stop = min(start + block_columns, num_columns)
        block_KRB = w_KRC[:, :, start:stop]
        factor_KBB = factor_KCC[:, start:stop, start:stop]
        errors_KRB = torch.empty_like(block_KRB)
        for i in range(stop - start):
            column_KR1 = block_KRB[:, :, i : i + 1]
            code_KR1 = encode(column_KR1, scales, grid)
            codes_KRC[:, :, start + i] = code_KR1[..., 0]
            error_KR1 = (column_KR1 - code_KR1 * scale_KR1) / factor_KBB[:, i, i, None, None]
            errors_KRB[:, :, i] = error_KR1[..., 0]
            block_KRB[:, :, i + 1 :].baddbmm_(
                error_KR1, factor_KBB[:, i : i + 1, i + 1 :], alpha=-1
            )
        w_KRC[:, :, stop:].baddbmm_(errors_KRB, factor_KCC[:, start:stop, stop:], alpha=-1)
    return take_columns(codes_KRC, factor.order_KC.argsort(dim=-1))


def _loss(error_KRC: Tensor, hessian_KCC: Tensor, select_by: str) -> Tensor:
    if select_by == "mse":
        return error_KRC.square().mean((-2, -1))
    return (error_KRC @ hessian_KCC * error_KRC).sum((-2, -1))


def _differ(scales: RowScales, earlier: RowScales) -> Tensor:
    differ_K = (scales.scale_R != earlier.scale_R).any(-1)
    if scales.clip_R is not None and earlier.clip_R is not None:
        differ_K |= (scales.clip_R != earlier.clip_R).any(-1)
    return differ_K


def take_columns(x_KRC: Tensor, order_KC: Tensor) -> Tensor:
    """Return a copy with the columns of each matrix in an order of its own."""
    return x_KRC.gather(-1, order_KC[:, None, :].expand_as(x_KRC))
