"""One file from which the run can go on, always whole, always the newest."""

import os
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from callbacks.run_folder import run_folder

FILE_NAME = "last"


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` in the run's folder: at intervals, and when training ends.

    The file is replaced in one step (see :class:`pgl.artifact.GolfCheckpointIO`), so a crash at any
    moment leaves the previous one. It is written once more at the end of training, before weights
    are quantised, so that a crash during export costs no training time.

    Example::

        Trainer(callbacks=[RunCheckpoint(every_seconds=60)])

    Args:
        every_steps: Optimizer steps between checkpoints. None: no checkpoints by steps.
        every_seconds: Seconds between checkpoints. None: no checkpoints by time.

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
        interval = None if every_seconds is None else timedelta(seconds=every_seconds)
        super().__init__(
            filename=FILE_NAME,
            every_n_train_steps=every_steps,
            train_time_interval=interval,
            every_n_epochs=0 if every_steps is None and interval is None else None,
            enable_version_counter=False,
            save_top_k=1,
        )

    @property
    @override
    def state_key(self) -> str:
        """One key whatever the interval, so that a run may resume with another one."""
        return "RunCheckpoint"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: put the file into the run's folder."""
        self.dirpath = os.fspath(run_folder(trainer))
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the last step is done: keep it before anything else happens."""
        path = Path(self.dirpath or ".") / f"{FILE_NAME}{self.FILE_EXTENSION}"
        trainer.save_checkpoint(path, weights_only=False)
