"""What an export made, and what its parts take and lost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pgl.artifact import GroupSize, SizeReport
from pgl.artifact.fit import Attempt
from pgl.quant import QuantizationLoss, losses_by_group, sum_losses


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    """The artifact."""
    size: SizeReport
    """Where its bytes go."""
    losses: dict[str, QuantizationLoss]
    """What quantisation lost, by tensor."""
    groups: dict[str, str]
    """The group of each tensor."""
    state_dict: dict[str, Tensor]
    """The GPT's weights as read back from the file, on the CPU."""
    attempts: list[Attempt]
    """Files packed in search of the size, the planned one first."""
    step_factor: float
    """What the plan's steps were multiplied by."""

    def group_losses(self) -> dict[str, QuantizationLoss]:
        """Return what quantisation lost, by group."""
        return losses_by_group(self.losses, self.groups)

    def output_error(self) -> float | None:
        """Return the relative error of the layers' outputs, over all matrices with a Hessian."""
        output_error = sum_losses(list(self.losses.values())).output_relative
        return None if output_error is None else round(output_error, 6)

    def group_rows(self) -> list[dict[str, Any]]:
        """Return what each group takes and lost, as plain values."""
        losses = self.group_losses()
        return [_group_row(group, losses.get(group.name)) for group in self.size.groups]


def _group_row(group: GroupSize, loss: QuantizationLoss | None) -> dict[str, Any]:
    outputs = None if loss is None else loss.output_relative
    return {
        "name": group.name,
        "parameters": group.parameters,
        "packed_bytes": group.packed_bytes,
        "bits_per_weight": round(group.bits_per_weight, 4),
        "order0_bits_per_weight": round(group.order0_bits_per_weight, 4),
        "kinds": list(group.kinds),
        "codecs": list(group.codecs),
        "relative_error": None if loss is None else round(loss.relative, 6),
        "output_error": None if outputs is None else round(outputs, 6),
    }
