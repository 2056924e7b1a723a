"""Find another callback of the same Trainer."""

from itertools import takewhile
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


def require_behind(trainer: pl.Trainer, callback: Callback, kind: type[Callback]) -> None:
    """Refuse a callback that the Trainer calls before one whose results of the step it reads.

    Raises:
        ValueError: If the callback of class ``kind`` comes later among the Trainer's callbacks.
    """
    before = takewhile(lambda other: other is not callback, trainer.callbacks)
    if not any(isinstance(other, kind) for other in before):
        raise ValueError(
            f"the callback {type(callback).__name__} follows the {kind.__name__} of the same step: "
            f"put {kind.__name__} before it in the Trainer's callbacks"
        )


def optional_callback(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """Return the Trainer's callback of a class, or None if there is none."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
