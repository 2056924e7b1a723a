"""What the ranks of :mod:`test_budget_ddp` run."""

from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from runs import fit

from callbacks import (
    EMAConfig,
    QuantizationAwareTraining,
    SlidingWindowBPB,
    WallClockBudget,
    WeightAveraging,
)


class Watch(Callback):
    """Counts the exchanges on the budget's channel, and keeps what validation logged."""

    def __init__(self) -> None:
        self.exchanges: list[tuple[int, int]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer, pl_module):
        self._all_reduce = dist.all_reduce
        control_group = trainer.callbacks[0]._control_group

        def watched(tensor, *args, **kwargs):
            if kwargs.get("group") is control_group:
                self.exchanges.append((trainer.global_step, tensor.numel()))
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = watched

    def on_validation_end(self, trainer, pl_module):
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        dist.all_reduce = self._all_reduce


def budget(folder: Path, source: tuple[str, str]) -> None:
    """Six steps of a recipe of 3,000, with every part that follows the budget."""
    watch, qat = Watch(), QuantizationAwareTraining("late", 0.5)
    run = fit(
        folder / "run",
        source,
        budget=WallClockBudget(seconds=None, steps=6, warmup_steps=1, step_scale=6 / 3000),
        qat=qat,
        averaging=WeightAveraging(EMAConfig(horizon_fraction=0.3), score=True),
        validation=SlidingWindowBPB(stride_tokens=32, every_n_steps=1000),
        extra=(watch,),
    )
    summary = run.summary()
    result = {
        "digest": summary["digest"],
        "exchanges": watch.exchanges,
        "logged": watch.logged,
        "switched_at": qat.first_step,
        "broadcasts": summary["broadcasts"],
    }
    torch.save(result, folder / f"{run.trainer.global_rank}.pt")
