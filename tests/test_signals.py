"""When a signal is noted, when it acts at once, and what it ends a run with."""

import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pgl.signals import StopSignals, defer_signals, requested_signal, stop_error, take_over_signals


def handling(deferred: bool) -> tuple[StopSignals, list[int]]:
    """Return signal handling with a launcher that only writes down what it is told to kill with."""
    killed: list[int] = []
    launcher = SimpleNamespace(kill=killed.append)
    signals = StopSignals(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    signals.deferred = deferred
    return signals, killed


def test_signals_of_a_training_step_are_noted():
    signals, killed = handling(deferred=True)
    signals._on_signal(signal.SIGINT, None)
    signals._on_signal(signal.SIGTERM, None)
    signals._on_signal(signal.SIGTERM, None)
    assert signals.requested == signal.SIGTERM
    assert not killed


@pytest.mark.parametrize("deferred", [False, True])
def test_a_signal_outside_of_steps_or_a_second_ctrl_c_ends_all_processes(deferred):
    signals, killed = handling(deferred)
    if deferred:
        signals._on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        signals._on_signal(signal.SIGINT, None)
    assert killed == [signal.SIGKILL]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_ends_all_processes_unless_it_is_the_first_ones_twin(monkeypatch, first):
    clock = iter([100.0, 100.5, 101.5])
    monkeypatch.setattr("pgl.signals.time.monotonic", lambda: next(clock))
    signals, killed = handling(deferred=True)
    signals._on_signal(first, None)
    signals._on_signal(signal.SIGTERM, None)
    assert not killed
    with pytest.raises(SIGTERMException):
        signals._on_signal(signal.SIGTERM, None)
    assert killed == [signal.SIGKILL]


def test_sigterm_ends_with_its_usual_exit_status():
    error = stop_error(signal.SIGTERM)
    assert isinstance(error, SIGTERMException)
    assert error.code == 143


def test_handlers_are_put_in_place_and_back():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    take_over_signals(trainer)
    trainer._signal_connector.register_signal_handlers()
    try:
        defer_signals(trainer, True)
        signal.raise_signal(signal.SIGTERM)
        assert requested_signal(trainer) == signal.SIGTERM
        assert not trainer.received_sigterm, "Lightning would stop this rank alone"
    finally:
        trainer._signal_connector.teardown()
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_trainer_without_the_handling_reports_no_signal():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    defer_signals(trainer, True)
    assert requested_signal(trainer) == 0
