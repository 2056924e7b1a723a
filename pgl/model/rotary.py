"""Rotary position embedding (RoPE), of the whole head or a part, NTK-aware for long contexts."""

import torch
from torch import Tensor

# Shape suffixes: B batch, T position, H head, D dimension in the head, R half of the rotated dims.


def ntk_base(base: float, rotated_dims: int, train_len: int, length: int) -> float:
    """Base of the frequencies for a context of ``length`` tokens.

    Up to ``train_len`` it is ``base``; beyond it ``base * (length / train_len)^(r / (r - 2))`` with
    r = ``rotated_dims``, which stretches the slowest rotation by the same factor as the context and
    leaves the fastest alone ("NTK-aware scaling").

    The reference length is not always the training length: PR #236, #388 and #703 fix it at 1024
    and train at 2048, so they always run on the raised base; PR #324 sets it to 2048, trains on the
    plain base and raises it only to evaluate at 4096.
    """
    if length <= train_len:
        return base
    return base * (length / train_len) ** (rotated_dims / (rotated_dims - 2))


def inverse_frequencies(base: float, rotated_dims: int, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, ``base^(-2j / rotated_dims)``: float32, (R,)."""
    exponents_R = torch.arange(0, rotated_dims, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (exponents_R / rotated_dims)


def rotary_table(
    length: int, base: float, rotated_dims: int, train_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions: two float32 tensors of shape (T, R).

    They are computed anew in each forward pass: 65,536 of each for 2048 positions, next to nothing
    beside one block, and fused by torch.compile. A cache would have to survive casts of the model
    to bfloat16 (the references' tables do not), inference mode and changing lengths.
    """
    base = ntk_base(base, rotated_dims, train_len, length)
    frequencies_R = inverse_frequencies(base, rotated_dims, device)
    positions_T = torch.arange(length, dtype=torch.float32, device=device)
    angles_TR = positions_T[:, None] * frequencies_R
    return angles_TR.cos(), angles_TR.sin()


def apply_rotary(x_BTHD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first 2R dimensions of each head; the others pass through (partial RoPE).

    Dimension j is paired with j + R: ``(a, b) -> (a cos + b sin, b cos - a sin)``. Partial RoPE
    with 16 of 64 dimensions is PR #388's; with the LN scale it measured -0.0023 bits per byte.
    """
    half = cos_TR.size(-1)
    cos_T1R = cos_TR.to(x_BTHD.dtype).unsqueeze(1)
    sin_T1R = sin_TR.to(x_BTHD.dtype).unsqueeze(1)
    a, b, unrotated = x_BTHD.tensor_split((half, 2 * half), dim=-1)
    rotated = (a * cos_T1R + b * sin_T1R, b * cos_T1R - a * sin_T1R, unrotated)
    return torch.cat(rotated, dim=-1)
