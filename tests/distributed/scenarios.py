"""What the ranks of :mod:`test_fit_ddp` run, one fit after the other in the same processes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from runs import fit

from callbacks import GPTQExport, RunCheckpoint, TestTimeTraining, WallClockBudget
from pgl.artifact import ArtifactTooLarge
from pgl.phases import PhaseTimer

Source = tuple[str, str]


class Crashed(Exception):
    """What :class:`CrashAfter` raises."""


class CrashAfter(Callback):
    """Fails on all ranks in the first micro-batch after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crashed


class SignalOneRank(Callback):
    """Sends a signal to one rank in the middle of an optimizer step."""

    def __init__(self, rank: int, step: int, signum: int = signal.SIGTERM) -> None:
        self.rank = rank
        self.step = step
        self.signum = signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if trainer.global_step == self.step and first and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)


class OtherClock(Callback):
    """Gives ranks other than 0 a clock that runs a thousand times as fast."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank > 0:
            trainer.callbacks[0].phases = PhaseTimer(lambda: 1000 * time.monotonic())


CRASHING = {"checkpoint": RunCheckpoint(every_steps=3), "extra": (CrashAfter(3),)}
"""Leaves a checkpoint from the middle of training, which Lightning restarts unlike one of its end.
"""


def ddp(folder: Path, source: Source, part_of_one: Path) -> None:
    """Everything that two ranks do; rank r leaves ``name.r.pt`` for each fit."""

    def keep(name: str, **settings: Any) -> None:
        run = fit(folder / name, source, **settings)
        torch.save(run.summary(), folder / f"{name}.{run.trainer.global_rank}.pt")

    keep("whole")
    keep("part", expected=(Crashed,), **CRASHING)
    keep("resumed_from_one", ckpt_path=part_of_one)
    keep("signalled", expected=(SIGTERMException,), extra=(SignalOneRank(rank=1, step=2),))
    keep("after_signal", ckpt_path=folder / "signalled" / "last.ckpt")
    keep("too_large", expected=(ArtifactTooLarge,), artifact=GPTQExport(limit_bytes=1000))
    keep(
        "seconds",
        budget=WallClockBudget(seconds=0.4, warmup_steps=1),
        checkpoint=RunCheckpoint(every_seconds=0.1),
        extra=(OtherClock(),),
    )


def one_fit(folder: Path, source: Source, settings: dict[str, Any]) -> None:
    """One fit on however many ranks."""
    run = fit(folder / "whole", source, **settings)
    torch.save(run.summary(), folder / f"whole.{run.trainer.global_rank}.pt")


def adapted(folder: Path, source: Source, artifact: Path, ttt: TestTimeTraining) -> None:
    """One fit that ends with test-time training, and test-time training on an artifact."""
    budget = WallClockBudget(seconds=None, steps=1, warmup_steps=0)
    run = fit(folder / "adapted", source, ttt=ttt, budget=budget)
    found = run.summary()
    (found["validated"],) = run.trainer.validate(
        run.module, datamodule=run.data, ckpt_path=artifact, verbose=False
    )
    found["evidence"] = ttt.report()
    torch.save(found, folder / f"adapted.{run.trainer.global_rank}.pt")


def parallel_muon(folder: Path, source: Source, settings: dict[str, Any]) -> None:
    """Everything that ranks do under Parallel Muon."""

    def keep(name: str, **more: Any) -> None:
        run = fit(folder / name, source, strategy="parallel_muon", **settings, **more)
        torch.save(run.summary(), folder / f"{name}.{run.trainer.global_rank}.pt")

    keep("whole", budget=WallClockBudget(seconds=None, steps=6, warmup_steps=2))
    keep("part", expected=(Crashed,), **CRASHING)
    keep("resumed", ckpt_path=folder / "part" / "last.ckpt")
    keep("signalled", expected=(SIGTERMException,), extra=(SignalOneRank(rank=1, step=2),))
    keep("after_signal", ckpt_path=folder / "signalled" / "last.ckpt")
