"""Global gradient norm and the factor that clips it, without a host synchronisation."""

from collections.abc import Iterable

import torch
from torch import Tensor

NORM_EPS = 1e-6


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm over all gradients as a 0-d float32 tensor (0 if there is no gradient).

    Args:
        parameters: Parameters; those without a gradient are left out.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    # float32 inside: the norm of a bf16 gradient would otherwise be rounded to 8 bits.
    norms = [
        norm
        for gradients in by_dtype.values()
        for norm in torch._foreach_norm(gradients, 2, dtype=torch.float32)
    ]
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), the factor of ``torch.nn.utils.clip_grad_norm_``."""
    return (max_norm / (norm + NORM_EPS)).clamp(max=1.0)
