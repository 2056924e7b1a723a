"""The processes that share the optimizer's work, and the collectives they need."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames two collectives and warns about the old names, which 2.11 has alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a group; a single process needs no group."""

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> "Ranks":
        """Return the ranks of a process group, None for all; one rank if there is no group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def places(self, items: int) -> int:
        """Return how many of ``items`` a rank has place for: the last ranks may have a rest."""
        return -(-items // self.count)

    def own(self, items: int) -> range:
        """Return the items of this rank, consecutive ones; the last ranks may have none."""
        places = self.places(items)
        return range(min(self.rank * places, items), min((self.rank + 1) * places, items))

    def all_gather(self, share: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to gather everybody's share (places, ...).

        Returns:
            A tensor (count * places, ...), in order of rank, and what to wait for before it is
            read.
        """
        share = share.contiguous()
        whole = share.new_empty((self.count * share.size(0), *share.shape[1:]))
        return whole, _all_gather(whole, share, group=self.group, async_op=True)

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, dist.Work]:
        """Start to sum a tensor (count * places, ...) over the ranks.

        Returns:
            This rank's part of the sum (places, ...) and what to wait for before it is read.
        """
        share = whole.new_empty((whole.size(0) // self.count, *whole.shape[1:]))
        return share, _reduce_scatter(share, whole, group=self.group, async_op=True)

    def all_reduce(self, tensor: Tensor) -> dist.Work:
        """Start to replace a tensor by its sum over the ranks."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work
