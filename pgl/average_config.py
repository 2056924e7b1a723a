"""Which averages of the weights a run keeps, and how they shrink with a shorter run."""

from dataclasses import dataclass, replace
from typing import Literal

from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage
from pgl.optim import Progress, scaled_decay, scaled_steps

Average = ExponentialAverage | UniformAverage | LastAverage


@dataclass(frozen=True)
class EMAConfig:
    """An exponential moving average (PR #703: decay 0.997, worth about 0.001 BPB)."""

    decay: float = 0.997
    """Share of the old average that a new step keeps."""
    horizon_fraction: float | None = None
    """Averaging horizon 1 / (1 - decay) as a fraction of the run, in place of decay: a short run is
    then not averaged with its own initialisation."""
    start_fraction: float = 0.0
    """Share of the budget after which averaging starts."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"averaging.ema.decay must be in [0, 1), got {self.decay}")
        if self.horizon_fraction is not None and not 0 < self.horizon_fraction <= 1:
            raise ValueError(
                f"averaging.ema.horizon_fraction must be in (0, 1], got {self.horizon_fraction}"
            )
        if not 0 <= self.start_fraction < 1:
            raise ValueError(
                f"averaging.ema.start_fraction must be in [0, 1), got {self.start_fraction}"
            )

    def scaled(self, step_scale: float) -> "EMAConfig":
        """Return the average of a run with ``step_scale`` times the recipe's steps."""
        return replace(self, decay=scaled_decay(self.decay, step_scale))

    def __str__(self) -> str:
        if self.horizon_fraction is not None:
            return f"horizon {self.horizon_fraction:g} of the run"
        return f"decay {self.decay:.6g}"


@dataclass(frozen=True)
class SnapshotConfig:
    """Snapshots at regular distances once the learning rate has fallen far enough."""

    every_steps: int | None = 50
    """Optimizer steps between snapshots (PR #236: 200, #324: 25, #388: 50)."""
    every_fraction: float | None = None
    """Distance of snapshots as a fraction of the run; set every_steps to null to use it."""
    start_scale: float = 0.2
    """Snapshots are taken while the learning-rate scale is below this (#236: 0.5, #324: 0.35);
    above 1 the whole run is covered."""
    count_from: Literal["zero", "one"] = "one"
    """Number of the first step when counting every_steps (#236: zero)."""
    keep: int | None = None
    """Average only the most recent so many snapshots. None: all of them."""

    def __post_init__(self) -> None:
        if (self.every_steps is None) == (self.every_fraction is None):
            raise ValueError(
                "averaging.<swa or last>: set exactly one of every_steps and every_fraction, the "
                "other to null"
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(
                f"averaging.<swa or last>.every_steps must be at least 1, got {self.every_steps}"
            )
        if self.every_fraction is not None and not 0 < self.every_fraction <= 1:
            raise ValueError(
                "averaging.<swa or last>.every_fraction must be in (0, 1], got "
                f"{self.every_fraction}"
            )
        if self.start_scale <= 0:
            raise ValueError(
                f"averaging.<swa or last>.start_scale must be positive, got {self.start_scale}"
            )
        if self.keep is not None and self.keep < 1:
            raise ValueError(
                f"averaging.<swa or last>.keep must be at least 1 or null, got {self.keep}"
            )

    def scaled(self, step_scale: float) -> "SnapshotConfig":
        """Return the snapshots of a run with ``step_scale`` times the recipe's steps.

        Their number stays about the same, and so does ``keep``.
        """
        if self.every_steps is None:
            return self
        return replace(self, every_steps=scaled_steps(self.every_steps, step_scale))

    def __str__(self) -> str:
        every = f"{self.every_steps} steps"
        if self.every_fraction is not None:
            every = f"{self.every_fraction:g} of the run"
        kept = "" if self.keep is None else f", last {self.keep}"
        return f"every {every} below scale {self.start_scale:g}{kept}"


def make_average(config: EMAConfig | SnapshotConfig, device: str | None) -> Average:
    """Return the empty average that a configuration describes."""
    if isinstance(config, EMAConfig):
        return ExponentialAverage(config.decay, device=device)
    if config.keep is None:
        return UniformAverage(device=device)
    return LastAverage(config.keep, device=device)


def smallest_count(config: EMAConfig | SnapshotConfig) -> int:
    """Return the updates from which on an average may stand for the model.

    The mean of one snapshot is that snapshot, older than the last weights: PRs #236 and #388 keep
    the last weights then. Who keeps one snapshot only (``keep`` 1) has asked for it.
    """
    return 1 if isinstance(config, EMAConfig) or config.keep == 1 else 2


def ema_decay(progress: Progress, config: EMAConfig) -> float:
    """Return the decay of one EMA update.

    With ``horizon_fraction`` the horizon 1 / (1 - decay) is that share of the run's expected number
    of steps, taken from the pace so far.
    """
    if config.horizon_fraction is None:
        return config.decay
    expected_steps = progress.step / max(progress.fraction, 1e-6)
    return 1.0 - 1.0 / max(config.horizon_fraction * expected_steps, 1.0)
