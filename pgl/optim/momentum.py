"""How the momentum of a stack of matrices is kept: as floats, or as int8 codes.

Shapes: K matrices in the stack, R rows, C columns, N = R * C, B blocks of S int8 codes.
"""

from typing import Literal

import torch
from torch import Tensor

from pgl.optim.int8_momentum import dequantize_blocks, quantize_blocks

MomentumFormat = Literal["float32", "bfloat16", "int8"]


class FloatMomentum:
    """Momentum of K matrices as one tensor.

    Args:
        count: K.
        like: A matrix whose shape and device the K matrices have.
        dtype: Type of the momentum.
    """

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype) -> None:
        self.M_KRC = torch.zeros((count, *like.shape), dtype=dtype, device=like.device)
        self.stacks = {"momentum_buffer": self.M_KRC}
        """What a checkpoint keeps, by name: the first dimension is K."""

    def read(self) -> Tensor:
        """Return the stack (K, R, C) itself: what is written to it is kept."""
        return self.M_KRC

    def write(self, M_KRC: Tensor) -> None:
        """Do nothing: the stack was changed in place."""


class Int8Momentum:
    """Momentum of K matrices as int8 codes and bf16 scales; no block spans two matrices.

    Args:
        count: K.
        like: A matrix whose shape and device the K matrices have.
    """

    def __init__(self, count: int, like: Tensor) -> None:
        self.shape = like.shape
        zeros_KN = torch.zeros((count, like.numel()), dtype=torch.bfloat16, device=like.device)
        self.codes_KBS, self.scale_KB = quantize_blocks(zeros_KN)
        self.scale_KB.zero_()
        self.stacks = {"momentum_codes": self.codes_KBS, "momentum_scale": self.scale_KB}
        """What a checkpoint keeps, by name: the first dimension is K."""

    def read(self) -> Tensor:
        """Return the dequantised stack (K, R, C) in bfloat16."""
        M_KN = dequantize_blocks(self.codes_KBS, self.scale_KB, self.shape.numel())
        return M_KN.unflatten(-1, self.shape)

    def write(self, M_KRC: Tensor) -> None:
        """Quantise and keep a stack."""
        codes_KBS, scale_KB = quantize_blocks(M_KRC.flatten(1))
        self.codes_KBS.copy_(codes_KBS)
        self.scale_KB.copy_(scale_KB)


def make_momentum(
    momentum_format: MomentumFormat, count: int, like: Tensor
) -> FloatMomentum | Int8Momentum:
    """Return zero momentum of ``count`` matrices like ``like``."""
    if momentum_format == "int8":
        return Int8Momentum(count, like)
    return FloatMomentum(count, like, getattr(torch, momentum_format))
