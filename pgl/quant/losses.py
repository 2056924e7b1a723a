"""How much storing a model lost, in its weights and in the outputs of its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.quant.precision import full_float32
from pgl.quant.stored import StoredTensor


@dataclass(frozen=True)
class QuantizationLoss:
    """What storing a tensor lost."""

    error: float
    """Sum of the squared errors of the weights."""

    energy: float
    """Sum of the squared weights."""

    output_error: float | None = None
    """Squared error of the layer's outputs on the calibration data; None without a Hessian."""

    output_energy: float | None = None
    """Energy of those outputs."""

    @property
    def relative(self) -> float:
        """Norm of the error over the norm of the weights."""
        return _ratio(self.error, self.energy) ** 0.5

    @property
    def output_relative(self) -> float | None:
        """The same for the layer's outputs on the calibration data; None without a Hessian."""
        if self.output_error is None or self.output_energy is None:
            return None
        return _ratio(self.output_error, self.output_energy) ** 0.5


@torch.no_grad()
def quantization_losses(
    state_dict: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    hessians: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizationLoss]:
    """Compare stored tensors with the weights they came from, tensor by tensor, where those are."""
    losses = {}
    for name, tensor in stored.items():
        weight = state_dict[name].detach().float()
        error = weight - tensor.weights().to(weight.device)
        output_error = output_energy = None
        if hessians is not None and name in hessians:
            hessian_CC = hessians[name].float().to(weight.device)
            with full_float32(weight.device.type):
                output_error = _energy(error, hessian_CC)
                output_energy = _energy(weight, hessian_CC)
        losses[name] = QuantizationLoss(
            error.square().sum().item(), weight.square().sum().item(), output_error, output_energy
        )
    return losses


def losses_by_group(
    losses: Mapping[str, QuantizationLoss], groups: Mapping[str, str]
) -> dict[str, QuantizationLoss]:
    """Add up what the tensors of each group lost.

    Args:
        losses: By tensor.
        groups: Group of each tensor. Tensors without a Hessian do not count in the outputs' error.
    """
    return {
        group: sum_losses([loss for name, loss in losses.items() if groups[name] == group])
        for group in dict.fromkeys(groups.values())
    }


def sum_losses(losses: Sequence[QuantizationLoss]) -> QuantizationLoss:
    """Add up what tensors lost."""
    outputs = [loss for loss in losses if loss.output_error is not None]
    return QuantizationLoss(
        sum(loss.error for loss in losses),
        sum(loss.energy for loss in losses),
        sum(loss.output_error or 0.0 for loss in outputs) if outputs else None,
        sum(loss.output_energy or 0.0 for loss in outputs) if outputs else None,
    )


def _energy(w_RC: Tensor, hessian_CC: Tensor) -> float:
    return max((w_RC @ hessian_CC * w_RC).sum().item(), 0.0)


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else 0.0
