"""Muon for the matrices of a parameter group: stacked by shape, each rank working on its share.

Shapes: K matrices in the stack, R rows, C columns, P places of a rank (P * ranks >= K).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pgl.compiled import compiled_copy
from pgl.optim.momentum import MomentumFormat, make_momentum
from pgl.optim.muon import advance_stacks, apply_update_, shape_scale
from pgl.optim.ranks import Ranks


class MuonBucket:
    """All matrices of a group that have the same shape, type and device.

    A rank keeps the momentum of P consecutive ones and computes their updates; the last ranks may
    have fewer, or none.

    Args:
        parameters: K matrices.
        momentum_format: How momentum is kept.
        ranks: Who shares the work.
    """

    def __init__(
        self, parameters: list[Tensor], momentum_format: MomentumFormat, ranks: Ranks
    ) -> None:
        self.parameters = parameters
        self.ranks = ranks
        self.places = ranks.places(len(parameters))
        self.own = ranks.own(len(parameters))
        self.momentum = make_momentum(momentum_format, len(self.own), parameters[0])
        self._missing: list[int] = []
        self._gradients_PRC: Tensor | None = None
        self._updates_KRC: Tensor | None = None
        self._pending: dist.Work | None = None

    def collect(self) -> None:
        """Stack this rank's share of gradients, which are the same on all ranks."""
        self._note_missing()
        self._gradients_PRC = _stack(self.parameters, self.own)

    def reduce(self, factor: float | Tensor) -> None:
        """Start to sum the ranks' gradients times ``factor``; this rank gets its share."""
        self._note_missing()
        whole = self.parameters[0].new_empty(
            (self.places * self.ranks.count, *self.parameters[0].shape)
        )
        count = len(self.parameters)
        torch.stack(_gradients(self.parameters, range(count)), out=whole[:count])
        whole[count:].zero_()
        self._gradients_PRC, self._pending = self.ranks.reduce_scatter(whole.mul_(factor))

    def gradients(self) -> Tensor:
        """Return this rank's gradients (at most P, R, C), once they are there."""
        self._wait()
        assert self._gradients_PRC is not None, "no gradients were collected"
        return self._gradients_PRC[: len(self.own)]

    def kept_state(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of the momentum that this step must not change, with copies of them."""
        for index in self._missing:
            if index in self.own:
                for view in self.state(index).values():
                    yield view, view.clone()

    def gather(self, share_PRC: Tensor | None) -> None:
        """Start to gather the updates, of which this rank has a share; None for none."""
        # A rank without matrices has not asked for its gradients.
        self._wait()
        self._gradients_PRC = None
        if self.ranks.count == 1:
            self._updates_KRC = share_PRC
            return
        assert share_PRC is not None
        self._updates_KRC, self._pending = self.ranks.all_gather(share_PRC)

    def updates(self) -> Tensor:
        """Return the updates (K, R, C) of all matrices, once they are there."""
        self._wait()
        assert self._updates_KRC is not None, "no updates were gathered"
        O_KRC = self._updates_KRC[: len(self.parameters)].to(self.parameters[0].dtype)
        for index in self._missing:
            O_KRC[index].zero_()
        self._updates_KRC = None
        return O_KRC

    def state(self, index: int) -> dict[str, Tensor]:
        """Return the optimizer state of matrix ``index``, which must be one of this rank's."""
        place = index - self.own.start
        return {name: stack[place] for name, stack in self.momentum.stacks.items()}

    def state_shapes(self) -> dict[str, torch.Size]:
        """Return the names and shapes of one matrix's state, which all ranks know."""
        return {name: stack.shape[1:] for name, stack in self.momentum.stacks.items()}

    def gathered_state(self) -> list[dict[str, Tensor]]:
        """Gather the state of all K matrices on all ranks."""
        count = len(self.parameters)
        whole = {}
        for name, stack in self.momentum.stacks.items():
            share = stack.new_zeros((self.places, *stack.shape[1:]))
            share[: len(self.own)] = stack
            gathered, pending = self.ranks.all_gather(share)
            pending.wait()
            whole[name] = gathered[:count].clone()  # without the padding: it would be saved too
        return [{name: stack[i] for name, stack in whole.items()} for i in range(count)]

    def _note_missing(self) -> None:
        self._missing = [i for i, p in enumerate(self.parameters) if p.grad is None]

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


class MuonGroup:
    """The buckets of one parameter group, biggest first, since the last has the least to hide in.

    Args:
        parameters: Matrices of any shapes.
        momentum_format: How momentum is kept.
        ns_dtype: Type of the Newton-Schulz iteration.
        compile: Compile the arithmetic: as one graph, or one per bucket if ranks share the work.
        ranks: Who shares the work.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        momentum_format: MomentumFormat,
        ns_dtype: torch.dtype,
        compile: bool,
        ranks: Ranks,
    ) -> None:
        self.ns_dtype = ns_dtype
        self.ranks = ranks
        self.buckets = [
            MuonBucket(members, momentum_format, ranks) for members in _by_shape(parameters)
        ]
        self.buckets.sort(key=lambda b: -b.parameters[0].numel() * len(b.parameters))
        # Between the parts of several the updates of the part before travel.
        parts = [self.buckets] if ranks.count == 1 else [[bucket] for bucket in self.buckets]
        self._parts = [
            (part, compiled_copy(advance_stacks) if compile else advance_stacks) for part in parts
        ]
        # As a tensor the momentum is an input of the compiled graph and may change every step.
        self._mu = torch.zeros(()) if compile else None

    def launch(self, settings: dict[str, Any], grad_scale: Tensor | None) -> None:
        """Compute this rank's share of the updates, bucket by bucket, and start to gather them.

        Args:
            settings: The parameter group with the settings of this step.
            grad_scale: 0-d factor of the gradients, or None for 1.
        """
        momentum = settings["momentum"]
        if self._mu is not None:
            momentum = self._mu.fill_(momentum)
        for part, advance in self._parts:
            if not part[0].own:  # a bucket with more ranks than matrices
                like = part[0].parameters[0]
                part[0].gather(like.new_zeros((part[0].places, *like.shape), dtype=self.ns_dtype))
                continue
            kept = [pair for bucket in part for pair in bucket.kept_state()]
            momenta = [bucket.momentum.read() for bucket in part]
            shares = advance(
                momenta,
                [bucket.gradients() for bucket in part],
                grad_scale,
                momentum,
                settings["nesterov"],
                [bucket.places for bucket in part],
                settings["ns_steps"],
                settings["ns_coefficients"],
                self.ns_dtype,
                [self._out_dtype(bucket) for bucket in part],
            )
            for bucket, M_KRC, share_PRC in zip(part, momenta, shares, strict=True):
                bucket.momentum.write(M_KRC)
                bucket.gather(share_PRC)
            for view, copy in kept:
                view.copy_(copy)

    def finish(self, settings: dict[str, Any]) -> None:
        """Wait for the updates and apply them, those of one step size in one go."""
        by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for bucket in self.buckets:
            rows, cols = bucket.parameters[0].shape
            parameters, updates = by_scale.setdefault(shape_scale(rows, cols), ([], []))
            parameters += bucket.parameters
            updates += bucket.updates().unbind()
        for scale, (parameters, updates) in by_scale.items():
            apply_update_(
                parameters,
                updates,
                settings["lr"] * scale,
                settings["lr"] * settings["weight_decay"],
                settings["decay_order"],
            )

    def _out_dtype(self, bucket: MuonBucket) -> torch.dtype:
        # Where nothing travels the cast is part of the graph; what travels has the fewer bytes.
        return bucket.parameters[0].dtype if self.ranks.count == 1 else self.ns_dtype


def _gradients(parameters: list[Tensor], indices: range) -> list[Tensor]:
    members = [parameters[i] for i in indices]
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in members]


def _stack(parameters: list[Tensor], indices: range) -> Tensor:
    if not indices:
        return parameters[0].new_empty((0, *parameters[0].shape))
    return torch.stack(_gradients(parameters, indices))


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Split parameters by shape, type and device; order is kept."""
    parts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        key = (parameter.shape, parameter.dtype, parameter.device)
        parts.setdefault(key, []).append(parameter)
    return list(parts.values())
