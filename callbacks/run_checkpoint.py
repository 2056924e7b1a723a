"""One file from which the run can go on, always whole, always the newest."""

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from callbacks.find import find_callback, optional_callback
from callbacks.gptq_export import GPTQExport
from callbacks.run_folder import run_folder
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.collectives import on_rank_zero
from pgl.io import check_folder, remove_stale
from pgl.signals import defer_signals, stop_error

FILE_NAME = "last"


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` in the run's folder: at intervals, and when training ends.

    The file is replaced in one step (see :class:`pgl.artifact.GolfCheckpointIO`), so a crash at any
    moment leaves the previous one. It is written once more at the end of training, before weights
    are quantised, so that a crash during export costs no training time.

    After SIGTERM (exit status 143) or Ctrl-C (exit status 1) on any rank the run finishes its
    optimizer step (and the validation before it, if one is under way), saves and ends; a second
    Ctrl-C does not wait. Before the first step and after the last one a signal ends the run at
    once: there is nothing to save that is not in the file.
    Any other error saves nothing, since it may have struck in the middle of a step.

    Note:
        It saves between optimizer steps only, when all ranks agree without asking each other:
        Lightning's ``train_time_interval`` would wait for a broadcast in each micro-batch.

    Example::

        Trainer(callbacks=[WallClockBudget(), RunCheckpoint(every_seconds=60)])

    Args:
        every_steps: Optimizer steps between checkpoints. None: no checkpoints by steps.
        every_seconds: Training seconds between checkpoints, as
            :class:`callbacks.WallClockBudget` counts them. None: no checkpoints by time.

    Raises:
        ValueError: If both intervals are given, or one is not positive.
    """

    def __init__(self, every_steps: int | None = None, every_seconds: float | None = None) -> None:
        if every_steps is not None and every_seconds is not None:
            raise ValueError(
                "checkpoint.every_steps and checkpoint.every_seconds are both set: choose one"
            )
        for name, value in (("every_steps", every_steps), ("every_seconds", every_seconds)):
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.{name} must be positive or null, got {value}")
        super().__init__(
            filename=FILE_NAME,
            every_n_train_steps=every_steps,
            every_n_epochs=0 if every_steps is None else None,
            enable_version_counter=False,
            save_top_k=1,
        )
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self._saved_at_seconds = 0.0
        self._newest: tuple[str, int] | None = None
        self._began = False

    @property
    @override
    def state_key(self) -> str:
        """One key whatever the interval, so that a run may resume with another one."""
        return "RunCheckpoint"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: put the file into the run's folder."""
        self.dirpath = os.fspath(run_folder(trainer))
        with warnings.catch_warnings():
            # The folder is shared with the logger and the artifact on purpose.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before training: refuse a folder without room, remove what killed runs left."""
        super().on_fit_start(trainer, pl_module)
        on_rank_zero(trainer.strategy, lambda: self._prepare_folder(trainer, pl_module))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, whichever folder it lies in."""
        with warnings.catch_warnings():
            # A resumed run has a folder of its own.
            warnings.filterwarnings("ignore", "The dirpath has changed")
            super().load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: from now on signals wait for the end of a step.

        A resumed run may have none left (the budget, which comes before, has looked): what follows
        is export and scoring, where nobody would act on a signal that was only noted.
        """
        super().on_train_start(trainer, pl_module)
        self._saved_at_seconds = find_callback(trainer, WallClockBudget).elapsed
        self._began = True
        if trainer.ckpt_path is not None:
            self._newest = os.fspath(trainer.ckpt_path), trainer.global_step
        defer_signals(trainer, not trainer.should_stop)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: save once a step is complete, if it is time or the last."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        budget = find_callback(trainer, WallClockBudget)
        due = budget.stop_signal or self._due(trainer.global_step, budget.elapsed)
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved_at_seconds = budget.elapsed
            self._newest = os.fspath(self._path()), trainer.global_step
        if budget.stop_signal:
            raise stop_error(budget.stop_signal)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the last step is done: keep it before anything else happens."""
        trainer.save_checkpoint(self._path(), weights_only=False)
        self._newest = os.fspath(self._path()), trainer.global_step
        defer_signals(trainer, False)
        signum = find_callback(trainer, WallClockBudget).agree_on_stop(trainer)
        if signum:
            raise stop_error(signum)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Called when a run fails: add to the error from where it can go on."""
        super().on_exception(trainer, pl_module, exception)
        if self._began and isinstance(exception, Exception):
            exception.add_note(self.where_to_resume())

    def where_to_resume(self) -> str:
        """Return a sentence that names the newest whole checkpoint."""
        if self._newest is None:
            return "No checkpoint was written yet."
        path, step = self._newest
        return f"The last good checkpoint is of step {step:,}: resume with --ckpt_path {path}"

    def _prepare_folder(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(self.dirpath or ".")
        remove_stale(folder)
        exporter = optional_callback(trainer, GPTQExport)
        artifact_bytes = 0 if exporter is None else exporter.limit_bytes or 0
        # The new file is whole before the old one goes.
        needed_bytes = 2 * checkpoint_bytes(trainer, pl_module) + artifact_bytes
        check_folder(folder, needed_bytes, "two checkpoints and the artifact")

    def _path(self) -> Path:
        return Path(self.dirpath or ".") / f"{FILE_NAME}{self.FILE_EXTENSION}"

    def _due(self, step: int, elapsed_seconds: float) -> bool:
        if self.every_steps is not None:
            return step % self.every_steps == 0
        if self.every_seconds is not None:
            return elapsed_seconds - self._saved_at_seconds >= self.every_seconds
        return False


def checkpoint_bytes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Return about how long a checkpoint is: weights twice, optimizer state, averages.

    With several ranks each has a part of Muon's momentum, so that of all of them is estimated from
    the weights.
    """
    weights = sum(p.nbytes for p in pl_module.gpt.parameters())
    values = sum(p.numel() for p in pl_module.gpt.parameters())
    own = sum(t.nbytes for state in trainer.optimizers[0].state.values() for t in state.values())
    optimizer = own if trainer.world_size == 1 else max(own, 2 * weights)
    averaging = optional_callback(trainer, WeightAveraging)
    averages = 0 if averaging is None else 4 * values * len(averaging.configs)
    return 2 * weights + optimizer + averages
