"""One job, divided by name over the processes of a run."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def share_out(names: Sequence[str], work: Callable[[list[str]], dict[str, T]]) -> dict[str, T]:
    """Let each process do its part of ``names`` and give every process all results.

    Args:
        names: What is to be done, the same on every process; process r does every world-size-th
            name from the r-th on.
        work: Does some of the names. Its results are pickled: they belong on the CPU.

    Returns:
        The results of all names, in their order.

    Raises:
        Exception: What ``work`` raised on any process, on every process: none waits for one that
            failed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        done = work(list(names))
        return {name: done[name] for name in names}
    mine = list(names)[dist.get_rank() :: dist.get_world_size()]
    outcome: dict[str, T] | Exception
    try:
        outcome = work(mine)
    except Exception as error:
        outcome = error
    outcomes: list[dict[str, T] | Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    done = {}
    for part in outcomes:
        if isinstance(part, Exception):
            raise part
        assert part is not None
        done.update(part)
    return {name: done[name] for name in names}
