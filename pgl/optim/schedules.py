"""Schedules as pure functions of how far a run has come. No clock and no state in here."""

import math
from dataclasses import dataclass, replace
from typing import Literal

_MIN_WINDOW = 1e-12


def scaled_steps(steps: int, step_scale: float) -> int:
    """Return a number of steps for a run whose steps are ``step_scale`` times the recipe's.

    Rounded, and at least 1; 0 stays 0, which switches something off.
    """
    return max(round(steps * step_scale), 1) if steps else 0


def scaled_decay(decay: float, step_scale: float) -> float:
    """Return the decay that forgets as much in ``step_scale`` steps as ``decay`` does in one."""
    return decay ** (1.0 / step_scale)


@dataclass(frozen=True)
class Progress:
    """How far a run is, at the start of a step."""

    step: int
    """Optimizer steps done, i.e. the 0-based number of the coming step."""
    elapsed_seconds: float
    """Training time so far, without compilation, validation and saving."""
    budget_seconds: float | None
    """Training time allowed, or None if the run is measured in steps."""
    max_steps: int | None
    """Steps allowed; measures the run if there is no time budget."""

    def __post_init__(self) -> None:
        if self.budget_seconds is None and self.max_steps is None:
            raise ValueError(
                "A schedule needs an end: set a time budget in seconds or a maximum of steps."
            )
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise ValueError(
                f"The time budget must be positive, got {self.budget_seconds} seconds; "
                "set it to null to run on steps."
            )
        if self.max_steps is not None and not self.max_steps > 0:
            raise ValueError(f"The maximum of steps must be positive, got {self.max_steps}.")

    @property
    def fraction(self) -> float:
        """Part of the run that is over, 0 to 1: of the time budget, else of the steps."""
        if self.budget_seconds is not None:
            return min(max(self.elapsed_seconds / self.budget_seconds, 0.0), 1.0)
        assert self.max_steps is not None
        return min(self.step / self.max_steps, 1.0)


@dataclass
class ScheduleConfig:
    """Warm-down of the learning rates and warm-up of Muon's momentum. Defaults: PR #236."""

    warmdown_shape: Literal["linear", "cosine"] = "linear"
    """Course of the warm-down; cosine is PR 324."""
    warmdown_steps: int | None = 3000
    """Length of the warm-down in steps (on a time budget: that many average step times)."""
    warmdown_fraction: float | None = None
    """Length of the warm-down as a part of the run; set warmdown_steps to null to use it."""
    warmdown_max_fraction: float | None = None
    """Upper bound of the warm-down as a part of the time budget (PR 324: 0.5), null for none."""
    momentum_start: float = 0.92
    """Muon momentum of the first step."""
    momentum_end: float = 0.99
    """Muon momentum after the warm-up."""
    momentum_warmup_steps: int | None = 1500
    """Length of the momentum warm-up in steps, 0 for none."""
    momentum_warmup_fraction: float | None = None
    """Length of the momentum warm-up as a part of the run; set momentum_warmup_steps to null."""

    def __post_init__(self) -> None:
        _exactly_one("warmdown_steps", self.warmdown_steps, self.warmdown_fraction)
        _exactly_one(
            "momentum_warmup_steps", self.momentum_warmup_steps, self.momentum_warmup_fraction
        )
        for name in ("warmdown_fraction", "warmdown_max_fraction", "momentum_warmup_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"model.schedule.{name} must be between 0 and 1, got {value}.")
        for name in ("momentum_start", "momentum_end"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"model.schedule.{name} must be at least 0 and below 1, got {value}."
                )

    def scaled(self, step_scale: float) -> "ScheduleConfig":
        """Return the schedule of a run with ``step_scale`` times the recipe's steps.

        What counts steps shrinks with the run; fractions, shapes and values stay.
        """
        warmdown, warmup = self.warmdown_steps, self.momentum_warmup_steps
        return replace(
            self,
            warmdown_steps=None if warmdown is None else scaled_steps(warmdown, step_scale),
            momentum_warmup_steps=None if warmup is None else scaled_steps(warmup, step_scale),
        )


def _exactly_one(steps_name: str, steps: int | None, fraction: float | None) -> None:
    fraction_name = steps_name.removesuffix("steps") + "fraction"
    if (steps is None) == (fraction is None):
        raise ValueError(
            f"model.schedule.{steps_name} and {fraction_name}: set exactly one of them and the "
            "other to null."
        )
    if steps is not None and steps < 0:
        raise ValueError(f"model.schedule.{steps_name} must not be negative, got {steps}.")


def lr_scale(progress: Progress, config: ScheduleConfig) -> float:
    """Return the factor of every learning rate, in [0, 1]: 1, then the warm-down to 0.

    On a time budget the warm-down of ``warmdown_steps`` is the time that many steps take at the
    average pace so far, so it ends with the budget on any hardware. Without a budget it ends with
    ``max_steps``. There is no warm-up. Sources: PRs #236, #388, #703 (linear), #324 (cosine).
    """
    if progress.budget_seconds is not None:
        remaining = max(progress.budget_seconds - progress.elapsed_seconds, 0.0)
        window = _window(progress, config, progress.budget_seconds)
        if config.warmdown_max_fraction is not None:
            window = min(window, config.warmdown_max_fraction * progress.budget_seconds)
    else:
        assert progress.max_steps is not None
        remaining = float(max(progress.max_steps - progress.step, 0))
        window = _window(progress, config, float(progress.max_steps))
    if config.warmdown_steps == 0 or config.warmdown_fraction == 0 or remaining > window:
        return 1.0
    left = remaining / max(window, _MIN_WINDOW)
    if config.warmdown_shape == "cosine":
        return max(0.5 * (1.0 + math.cos(math.pi * (1.0 - left))), 0.0)
    return left


def _window(progress: Progress, config: ScheduleConfig, whole: float) -> float:
    """Return the length of the warm-down in seconds or steps, as ``whole`` is."""
    if config.warmdown_fraction is not None:
        return config.warmdown_fraction * whole
    assert config.warmdown_steps is not None
    if progress.budget_seconds is None:
        return float(config.warmdown_steps)
    return config.warmdown_steps * (progress.elapsed_seconds / max(progress.step, 1))


def muon_momentum(progress: Progress, config: ScheduleConfig) -> float:
    """Return Muon's momentum: linear from ``momentum_start`` to ``momentum_end``, then constant."""
    if config.momentum_warmup_fraction is not None:
        position, length = progress.fraction, config.momentum_warmup_fraction
    else:
        assert config.momentum_warmup_steps is not None
        position, length = progress.step, config.momentum_warmup_steps
    part = min(position / length, 1.0) if length else 1.0
    return (1.0 - part) * config.momentum_start + part * config.momentum_end


def mile_gamma(scale: float, peak: float = 1.1, threshold: float = 0.15) -> float:
    """Return the exponent of the MiLe loss: full at constant rate, then falling, 0 near the end.

    ``peak * (scale - threshold) / (1 - threshold)`` above the threshold (PR #703).

    Args:
        scale: Learning-rate factor of the step, see :func:`lr_scale`.
        peak: Value at scale 1.
        threshold: Scale below which the loss is plain cross-entropy.

    Raises:
        ValueError: The threshold is not in [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"The MiLe threshold must be at least 0 and below 1, got {threshold}.")
    return peak * (scale - threshold) / (1.0 - threshold) if scale > threshold else 0.0


def swa_due(
    step: int,
    scale: float,
    start_scale: float,
    every_steps: int,
    count_from: Literal["zero", "one"] = "one",
) -> bool:
    """Return whether a weight snapshot is taken after a step.

    | run | start_scale | every_steps | count_from |
    |---|---|---|---|
    | PR #236 | 0.5 | 200 | zero |
    | PR #324 | 0.35 | 25 | one |
    | PR #388 | 0.2 | 50 | one |

    Args:
        step: 0-based number of the step just done.
        scale: Learning-rate factor used in that step.
        start_scale: Snapshots are taken below this factor.
        every_steps: Distance of snapshots.
        count_from: Number of the first step for the distance.

    Raises:
        ValueError: ``every_steps`` is below 1.
    """
    if every_steps < 1:
        raise ValueError(f"every_steps of the snapshots must be at least 1, got {every_steps}.")
    number = step if count_from == "zero" else step + 1
    return scale < start_scale and number % every_steps == 0


def intervals_done(progress: Progress, every_fraction: float) -> int:
    """Return how many whole intervals, each ``every_fraction`` of the run, are over."""
    # The small addend: 0.3 / 0.1 is just below 3 in floating point.
    return math.floor(progress.fraction / every_fraction + 1e-9)
