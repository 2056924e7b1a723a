"""Newton-Schulz orthogonalisation of a stack of matrices, the heart of Muon.

Shapes: K matrices in the stack, R rows, C columns.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

NSCoefficients = Literal["keller", "polar_express"]

NORM_EPS = 1e-7
MAX_STEPS = 100
POLAR_EXPRESS_SAFETY = 1.01
"""Head room: rounding must not push a singular value above 1, where the early steps diverge."""

KELLER = (3.4445, -4.7750, 2.0315)
"""One quintic for every step. Its slope at 0 is as steep as can be, so singular values end between
0.7 and 1.2 rather than at 1. Keller Jordan, "Muon" (2024); used by PRs #236, #324, #388, #703."""

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""A quintic per step, each optimal for the interval the one before leaves behind; the last repeats.
Amsel et al., "The Polar Express", arXiv 2505.16932. PR #399 tried and dropped it."""


def step_coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each step of ``X <- a X + (b A + c A A) X`` with ``A = X X^T``.

    Raises:
        ValueError: The name is unknown, or there is no step or over 100.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(
            f"model.optimizer.ns_steps must be at least 1 and at most {MAX_STEPS}, got {steps}."
        )
    if name == "keller":
        return [KELLER] * steps
    if name == "polar_express":
        safe = [
            (a / POLAR_EXPRESS_SAFETY, b / POLAR_EXPRESS_SAFETY**3, c / POLAR_EXPRESS_SAFETY**5)
            for a, b, c in POLAR_EXPRESS[:-1]
        ]
        return (safe + [POLAR_EXPRESS[-1]] * steps)[:steps]
    choices = ", ".join(get_args(NSCoefficients))
    raise ValueError(f"model.optimizer.ns_coefficients must be one of {choices}, got {name!r}.")


def zeropower(
    G_KRC: Tensor,
    steps: int = 5,
    coefficients: str = "keller",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = NORM_EPS,
) -> Tensor:
    """Replace every matrix by an approximation of its nearest semi-orthogonal one.

    For ``G = U S V^T`` this is ``U S' V^T`` with all singular values S' near 1. Each matrix is
    divided by its own Frobenius norm first; an all-zero matrix stays exactly zero.

    Args:
        G_KRC: Matrices, (..., R, C); leading dimensions are a batch.
        steps: Newton-Schulz iterations, each three matrix products.
        coefficients: Polynomial, "keller" or "polar_express".
        dtype: Type of the iteration and of the result.
        eps: Added to the norm.

    Returns:
        Tensor of the shape of ``G_KRC`` in ``dtype``.

    Raises:
        ValueError: Unknown coefficients or ``steps`` below 1.
    """
    polynomial = step_coefficients(coefficients, steps)
    # The norm is taken before the cast: bf16 would lose 8 bits of a number all entries depend on.
    wide_type = torch.promote_types(G_KRC.dtype, torch.float32)
    norm_K11 = torch.linalg.vector_norm(G_KRC, dim=(-2, -1), keepdim=True, dtype=wide_type)
    if coefficients == "polar_express":
        norm_K11 = norm_K11 * POLAR_EXPRESS_SAFETY
    X_KRC = (G_KRC / (norm_K11 + eps)).to(dtype)
    tall = X_KRC.size(-2) > X_KRC.size(-1)
    if tall:
        X_KRC = X_KRC.mT
    shape = X_KRC.shape
    X_KRC = X_KRC.reshape(-1, *shape[-2:])
    for a, b, c in polynomial:
        A_KRR = X_KRC @ X_KRC.mT
        B_KRR = torch.baddbmm(A_KRR, A_KRR, A_KRR, beta=b, alpha=c)
        X_KRC = torch.baddbmm(X_KRC, B_KRR, X_KRC, beta=a)
    X_KRC = X_KRC.reshape(shape)
    return X_KRC.mT if tall else X_KRC
