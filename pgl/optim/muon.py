"""Muon for matrices of one shape: stacked momentum, one batched Newton-Schulz, sharded over ranks.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); weight decay as in
Liu et al., arXiv 2502.16982.

Shapes: K matrices in the stack, R rows, C columns, N = R * C, B blocks of S int8 codes.
"""

import types
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pgl.optim.int8_momentum import dequantize_blocks, quantize_blocks
from pgl.optim.newton_schulz import zeropower

DecayOrder = Literal["before", "after"]
MomentumFormat = Literal["float32", "bfloat16", "int8"]

# torch 2.13 renames the collective and warns about the old name, which is the only one in 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shape_scale(rows: int, cols: int) -> float:
    """Return sqrt(max(1, rows / cols)), which gives tall matrices the update of a square one."""
    return max(1.0, rows / cols) ** 0.5


def momentum_direction(
    M_KRC: Tensor, G_KRC: Tensor, momentum: float | Tensor, nesterov: bool
) -> Tensor:
    """Update the momentum of a stack in place and return the direction to orthogonalise.

    ``m <- mu m + g``, then ``u = g + mu m`` (Nesterov) or ``u = m``. There is no (1 - mu) factor.

    Args:
        M_KRC: Momentum, changed in place; its type is that of the arithmetic.
        G_KRC: Gradients.
        momentum: mu, a float or a 0-d tensor.
        nesterov: Which direction.

    Returns:
        Direction u (K, R, C) in the type of ``M_KRC``; without Nesterov it is ``M_KRC`` itself.
    """
    G_KRC = G_KRC.to(M_KRC.dtype)
    M_KRC.mul_(momentum).add_(G_KRC)
    if not nesterov:
        return M_KRC
    # In fp32, since CPU kernels round mu itself to bf16 (0.99 -> 0.988) where CUDA's do not.
    return (G_KRC.float() + momentum * M_KRC.float()).to(M_KRC.dtype)


def sharded_update(
    M_KRC: Tensor,
    G_KRC: Tensor,
    grad_scale: Tensor | None,
    momentum: float | Tensor,
    nesterov: bool,
    first: int,
    size: int,
    steps: int,
    coefficients: str,
    dtype: torch.dtype,
) -> Tensor:
    """Advance the momentum of all K matrices, orthogonalise ``size`` of them from ``first`` on.

    Places past the end of the stack are zero matrices, which stay zero.

    Returns:
        Orthogonalised directions (size, R, C) in ``dtype``.
    """
    if grad_scale is not None:
        G_KRC = G_KRC * grad_scale
    U_KRC = momentum_direction(M_KRC, G_KRC, momentum, nesterov)[first : first + size]
    missing = size - U_KRC.size(0)
    if missing:
        U_KRC = F.pad(U_KRC, (0, 0, 0, 0, 0, missing))
    return zeropower(U_KRC, steps, coefficients, dtype)


def apply_update_(
    parameters: list[Tensor],
    O_KRC: Tensor,
    step_size: float,
    decay: float,
    order: DecayOrder,
) -> None:
    """Decay the matrices and step against their updates, in place.

    Args:
        parameters: K matrices (R, C) of one type.
        O_KRC: Their updates.
        step_size: What an update is multiplied by (learning rate times :func:`shape_scale`).
        decay: Part of each weight that goes (learning rate times weight decay).
        order: Decay before the update (PRs #324, #388, #703) or after it (PR #236).
    """
    updates = list(O_KRC.to(parameters[0].dtype).unbind(0))
    if decay and order == "before":
        torch._foreach_mul_(parameters, 1.0 - decay)
    torch._foreach_add_(parameters, updates, alpha=-step_size)
    if decay and order == "after":
        torch._foreach_mul_(parameters, 1.0 - decay)


class FloatMomentum:
    """Momentum of K matrices as one tensor; the state of each parameter is a view of it."""

    def __init__(self, parameters: list[Tensor], dtype: torch.dtype) -> None:
        self.M_KRC = torch.zeros(
            (len(parameters), *parameters[0].shape), dtype=dtype, device=parameters[0].device
        )

    def read(self) -> Tensor:
        """Return the stack (K, R, C) itself: what is written to it is kept."""
        return self.M_KRC

    def write(self, M_KRC: Tensor) -> None:
        """Do nothing: the stack was changed in place."""

    def state(self, index: int) -> dict[str, Tensor]:
        """Return the optimizer state of matrix ``index``."""
        return {"momentum_buffer": self.M_KRC[index]}


class Int8Momentum:
    """Momentum of K matrices as int8 codes and bf16 scales; no block spans two matrices."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.shape = parameters[0].shape
        zeros_KN = torch.zeros(
            (len(parameters), self.shape.numel()),
            dtype=torch.bfloat16,
            device=parameters[0].device,
        )
        self.codes_KBS, self.scale_KB = quantize_blocks(zeros_KN)
        self.scale_KB.zero_()

    def read(self) -> Tensor:
        """Return the dequantised stack (K, R, C) in bfloat16."""
        M_KN = dequantize_blocks(self.codes_KBS, self.scale_KB, self.shape.numel())
        return M_KN.unflatten(-1, self.shape)

    def write(self, M_KRC: Tensor) -> None:
        """Quantise and keep a stack."""
        codes_KBS, scale_KB = quantize_blocks(M_KRC.flatten(1))
        self.codes_KBS.copy_(codes_KBS)
        self.scale_KB.copy_(scale_KB)

    def state(self, index: int) -> dict[str, Tensor]:
        """Return the optimizer state of matrix ``index``."""
        return {
            "momentum_codes": self.codes_KBS[index],
            "momentum_scale": self.scale_KB[index],
        }


class MuonBucket:
    """All matrices of one group that have the same shape, type and device."""

    def __init__(
        self,
        parameters: list[Tensor],
        momentum_format: MomentumFormat,
        ns_dtype: torch.dtype,
        compile: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.parameters = parameters
        self.ns_dtype = ns_dtype
        self.process_group = process_group
        self.momentum: FloatMomentum | Int8Momentum = (
            Int8Momentum(parameters)
            if momentum_format == "int8"
            else FloatMomentum(parameters, getattr(torch, momentum_format))
        )
        self._update = _compiled_copy(sharded_update) if compile else sharded_update
        # As a tensor the momentum is an input of the compiled graph and may change every step.
        self._mu = torch.zeros(()) if compile else None
        self._gathered_KRC: Tensor | None = None
        self._pending: Any = None

    def launch(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        """Compute this rank's share of the updates and start to gather everybody's.

        Args:
            group: The parameter group with the settings of this step.
            grad_scale: 0-d factor of the gradients, or None for 1.
        """
        rank, world_size = _rank_and_world_size(self.process_group)
        size = -(-len(self.parameters) // world_size)
        kept = [self._cloned_state(index) for index in self._without_gradient()]
        M_KRC = self.momentum.read()
        share_KRC = self._update(
            M_KRC,
            self._stacked_gradients(),
            grad_scale,
            group["momentum"] if self._mu is None else self._mu.fill_(group["momentum"]),
            group["nesterov"],
            rank * size,
            size,
            group["ns_steps"],
            group["ns_coefficients"],
            self.ns_dtype,
        )
        self.momentum.write(M_KRC)
        for index, state in zip(self._without_gradient(), kept, strict=True):
            for name, tensor in self.momentum.state(index).items():
                tensor.copy_(state[name])
        if world_size == 1:
            self._gathered_KRC = share_KRC
            return
        share_KRC = share_KRC.contiguous()
        self._gathered_KRC = share_KRC.new_empty((size * world_size, *share_KRC.shape[1:]))
        self._pending = _all_gather(
            self._gathered_KRC, share_KRC, group=self.process_group, async_op=True
        )

    def finish(self, group: dict[str, Any]) -> None:
        """Wait for the updates and apply them."""
        if self._pending is not None:
            self._pending.wait()
        assert self._gathered_KRC is not None, "finish() without launch()"
        O_KRC = self._gathered_KRC[: len(self.parameters)]
        for index in self._without_gradient():
            O_KRC[index].zero_()
        rows, cols = self.parameters[0].shape
        lr = group["lr"]
        apply_update_(
            self.parameters,
            O_KRC,
            lr * shape_scale(rows, cols),
            lr * group["weight_decay"],
            group["decay_order"],
        )
        self._gathered_KRC = self._pending = None

    def _without_gradient(self) -> list[int]:
        return [i for i, parameter in enumerate(self.parameters) if parameter.grad is None]

    def _cloned_state(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.momentum.state(index).items()}

    def _stacked_gradients(self) -> Tensor:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]
        return torch.stack(gradients)


def _rank_and_world_size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _compiled_copy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Dynamo's recompile limit (8) counts per code object and fullgraph makes it an error: with a
    # code object of its own, no bucket can use up the limit of another.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=False, fullgraph=True)
