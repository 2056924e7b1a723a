"""Find another callback of the same Trainer."""

from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

C = TypeVar("C", bound=Callback)


def find_callback(trainer: pl.Trainer, kind: type[C]) -> C:
    """Return the Trainer's callback of a class.

    Raises:
        ValueError: If there is none.
    """
    callback = optional_callback(trainer, kind)
    if callback is None:
        raise ValueError(f"the Trainer needs the callback {kind.__name__}: add it to its callbacks")
    return callback


def optional_callback(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """Return the Trainer's callback of a class, or None if there is none."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
