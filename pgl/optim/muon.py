"""The arithmetic of Muon on stacks of equal-shaped matrices.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); weight decay as in
Liu et al., arXiv 2502.16982.

Shapes: K matrices in the stack, R rows, C columns.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pgl.optim.newton_schulz import zeropower

DecayOrder = Literal["before", "after"]


def shape_scale(rows: int, cols: int) -> float:
    """Return sqrt(max(1, rows / cols)), which gives tall matrices the update of a square one."""
    return max(1.0, rows / cols) ** 0.5


def momentum_direction(
    M_KRC: Tensor, G_KRC: Tensor, momentum: float | Tensor, nesterov: bool
) -> Tensor:
    """Update the momentum of a stack in place and return the direction to orthogonalise.

    ``m <- mu m + g``, then ``u = g + mu m`` (Nesterov) or ``u = m``. There is no (1 - mu) factor.

    Args:
        M_KRC: Momentum, changed in place; its type is that of the arithmetic.
        G_KRC: Gradients.
        momentum: mu, a float or a 0-d tensor.
        nesterov: Which direction.

    Returns:
        Direction u (K, R, C) in the type of ``M_KRC``; without Nesterov it is ``M_KRC`` itself.
    """
    G_KRC = G_KRC.to(M_KRC.dtype)
    M_KRC.mul_(momentum).add_(G_KRC)
    if not nesterov:
        return M_KRC
    # In fp32, since CPU kernels round mu itself to bf16 (0.99 -> 0.988) where CUDA's do not.
    return (G_KRC.float() + momentum * M_KRC.float()).to(M_KRC.dtype)


def advance_stacks(
    momenta: list[Tensor],
    gradients: list[Tensor],
    grad_scale: Tensor | None,
    momentum: float | Tensor,
    nesterov: bool,
    places: list[int],
    steps: int,
    coefficients: str,
    dtype: torch.dtype,
    out_dtypes: list[torch.dtype],
) -> list[Tensor]:
    """Advance the momentum of several stacks in place and return their orthogonalised directions.

    Several stacks, so that ``torch.compile`` can make one graph of them: on a GPU the host's time
    for a call is longer than the device's.

    Args:
        momenta: Momentum (K, R, C) of each stack.
        gradients: Gradients (K, R, C) of each stack.
        grad_scale: 0-d factor of the gradients, or None for 1.
        momentum: mu, a float or a 0-d tensor.
        nesterov: Look ahead along the momentum.
        places: Matrices that each result has; those past the end of the stack are zero.
        steps: Newton-Schulz iterations.
        coefficients: Polynomial, see :func:`pgl.optim.zeropower`.
        dtype: Type of the iteration.
        out_dtypes: Type of each result.

    Returns:
        Directions (places, R, C), contiguous.
    """
    directions = []
    for M_KRC, G_KRC in zip(momenta, gradients, strict=True):
        if grad_scale is not None:
            G_KRC = G_KRC * grad_scale
        directions.append(momentum_direction(M_KRC, G_KRC, momentum, nesterov))
    results = []
    for O_KRC, size, out_dtype in zip(
        _zeropower_together(directions, steps, coefficients, dtype), places, out_dtypes, strict=True
    ):
        O_KRC = O_KRC.to(out_dtype)
        missing = size - O_KRC.size(0)
        if missing:
            O_KRC = F.pad(O_KRC, (0, 0, 0, 0, 0, missing))
        results.append(O_KRC.contiguous())
    return results


def _zeropower_together(
    stacks: list[Tensor], steps: int, coefficients: str, dtype: torch.dtype
) -> list[Tensor]:
    """Orthogonalise stacks, those that are of one shape up to transposition as one batch.

    A matrix and its transpose have each other's result transposed: an MLP's two matrices then take
    half as many kernels.
    """
    wide = [U_KRC.mT if U_KRC.size(-2) > U_KRC.size(-1) else U_KRC for U_KRC in stacks]
    members: dict[Any, list[int]] = {}
    for index, U_KRC in enumerate(wide):
        members.setdefault((U_KRC.size(-2), U_KRC.size(-1), U_KRC.dtype), []).append(index)
    results: dict[int, Tensor] = {}
    for indices in members.values():
        batch = [wide[i] for i in indices]
        O_KRC = torch.cat(batch) if len(batch) > 1 else batch[0]
        parts = zeropower(O_KRC, steps, coefficients, dtype).split([b.size(0) for b in batch])
        for index, part in zip(indices, parts, strict=True):
            results[index] = part.mT if wide[index] is not stacks[index] else part
    return [results[index] for index in range(len(stacks))]


def apply_update_(
    parameters: list[Tensor],
    updates: Iterable[Tensor],
    step_size: float,
    decay: float,
    order: DecayOrder,
) -> None:
    """Decay matrices and step against their updates, in place.

    Args:
        parameters: Matrices of one type.
        updates: An update for each; a stack (K, R, C) will do.
        step_size: What an update is multiplied by (learning rate times :func:`shape_scale`).
        decay: Part of each weight that goes (learning rate times weight decay).
        order: Decay before the update (PRs #324, #388, #703) or after it (PR #236).
    """
    if decay and order == "before":
        torch._foreach_mul_(parameters, 1.0 - decay)
    torch._foreach_add_(parameters, list(updates), alpha=-step_size)
    if decay and order == "after":
        torch._foreach_mul_(parameters, 1.0 - decay)
