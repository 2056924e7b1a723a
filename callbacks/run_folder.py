"""Where a run keeps its files."""

from pathlib import Path

import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the logger's folder, or the Trainer's root where there is no logger.

    The same on every rank; call it on all of them.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
