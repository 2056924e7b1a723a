"""Jobs and sums that the processes of a run share, by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

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
    if _world_size() == 1:
        done = work(list(names))
        return {name: done[name] for name in names}
    mine = list(names)[dist.get_rank() :: _world_size()]
    outcome: dict[str, T] | Exception
    try:
        outcome = work(mine)
    except Exception as error:
        outcome = error
    outcomes: list[dict[str, T] | Exception | None] = [None] * _world_size()
    dist.all_gather_object(outcomes, outcome)
    done = {}
    for part in outcomes:
        if isinstance(part, Exception):
            raise part
        assert part is not None
        done.update(part)
    return {name: done[name] for name in names}


def average_over_ranks(tensors: Mapping[str, Tensor]) -> None:
    """Average calibration statistics over all processes in place: each then knows of all tokens.

    PR #703 leaves this out: only rank 0's tokens count there.

    Args:
        tensors: The same names, in the same order, on every process. One that stands under several
            names, as the Hessian of query, key and value does, is averaged once.
    """
    if _world_size() == 1:
        return
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    for tensor in distinct.values():
        dist.all_reduce(tensor)
        tensor /= _world_size()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
