"""Global gradient norm and the factor that clips it, without a host synchronisation."""

from collections.abc import Iterable

import torch
from torch import Tensor

NORM_EPS = 1e-6


def gradient_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the L2 norm over all gradients together as a 0-d float32 tensor.

    Args:
        gradients: Tensors of any shapes, of float32 or a narrower type; without any the norm is 0.
        device: Where they are.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    # float32 inside: the norm of a bf16 gradient would otherwise be rounded to 8 bits.
    norms = [
        norm
        for members in by_dtype.values()
        for norm in torch._foreach_norm(members, 2, dtype=torch.float32)
    ]
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), the factor of ``torch.nn.utils.clip_grad_norm_``."""
    return (max_norm / (norm + NORM_EPS)).clamp(max=1.0)
