"""AdamW for parameters of one type: the fused kernel over a list, nothing read back by the host."""

from typing import Any

import torch
from torch import Tensor


class AdamWBucket:
    """All parameters of one group that have the same type and device.

    Moments have the type of the parameter, as in the reference runs: bf16 for bf16 embeddings.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.exp_avg = [torch.zeros_like(parameter) for parameter in parameters]
        self.exp_avg_sq = [torch.zeros_like(parameter) for parameter in parameters]
        # One step count per parameter, on its device: the fused kernel reads it there.
        self.steps = [torch.zeros((), device=parameter.device) for parameter in parameters]

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
        steps = [self.steps[i] for i in present]
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
