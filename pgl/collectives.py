"""Work that one process does for all."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


def on_rank_zero(strategy: Strategy, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, or raise its error, on every rank.

    Without this the other ranks would wait for ever for a rank 0 that failed.

    Args:
        strategy: The Trainer's strategy.
        work: Called on rank 0 only. Its result is pickled for the others.
    """
    result: T | None = None
    error: Exception | None = None
    if strategy.is_global_zero:
        try:
            result = work()
        except Exception as caught:
            error = caught
    error = strategy.broadcast(error)
    if error is not None:
        raise error
    return strategy.broadcast(result)
