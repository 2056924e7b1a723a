"""Work that one process does for all."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch.strategies import Strategy

A = TypeVar("A")  # a step's argument
R = TypeVar("R")  # and its result
T = TypeVar("T")


def led_by_rank_zero(
    strategy: Strategy, step: Callable[[A], R], lead: Callable[[Callable[[A], R]], T]
) -> T | None:
    """Let rank 0 decide what all ranks do together: what with, how often, and when to stop.

    Ranks that decide each for itself, from floats of its own, may come to differ and then wait for
    one another for ever.

    Args:
        strategy: The Trainer's strategy.
        step: Work of all ranks; its argument is pickled for the others.
        lead: Runs on rank 0 only, with a function that runs ``step`` on every rank.

    Returns:
        What ``lead`` returned, on rank 0; None on the others.

    Raises:
        Exception: What ``lead`` raised, on every rank; or what ``step`` raised on one, there.
    """
    if strategy.is_global_zero:

        def step_of_all(argument: A) -> R:
            strategy.broadcast((True, argument))
            return step(argument)

        result, error = None, None
        try:
            result = lead(step_of_all)
        except Exception as caught:
            error = caught
        strategy.broadcast((False, error))
        if error is not None:
            raise error
        return result
    failure: Exception | None = None
    while True:
        going, argument = strategy.broadcast((False, None))
        if not going:
            failure = failure or argument
            if failure is not None:
                raise failure
            return None
        try:
            step(argument)
        except Exception as caught:  # rank 0 has yet to say that it stops
            failure = caught


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
