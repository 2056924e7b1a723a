"""The time-outs of ranks reach what waits for them; tests/distributed has the ranks themselves."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from callbacks import RankWatch, rank_watch


def test_a_collective_waits_as_long_as_configured():
    strategy = DDPStrategy()
    RankWatch(collective_timeout_seconds=7).limit_collectives(strategy)
    assert strategy._timeout == timedelta(seconds=7)


def test_a_strategys_own_timeout_comes_first():
    strategy = DDPStrategy(timeout=timedelta(seconds=3))
    RankWatch(collective_timeout_seconds=7).limit_collectives(strategy)
    assert strategy._timeout == timedelta(seconds=3)


def test_one_process_has_no_collective():
    strategy = SingleDeviceStrategy("cpu")
    RankWatch(collective_timeout_seconds=7).limit_collectives(strategy)
    assert not hasattr(strategy, "_timeout")


@pytest.mark.parametrize("rank", [0, 1])
def test_silence_is_borne_as_long_as_configured(monkeypatch, rank):
    made = []

    class Recorded:
        port = 1234

        def __init__(self, host, port, rank, world_size, timeout_seconds):
            made.append((host, port, rank, world_size, timeout_seconds))

        def start(self):
            made.append("started")

    monkeypatch.setattr(rank_watch, "Heartbeats", Recorded)
    strategy = DDPStrategy(cluster_environment=SimpleNamespace(main_address="first"))
    strategy.broadcast = lambda port: 1234
    strategy.barrier = lambda name: None
    trainer = SimpleNamespace(
        strategy=strategy, global_rank=rank, world_size=2, is_global_zero=rank == 0
    )
    RankWatch(timeout_seconds=42.0)._start(trainer)
    assert made == [("first", None if rank == 0 else 1234, rank, 2, 42.0), "started"]


@pytest.mark.parametrize("name", ["timeout_seconds", "collective_timeout_seconds"])
def test_no_time_is_refused(name):
    with pytest.raises(ValueError, match=f"ranks.{name} must be positive, got 0"):
        RankWatch(**{name: 0})
