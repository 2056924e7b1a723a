"""AdamW for parameters of one type: the fused kernel over a list, nothing read back by the host."""

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pgl.optim.ranks import Ranks


class AdamWBucket:
    """All parameters of one group that have the same type and device.

    Moments have the type of the parameter, as in the reference runs: bf16 for bf16 embeddings.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.exp_avg = [torch.zeros_like(parameter) for parameter in parameters]
        self.exp_avg_sq = [torch.zeros_like(parameter) for parameter in parameters]
        # One step count per parameter, on its device: the fused kernel reads it there. They are
        # views of one tensor, so that a step that moves all of them is one addition.
        self._step_counts = torch.zeros(len(parameters), device=parameters[0].device)
        self.steps = list(self._step_counts.unbind())

    def state(self, index: int) -> dict[str, Tensor]:
        """Return the optimizer state of parameter ``index``."""
        return {
            "step": self.steps[index],
            "exp_avg": self.exp_avg[index],
            "exp_avg_sq": self.exp_avg_sq[index],
        }

    @torch.no_grad()
    def step(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        """Take one step; parameters without a gradient are left alone.

        Args:
            group: The parameter group with the settings of this step.
            grad_scale: 0-d factor of the gradients, or None for 1.
        """
        present = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not present:
            return
        gradients = [self.parameters[i].grad for i in present]
        if grad_scale is not None:
            gradients = torch._foreach_mul(gradients, grad_scale)
            dtype = self.parameters[0].dtype
            if dtype != grad_scale.dtype:
                # A 0-d gradient took the factor's type, and the fused kernel takes one type only.
                gradients = [gradient.to(dtype) for gradient in gradients]
        steps = [self.steps[i] for i in present]
        if len(present) == len(self.parameters):
            self._step_counts.add_(1)
        else:
            torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [self.parameters[i] for i in present],
            gradients,
            [self.exp_avg[i] for i in present],
            [self.exp_avg_sq[i] for i in present],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class GradientMean:
    """Averages the gradients of many small tensors over the ranks, with one all-reduce.

    The sum is taken in float32, or a wider type of a parameter.

    Args:
        parameters: Parameters on one device.
        ranks: Who has a part of the gradients.
    """

    def __init__(self, parameters: list[Tensor], ranks: Ranks) -> None:
        self.parameters = parameters
        self.ranks = ranks
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
        self._views = [
            part.view_as(parameter)
            for part, parameter in zip(self._flat.split(sizes), parameters, strict=True)
        ]
        self._pending: dist.Work | None = None

    @torch.no_grad()
    def launch(self, factor: float | Tensor) -> None:
        """Start to sum the ranks' gradients times ``factor``."""
        if any(parameter.grad is None for parameter in self.parameters):
            self._flat.zero_()
        for views, gradients in self._present():
            torch._foreach_copy_(views, gradients)
        self._flat.mul_(factor)
        self._pending = self.ranks.all_reduce(self._flat)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the sums in the place of the gradients, if that was not done yet."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        for views, gradients in self._present():
            torch._foreach_copy_(gradients, views)

    def _present(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return parts of the flat tensor and the gradients they stand for, by type.

        With several types in a list a copy of many tensors would be many copies.
        """
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for view, parameter in zip(self._views, self.parameters, strict=True):
            if parameter.grad is not None:
                views, gradients = by_dtype.setdefault(parameter.grad.dtype, ([], []))
                views.append(view)
                gradients.append(parameter.grad)
        return list(by_dtype.values())
