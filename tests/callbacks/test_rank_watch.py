"""The time-outs of ranks reach what waits for them; tests/distributed has the ranks themselves."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from callbacks import DivergenceGuard, RankWatch, rank_watch
from pgl.fingerprint import weights_fingerprint


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


def test_weights_are_compared_once_the_steps_in_flight_are_judged(monkeypatch):
    # A step that turns out bad may be rolled back, on all ranks or on the one that sees it first.
    module = torch.nn.Linear(2, 2)
    guard = DivergenceGuard()
    monkeypatch.setattr(guard, "settle", lambda trainer, module: module.bias.data.fill_(0.5))
    expected = torch.nn.Linear(2, 2)
    expected.load_state_dict(module.state_dict() | {"bias": torch.full((2,), 0.5)})
    compared = []

    def all_gather(hashes, mine):
        compared.append(mine["weights"])
        hashes[:] = [mine] * len(hashes)

    monkeypatch.setattr(rank_watch.dist, "all_gather_object", all_gather)
    watch = RankWatch()
    watch.on_train_end(SimpleNamespace(world_size=2, callbacks=[guard, watch]), module)
    assert compared == [weights_fingerprint(expected)]
    assert watch.replicas == {"ranks": 2, "different": None}


@pytest.mark.parametrize("name", ["timeout_seconds", "collective_timeout_seconds"])
def test_no_time_is_refused(name):
    with pytest.raises(ValueError, match=f"ranks.{name} must be positive, got 0"):
        RankWatch(**{name: 0})
