"""How long each phase of a run took, and whether it counts against the training budget."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Phase:
    """Seconds spent in one named phase."""

    seconds: float = 0.0
    counts: bool = False
    """Whether the time is part of the training budget."""
    entered: int = 0
    """How often the phase was entered."""


class PhaseTimer:
    """Names and adds up the phases of a run. A phase inside another is not counted twice.

    Example::

        timer = PhaseTimer()
        with timer.measure("train", counts=True):
            ...
            with timer.measure("validate"):  # the time of "train" stands still meanwhile
                ...

    Args:
        now: Monotonic clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.phases: dict[str, Phase] = {}
        self._now = now
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def measure(self, name: str, counts: bool = False) -> Iterator[None]:
        """Measure a block under ``name``; the enclosing phase pauses for its duration."""
        self.start(name, counts)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str, counts: bool = False) -> None:
        """Enter a phase."""
        self._settle()
        phase = self.phases.setdefault(name, Phase(counts=counts))
        phase.entered += 1
        self._open.append(name)

    def stop(self, name: str) -> None:
        """Leave a phase, which must be the one entered last."""
        assert self._open, f"phase {name} was never entered"
        assert self._open[-1] == name, f"phase {self._open[-1]} is still open inside {name}"
        self._settle()
        self._open.pop()

    def seconds(self, name: str) -> float:
        """Return the seconds spent in a phase so far; zero if it was never entered."""
        self._settle()
        return self.phases[name].seconds if name in self.phases else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the phases as plain containers."""
        self._settle()
        return {
            name: [phase.seconds, phase.counts, phase.entered]
            for name, phase in self.phases.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to saved phases: what was measured or open since goes."""
        self._open.clear()
        self.phases = {
            name: Phase(seconds, counts, entered)
            for name, (seconds, counts, entered) in state_dict.items()
        }

    def _settle(self) -> None:
        # Whatever passed since the last event belongs to the innermost open phase.
        now = self._now()
        if self._open:
            self.phases[self._open[-1]].seconds += now - self._since
        self._since = now
