"""Parallel Muon hides its messages: what one of two ranks starts, computes and waits for, in turn.

No message is sent: the other rank is made up, so that the order is the same in every run.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pgl.optim import MuonAdamW, muon_adamw, muon_group
from pgl.optim.adamw import AdamWBucket
from pgl.optim.muon import advance_stacks
from pgl.optim.ranks import Ranks

BIG, MIDDLE, SINGLE = (16, 8), (8, 8), (6, 4)
"""Shapes of four, two and one matrices: the order in which the optimizer takes them."""
STACKS = ("big", "middle", "single")
NAMES = dict(zip((BIG, MIDDLE, SINGLE), STACKS, strict=True))


@dataclass
class Work:
    """What a collective returns; notes when it is waited for."""

    name: str
    events: list[str]

    def wait(self) -> None:
        self.events.append(f"wait for {self.name}")


@dataclass(frozen=True)
class MadeUpRanks(Ranks):
    """A rank of two whose collectives return at once and leave the other's part out."""

    events: list[str] = field(default_factory=list)

    def all_gather(self, share: Tensor) -> tuple[Tensor, Work]:
        return torch.cat([share] * self.count), self._start("gather", share)

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, Work]:
        places = whole.size(0) // self.count
        share = whole[self.rank * places : (self.rank + 1) * places].clone()
        return share, self._start("reduce-scatter", share)

    def all_reduce(self, tensor: Tensor) -> Work:
        name = "norm" if tensor.ndim == 0 else "small gradients"
        self.events.append(f"start {name}")
        return Work(name, self.events)

    def _start(self, verb: str, share: Tensor) -> Work:
        name = f"{verb} {NAMES[tuple(share.shape[1:])]}"
        self.events.append(f"start {name}")
        return Work(name, self.events)


def events_of_a_step(monkeypatch, rank: int, **options: object) -> list[str]:
    """Return what the optimizer of one rank does in a step."""
    events: list[str] = []
    ranks = MadeUpRanks(rank, 2, None, events)
    monkeypatch.setattr(muon_adamw.Ranks, "of", lambda group: ranks)

    def advance(momenta, *arguments):
        events.extend(f"Newton-Schulz {NAMES[tuple(M_KRC.shape[1:])]}" for M_KRC in momenta)
        return advance_stacks(momenta, *arguments)

    def adamw_step(self, *arguments):
        events.append("AdamW")

    monkeypatch.setattr(muon_group, "advance_stacks", advance)
    monkeypatch.setattr(AdamWBucket, "step", adamw_step)
    shapes = [SINGLE, *[MIDDLE] * 2, *[BIG] * 4]
    matrices = [Parameter(torch.randn(shape)) for shape in shapes]
    gains = [Parameter(torch.ones(3))]
    groups = [
        {"kind": "adamw", "name": "scalar", "params": gains},
        {"kind": "muon", "name": "matrix", "params": matrices},
    ]
    optimizer = MuonAdamW(groups, reduce_gradients=True, grad_clip_norm=0.3, **options)
    for parameter in [*matrices, *gains]:
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return events


@pytest.mark.parametrize("clip", ["reduced", "local"])
def test_all_reductions_start_before_anything_is_waited_for(monkeypatch, clip):
    events = events_of_a_step(monkeypatch, rank=0, clip=clip)
    first_wait = next(i for i, event in enumerate(events) if event.startswith("wait"))
    starts = [f"start reduce-scatter {name}" for name in STACKS]
    before = [event for event in events[:first_wait] if event in starts]
    assert before == starts
    assert "start small gradients" in events[:first_wait]
    assert not any("Newton-Schulz" in event for event in events[:first_wait])


def test_updates_of_a_stack_travel_while_the_next_one_is_computed(monkeypatch):
    """Clipped locally, nothing needs all gradients: a stack waits for its own alone."""
    events = events_of_a_step(monkeypatch, rank=0, clip="local")
    start = events.index("wait for reduce-scatter big")
    assert events[start:] == [
        *("wait for reduce-scatter big", "Newton-Schulz big", "start gather big"),
        *("wait for reduce-scatter middle", "Newton-Schulz middle", "start gather middle"),
        *("wait for reduce-scatter single", "Newton-Schulz single", "start gather single"),
        *("wait for small gradients", "AdamW"),
        *("wait for gather big", "wait for gather middle", "wait for gather single"),
    ]


def test_adamw_runs_while_updates_travel_if_the_mean_is_clipped(monkeypatch):
    events = events_of_a_step(monkeypatch, rank=0, clip="reduced")
    start = events.index("wait for norm") + 1
    assert events[start:] == [
        *("Newton-Schulz big", "start gather big"),
        *("Newton-Schulz middle", "start gather middle"),
        *("Newton-Schulz single", "start gather single"),
        "AdamW",
        *("wait for gather big", "wait for gather middle", "wait for gather single"),
    ]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("clip", ["reduced", "local"])
def test_whatever_is_started_is_waited_for_once(monkeypatch, clip, rank):
    """Also by rank 1, which has no share of the single matrix and computes nothing for it."""
    events = events_of_a_step(monkeypatch, rank=rank, clip=clip)
    assert ("Newton-Schulz single" in events) == (rank == 0)
    started = [event.removeprefix("start ") for event in events if event.startswith("start")]
    waited = [event.removeprefix("wait for ") for event in events if event.startswith("wait")]
    assert sorted(started) == sorted(waited)
    for name in STACKS:
        assert events.index(f"wait for reduce-scatter {name}") < events.index(
            f"start gather {name}"
        )
