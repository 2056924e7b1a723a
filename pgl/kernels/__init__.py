"""Triton kernels for NVIDIA GPUs; each module names its plain twin, which runs everywhere else.

The modules need Triton, which torch's CUDA builds bring along: import them only where
:func:`available` says so.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

HOPPER = 9
FIRST_GENERATION = 8
"""Compute capability of the oldest GPUs the kernels are meant for: Ampere, the first with bf16."""


class Launch(NamedTuple):
    """How a kernel's items are given to programs."""

    items: int
    warps: int


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: an NVIDIA GPU from Ampere on, and Triton there."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    generation, _ = torch.cuda.get_device_capability(device)
    return generation >= FIRST_GENERATION


def load() -> None:
    """Register the kernels as operators ``torch.ops.pgl.*``, which torch.compile can trace."""
    for name in ("exclusive_attention", "qkv_norm_rope", "residual_norm", "squared_mlp"):
        import_module(f"pgl.kernels.{name}")


def load_quack() -> None:
    """Load the MLP's products of the package quack-kernels.

    Raises:
        ImportError: If the package or something that it needs is not installed.
    """
    import_module("pgl.kernels.quack_mlp")


def squared_mlp_available(device: torch.device) -> bool:
    """Whether the fused MLP runs: it needs Hopper's tensor memory access."""
    return available(device) and torch.cuda.get_device_capability(device)[0] == HOPPER


def squared_mlp_fits(rows: int, dim: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether an MLP's products come out even in the kernel's tiles, and its type has the range.

    The kernel takes the derivative from the activation, a square, which float16 rounds to zero for
    hidden values below 2e-4.
    """
    even = rows % 128 == 0 and dim % 64 == 0 and hidden % 128 == 0
    return even and dtype == torch.bfloat16


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, 1 of the CPU on which Triton interprets."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


__all__ = [
    "Launch",
    "available",
    "load",
    "load_quack",
    "processors",
    "squared_mlp_available",
    "squared_mlp_fits",
]
