"""A progress bar that shows the budget instead of an endless epoch, and each phase after it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.training_metrics import TrainingMetrics
from callbacks.wall_clock_budget import WallClockBudget

Advance = Callable[..., None]


class BudgetProgress(ProgressBar):
    """Shows the share of the budget used, the time left, the step and the last logged loss.

    In a terminal it draws live bars; elsewhere (a log file, CI) it prints a line now and then. It
    reads nothing from the device: the loss is the one :class:`callbacks.TrainingMetrics` logged.

    Example::

        Trainer(callbacks=[WallClockBudget(), TrainingMetrics(), BudgetProgress()])

    Args:
        line_every_seconds: Seconds between lines where the output is not a terminal.
    """

    def __init__(self, line_every_seconds: float = 10.0) -> None:
        super().__init__()
        if line_every_seconds < 0:
            raise ValueError(
                f"progress.line_every_seconds must not be negative, got {line_every_seconds}"
            )
        self.line_every_seconds = line_every_seconds
        self._enabled = True
        self._console = Console()
        self._live: Progress | None = None
        self._last_line = 0.0
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, float] = {}

    @override
    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    @override
    def disable(self) -> None:
        """Show nothing, as on ranks other than 0."""
        self._enabled = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins."""
        self._begin("train", 1.0)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: show where the budget stands after each step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        budget = find_callback(trainer, WallClockBudget)
        text = f"step {trainer.global_step}"
        if budget.training_seconds is not None:
            text += f"  {max(budget.training_seconds - budget.elapsed, 0):.0f} s left"
        loss = find_callback(trainer, TrainingMetrics).last_loss
        if loss is not None:
            text += f"  loss {loss:.4f}"
        self._show("train", completed=budget.fraction, text=text)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends."""
        self._end("train")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins."""
        self._begin("validate", float(sum(trainer.num_val_batches)))

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each batch of windows."""
        bpb = pl_module.bpb_so_far
        text = "" if math.isnan(bpb) else f"{bpb:.4f} bits/byte"
        self._show("validate", completed=batch_idx + 1, text=text)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation ends."""
        self._end("validate")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run ends, in whatever way."""
        self._tasks.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_lines(self, text: str) -> None:
        """Print text without tearing the bars."""
        if self._enabled:
            # Lines of a file or a pipe have no width: a table stays as it is.
            whole = not self._console.is_terminal
            self._console.print(text, markup=False, highlight=False, soft_wrap=whole)

    @contextmanager
    def track(self, description: str, total: float) -> Iterator[Advance]:
        """Show a phase of ``total`` units; yields ``advance(count=1, text="")``."""
        self._begin(description, total)
        done = 0.0

        def advance(count: float = 1, text: str = "") -> None:
            nonlocal done
            done += count
            self._show(description, completed=done, text=text)

        try:
            yield advance
        finally:
            self._end(description)

    def _begin(self, description: str, total: float) -> None:
        if not self._enabled:
            return
        self._totals[description] = max(total, 1e-9)
        if not self._console.is_terminal:
            self.print_lines(f"{description} ...")
            self._last_line = time.monotonic()
            return
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                transient=False,
            )
            self._live.start()
        self._tasks[description] = self._live.add_task(description, total=total, text="")

    def _show(self, description: str, completed: float, text: str = "") -> None:
        if not self._enabled:
            return
        if description in self._tasks:
            assert self._live is not None
            self._live.update(self._tasks[description], completed=completed, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= self.line_every_seconds:
            self._last_line = now
            share = min(completed / self._totals[description], 1.0)
            self.print_lines(f"{description:<12} {share:4.0%}  {text}".rstrip())

    def _end(self, description: str) -> None:
        task = self._tasks.pop(description, None)
        if task is not None and self._live is not None:
            self._live.stop_task(task)
            if not self._tasks:
                self._live.stop()
                self._live = None


def print_lines(trainer: pl.Trainer, text: str) -> None:
    """Print text once, on rank 0, without tearing the Trainer's progress bar."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, BudgetProgress):
        bar.print_lines(text)
    elif trainer.is_global_zero:
        print(text)


@contextmanager
def track(trainer: pl.Trainer, description: str, total: float) -> Iterator[Advance]:
    """Show a phase on the Trainer's progress bar, or nowhere if it has none of ours."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, BudgetProgress):
        with bar.track(description, total) as advance:
            yield advance
    else:
        yield lambda count=1, text="": None
