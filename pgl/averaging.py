"""Averages of weights over a run: exponential, uniform (SWA) and of the last few snapshots.

All are kept in float32 whatever the weights' type: a running sum in bf16, as in PRs #236 and #324,
is off by 0.3 to 1.1 % after 7 to 48 snapshots, where rounding the result once costs 0.17 %.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class WeightAverage(ABC):
    """What all averages share: a fixed set of names, a count, a state dict of plain containers.

    Args:
        device: Where the average lives; None for the device of the weights.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self.count = 0
        """Updates so far."""

    @torch.no_grad()
    def update(self, named_tensors: Mapping[str, Tensor]) -> None:
        """Take the weights as they are now into the average.

        Args:
            named_tensors: All weights, the same names at every update.

        Raises:
            ValueError: Other names than before, or a tensor that is not floating-point.
        """
        self._check(named_tensors)
        if self.device is None:
            # A loaded state may lie elsewhere than the weights it goes on with.
            self._move(next(iter(named_tensors.values())).device)
        self._accumulate(named_tensors)
        self.count += 1

    @abstractmethod
    def average(self) -> dict[str, Tensor]:
        """Return the average as new float32 tensors.

        Raises:
            ValueError: There was no update yet.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the count and references to the tensors, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a copy of a saved state."""

    @abstractmethod
    def _accumulate(self, named_tensors: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _move(self, device: torch.device) -> None: ...

    @abstractmethod
    def _names(self) -> set[str]: ...

    def _check(self, named_tensors: Mapping[str, Tensor]) -> None:
        if self.count and named_tensors.keys() != self._names():
            different = sorted(named_tensors.keys() ^ self._names())
            raise ValueError(
                f"A weight average must be given the same names at every update; "
                f"{', '.join(different[:5])} are not in both."
            )
        for name, tensor in named_tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"Only floating-point weights can be averaged; leave out {name} "
                    f"({tensor.dtype})."
                )

    def _require_update(self) -> None:
        if not self.count:
            raise ValueError("There is no weight average yet: no snapshot was taken.")


class _RunningAverage(WeightAverage):
    """An average that one float32 tensor per weight holds."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self._tensors: dict[str, Tensor] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensors": dict(self._tensors)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.count = int(state_dict["count"])
        self._tensors = {
            name: _snapshot(tensor, self.device, torch.float32)
            for name, tensor in state_dict["tensors"].items()
        }

    @override
    def _names(self) -> set[str]:
        return set(self._tensors)

    @override
    def _move(self, device: torch.device) -> None:
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}

    def _start(self, named_tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {
            name: _snapshot(tensor, self.device, torch.float32)
            for name, tensor in named_tensors.items()
        }

    def _float_list(self, named_tensors: Mapping[str, Tensor]) -> list[Tensor]:
        # In the order of our own tensors; no copy where type and device agree already.
        return [
            named_tensors[name].detach().to(own.device, torch.float32)
            for name, own in self._tensors.items()
        ]


class ExponentialAverage(_RunningAverage):
    """EMA ``e <- decay e + (1 - decay) w``; the first update copies the weights.

    Without bias correction, as PRs #549 and #703, where decay 0.997 after every step gained 0.001
    BPB over the last weights.

    Args:
        decay: Part that is kept, unless an update says otherwise.
        device: Where the average lives; None for the device of the weights.

    Raises:
        ValueError: The decay is not in [0, 1].
    """

    def __init__(self, decay: float = 0.997, device: str | None = None) -> None:
        super().__init__(device)
        self.decay = _checked_decay(decay)
        self._decay_now = self.decay

    @override
    def update(self, named_tensors: Mapping[str, Tensor], decay: float | None = None) -> None:
        """Take the weights into the average.

        Args:
            named_tensors: All weights, the same names at every update.
            decay: Decay of this update; None for that of the constructor.

        Raises:
            ValueError: Other names than before, a tensor that is not floating-point, or a decay
                outside [0, 1].
        """
        self._decay_now = self.decay if decay is None else _checked_decay(decay)
        super().update(named_tensors)

    @override
    def average(self) -> dict[str, Tensor]:
        self._require_update()
        return {name: tensor.clone() for name, tensor in self._tensors.items()}

    @override
    def _accumulate(self, named_tensors: Mapping[str, Tensor]) -> None:
        if not self.count:
            self._start(named_tensors)
            return
        torch._foreach_lerp_(
            list(self._tensors.values()), self._float_list(named_tensors), 1.0 - self._decay_now
        )


class UniformAverage(_RunningAverage):
    """Stochastic weight averaging: the mean of all snapshots, from a running float32 sum."""

    @override
    def average(self) -> dict[str, Tensor]:
        self._require_update()
        return {name: tensor / self.count for name, tensor in self._tensors.items()}

    @override
    def _accumulate(self, named_tensors: Mapping[str, Tensor]) -> None:
        if not self.count:
            self._start(named_tensors)
            return
        torch._foreach_add_(list(self._tensors.values()), self._float_list(named_tensors))


class LastAverage(WeightAverage):
    """Mean of the most recent snapshots, which a ring buffer keeps in the weights' own type.

    Args:
        length: Snapshots kept.
        device: Where the snapshots live ("cpu" saves device memory); None for the device of the
            weights.

    Raises:
        ValueError: ``length`` is below 1.
    """

    def __init__(self, length: int, device: str | None = None) -> None:
        super().__init__(device)
        if length < 1:
            raise ValueError(f"An average of the last snapshots needs at least 1, got {length}.")
        self.length = length
        self._snapshots: list[dict[str, Tensor]] = []

    @override
    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        """Return the mean of the snapshots kept as new float32 tensors.

        Raises:
            ValueError: There was no update yet.
        """
        self._require_update()
        first, *others = self._snapshots
        mean = {name: _snapshot(tensor, None, torch.float32) for name, tensor in first.items()}
        for snapshot in others:
            torch._foreach_add_(list(mean.values()), [snapshot[name].float() for name in mean])
        torch._foreach_div_(list(mean.values()), len(self._snapshots))
        return mean

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "snapshots": [dict(s) for s in self._snapshots]}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a copy of a saved state.

        Raises:
            ValueError: The state is of another ``length``.
        """
        snapshots = state_dict["snapshots"]
        count = int(state_dict["count"])
        if len(snapshots) != min(count, self.length):
            raise ValueError(
                f"The saved average holds {len(snapshots)} of {count} snapshots, which does not "
                f"fit an average of the last {self.length}; use the length it was saved with."
            )
        self.count = count
        self._snapshots = [
            {name: _snapshot(tensor, self.device) for name, tensor in snapshot.items()}
            for snapshot in snapshots
        ]

    @override
    def _names(self) -> set[str]:
        return set(self._snapshots[0])

    @override
    def _move(self, device: torch.device) -> None:
        self._snapshots = [
            {name: tensor.to(device) for name, tensor in snapshot.items()}
            for snapshot in self._snapshots
        ]

    @override
    def _accumulate(self, named_tensors: Mapping[str, Tensor]) -> None:
        if len(self._snapshots) < self.length:
            self._snapshots.append(
                {name: _snapshot(tensor, self.device) for name, tensor in named_tensors.items()}
            )
            return
        oldest = self._snapshots[self.count % self.length]
        names = list(oldest)
        torch._foreach_copy_([oldest[n] for n in names], [named_tensors[n].detach() for n in names])


def _checked_decay(decay: float) -> float:
    if not 0 <= decay <= 1:
        raise ValueError(f"The decay of a weight average must be between 0 and 1, got {decay}.")
    return decay


def _snapshot(tensor: Tensor, device: str | None, dtype: torch.dtype | None = None) -> Tensor:
    # copy=True: the weights go on changing in place.
    return tensor.detach().to(device or tensor.device, dtype or tensor.dtype, copy=True)
