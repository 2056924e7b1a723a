"""SIGTERM and Ctrl-C as a wish that a run grants between two optimizer steps."""

import signal
import time
from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_SECONDS = 1.0


class StopSignals(_SignalConnector):
    """Notes signals while steps are running, and ends the process at once at any other time.

    Lightning's own handler starts a collective from wherever the main thread happens to be, which
    mixes with the collectives of the step; its training loop broadcasts a flag on the device before
    each micro-batch and reads it back, so that a GPU's queue runs empty. Here the handler takes a
    note; :class:`callbacks.WallClockBudget` shares the note of every rank together with the clock,
    once per optimizer step and on the CPU; :class:`callbacks.RunCheckpoint` saves and raises
    Lightning's exception, on all ranks at the same step.

    A second signal does not wait for the step. A second SIGTERM counts from one second after the
    first on: senders such as ``timeout`` address a process and its group, and it gets two.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.requested = 0
        """Number of the signal that this process got; 0 for none."""
        self._requested_at = 0.0
        self.deferred = False
        """Whether somebody acts on ``requested`` at the end of each step."""

    @override
    def register_signal_handlers(self) -> None:
        """Called before the run's stage begins; Lightning restores the handlers at its end."""
        super().register_signal_handlers()
        for signum in STOP_SIGNALS:
            self._register_signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        both_ctrl_c = signum == signal.SIGINT and self.requested == signal.SIGINT
        late = self.requested != 0 and now > self._requested_at + SAME_SIGNAL_SECONDS
        if self.deferred and not (both_ctrl_c or late):
            self._requested_at = self._requested_at if self.requested else now
            self.requested = max(self.requested, signum)
            return
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            # The other processes may be waiting for this one inside a collective.
            launcher.kill(signal.SIGKILL)
        raise stop_error(signum)


def take_over_signals(trainer: pl.Trainer) -> None:
    """Put :class:`StopSignals` in place of Lightning's handling in a Trainer's ``fit``."""
    epoch_loop = trainer.fit_loop.epoch_loop
    assert hasattr(epoch_loop, "_broadcast_sigterm_tensor"), "Lightning shares SIGTERM elsewhere"
    trainer._signal_connector = StopSignals(trainer)
    epoch_loop._broadcast_sigterm_tensor = _shared_with_the_clock


def requested_signal(trainer: pl.Trainer) -> int:
    """Return the number of the signal that this process noted, 0 for none."""
    connector = trainer._signal_connector
    return connector.requested if isinstance(connector, StopSignals) else 0


def defer_signals(trainer: pl.Trainer, deferred: bool) -> None:
    """Say whether signals are noted for the end of the step, or act at once."""
    connector = trainer._signal_connector
    if isinstance(connector, StopSignals):
        connector.deferred = deferred


def stop_error(signum: int) -> BaseException:
    """Return what ends a run: exit status 143 after SIGTERM, Lightning's 1 after Ctrl-C."""
    if signum == signal.SIGINT:
        return KeyboardInterrupt()
    return SIGTERMException(128 + signum)


def _shared_with_the_clock() -> None:
    """Stand in for Lightning's broadcast before each micro-batch."""
