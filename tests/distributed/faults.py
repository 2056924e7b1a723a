"""What the ranks of :mod:`test_faults` run: fits in which one of them goes wrong."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from runs import fit, rank_environment

import pgl.fingerprint
from callbacks import DivergenceGuard, RankWatch, RunCheckpoint, WallClockBudget, rank_watch
from pgl.errors import DivergenceError, RankError

Source = tuple[str, str]


class AtStep(Callback):
    """Does something on one rank in the middle of a step."""

    def __init__(self, rank: int, step: int, act: Any) -> None:
        self.rank = rank
        self.step = step
        self.act = act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            self.act()


class BadLossOnOneRank(Callback):
    """Makes the loss of rank 1 infinite in one optimizer step, counted from 1."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_fit_start(self, trainer, pl_module):
        original = pl_module._training_loss

        def loss(*args):
            bad = trainer.global_step + 1 in self.steps and trainer.global_rank == 1
            return original(*args) * (float("inf") if bad else 1.0)

        pl_module._training_loss = loss


class ChangeOneWeight(Callback):
    """Lets rank 1 drift from the others behind the last step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            pl_module.gpt.smear.gate.data[3] += 1e-3


def fail() -> None:
    raise LookupError("no such luck")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(60)


def diverging(folder: Path, source: Source, strategy: str) -> None:
    """Fits with an infinite loss on rank 1 alone, for each action."""

    def keep(name: str, action: str, **more: Any) -> None:
        run = fit(
            folder / name,
            source,
            strategy=strategy,
            divergence=DivergenceGuard(action, snapshot_every_steps=2),
            checkpoint=RunCheckpoint(every_steps=3),
            **{"extra": (BadLossOnOneRank(2, 5),), **more},
        )
        torch.save(run.summary(), folder / f"{name}.{run.trainer.global_rank}.pt")

    for action in ("skip", "roll_back"):
        keep(action, action)
        part = {"budget": WallClockBudget(seconds=None, steps=6, warmup_steps=0)}
        crash = (BadLossOnOneRank(2, 5), AtStep(0, 4, fail), AtStep(1, 4, fail))
        keep(f"{action}_part", action, extra=crash, expected=(LookupError,), **part)
        keep(f"{action}_again", action, ckpt_path=folder / f"{action}_part" / "last.ckpt")
    keep("stop", "stop", expected=(DivergenceError,))


def faulty(folder: Path, source: Source, act: str, times: dict[str, float]) -> None:
    """A fit in which rank 1 dies, fails or hangs; each rank leaves what it ended with."""
    run = fit(
        folder / "run",
        source,
        ranks=RankWatch(**times),
        checkpoint=RunCheckpoint(every_steps=2),
        extra=(AtStep(1, 3, globals()[act]),),
        expected=(RankError, LookupError),
    )
    text = [str(run.error), *getattr(run.error, "__notes__", [])]
    (folder / f"rank{run.trainer.global_rank}.txt").write_text("\n".join(text))
    os._exit(7)


def differing(folder: Path, source: Source, what: str) -> None:
    """Rank 1 has another setting, other data or other code."""
    settings: dict[str, Any] = {}
    if rank_environment["LOCAL_RANK"] == "1":
        if what == "config":
            settings["budget"] = WallClockBudget(seconds=None, steps=7, warmup_steps=0)
        elif what == "data":
            source = (str(folder / "other"), source[1])
        else:
            original = pgl.fingerprint.code_fingerprint
            rank_watch.code_fingerprint = lambda: {**original(), "source": "another"}
    run = fit(folder / "run", source, expected=(RankError,), **settings)
    (folder / f"rank{run.trainer.global_rank}.txt").write_text(str(run.error))


def drifting(folder: Path, source: Source) -> None:
    """Rank 1 changes one weight of its own in the last step."""
    run = fit(folder / "run", source, extra=(ChangeOneWeight(),))
    torch.save(run.summary(), folder / f"drifting.{run.trainer.global_rank}.pt")
