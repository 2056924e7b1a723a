"""Residual sum and the RMSNorm that follows it, in one pass each way.

Plain twins: ``x + y`` and ``scale * rms_norm(x + y)``; the mix ``a * x + b * x0`` of
:class:`pgl.model.gpt.Block` and its norm. torch.compile puts the gradients of several layers that
read one stream (the cache, x0) into one kernel, which then spills its registers: one such kernel
took 3.7 ms of a step of 74. One stream of 98,304 tokens of 512 in bfloat16 takes 23.7 us at the
4.24 TB/s of an H200; the sum reads and writes 4 forward and 4 backward, the mix 4 and 6, the mix
with a cache 5 and 8.

Arithmetic is float32, whatever the streams are.

Shapes: N rows, E model dim, P programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgl.kernels import processors
from pgl.model.norm import EPSILON


class Launch(NamedTuple):
    """How rows are given to programs."""

    rows: int
    """Rows of a block."""
    warps: int
    """Warps of a program."""


# On an H200 at 98,304 rows of 512: 102 us (103 with the mix, 124 with a cache), 99 us, and 162 us
# (210 with a cache), the fastest of 6, 6 and 14. Four rows and warps a program took 203 us for the
# last: with 160 registers a thread no more than three of them share a multiprocessor.
FORWARD = Launch(rows=4, warps=4)
SUM_BACKWARD = Launch(rows=4, warps=4)
MIX_BACKWARD = Launch(rows=1, warps=1)
MIX_PROGRAMS = 12
"""Programs per multiprocessor, which walk over the blocks and add up the mix's gradient."""
MIX_STAGES = 3
"""Blocks whose loads are in flight in each of them."""


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inverse_rms(x, eps, E: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, axis=1) / E + eps)[:, None]


@triton.jit
def _norm_gradient(dnormed, x, eps, E: tl.constexpr):
    inverse = _inverse_rms(x, eps, E)
    normed = x * inverse
    return inverse * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / E)[:, None])


@triton.jit
def _forward_kernel(
    x_ptr, source_ptr, y_ptr, mix_ptr, sum_ptr, normed_ptr, rows, scale, eps,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MIX: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (e < E)
    offset = row * E + e
    x = _load(x_ptr, offset, mask)
    y = _load(y_ptr, offset, mask)
    if MIX:
        a = _load(mix_ptr, e, e < E)
        y = _load(mix_ptr, E + e, e < E) * y
        x = a * x
    rounded = (x + y).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offset, rounded, mask=mask)
    if CACHED:
        rounded = (a * _load(source_ptr, offset, mask) + y).to(sum_ptr.dtype.element_ty)
    total = rounded.to(tl.float32)
    normed = scale * total * _inverse_rms(total, eps, E)
    tl.store(normed_ptr + offset, normed.to(rounded.dtype), mask=mask)


@triton.jit
def _sum_backward_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, dx_ptr, rows, scale, eps,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (e < E)
    offset = row * E + e
    dnormed = scale * _load(dnormed_ptr, offset, mask)
    through_norm = _norm_gradient(dnormed, _load(sum_ptr, offset, mask), eps, E)
    dx = _load(dsum_ptr, offset, mask) + through_norm
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mix_backward_kernel(
    dsum_ptr, dnormed_ptr, x_ptr, source_ptr, y_ptr, mix_ptr, dx_ptr, dsource_ptr, dy_ptr, dmix_ptr,
    rows, scale, eps,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    CACHED: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK)[None, :]
    a = _load(mix_ptr, e, e < E)
    b = _load(mix_ptr, E + e, e < E)
    da = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    db = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    blocks = tl.cdiv(rows, ROWS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (e < E)
        offset = row * E + e
        x = _load(x_ptr, offset, mask)
        y = _load(y_ptr, offset, mask)
        d = _load(dsum_ptr, offset, mask)
        normed_of = _load(source_ptr, offset, mask) if CACHED else x
        total = (a * normed_of + b * y).to(dx_ptr.dtype.element_ty).to(tl.float32)
        dnormed = scale * _load(dnormed_ptr, offset, mask)
        through_norm = _norm_gradient(dnormed, total, eps, E)
        if CACHED:
            da += d * x + through_norm * normed_of
            tl.store(dx_ptr + offset, (a * d).to(dx_ptr.dtype.element_ty), mask=mask)
            dsource = a * through_norm
            tl.store(dsource_ptr + offset, dsource.to(dx_ptr.dtype.element_ty), mask=mask)
            d += through_norm
        else:
            d += through_norm
            da += d * x
            tl.store(dx_ptr + offset, (a * d).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dy_ptr + offset, (b * d).to(dy_ptr.dtype.element_ty), mask=mask)
        db += d * y
    partial = tl.program_id(0) * 2 * E + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < E
    tl.store(dmix_ptr + partial, tl.sum(da, axis=0), mask=inside)
    tl.store(dmix_ptr + partial + E, tl.sum(db, axis=0), mask=inside)


def _forward(
    x_NE: Tensor, source_NE: Tensor | None, y_NE: Tensor, mix_2E: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    x_NE, y_NE = x_NE.contiguous(), y_NE.contiguous()
    rows, dim = x_NE.shape
    sum_NE, normed_NE = torch.empty_like(x_NE), torch.empty_like(x_NE)
    _forward_kernel[(triton.cdiv(rows, FORWARD.rows),)](
        x_NE, x_NE if source_NE is None else source_NE.contiguous(), y_NE,
        x_NE if mix_2E is None else mix_2E.contiguous(), sum_NE, normed_NE, rows, scale, EPSILON,
        E=dim, BLOCK=triton.next_power_of_2(dim), ROWS=FORWARD.rows,
        MIX=mix_2E is not None, CACHED=source_NE is not None, num_warps=FORWARD.warps,
    )  # fmt: skip
    return sum_NE, normed_NE


def _fake_forward(x_NE: Tensor) -> tuple[Tensor, Tensor]:
    sum_NE = torch.empty_like(x_NE, memory_format=torch.contiguous_format)
    return sum_NE, torch.empty_like(sum_NE)


@torch.library.custom_op("pgl::residual_norm", mutates_args=())
def residual_norm(x_NE: Tensor, y_NE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``s = x + y`` and ``scale * rms_norm(s)``, each (N, E) in the dtype of ``x``.

    Args:
        x_NE: Stream.
        y_NE: What is added, same dtype.
        scale: Factor behind the norm.
    """
    return _forward(x_NE, None, y_NE, None, scale)


@residual_norm.register_fake
def _(x_NE: Tensor, y_NE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _fake_forward(x_NE)


@torch.library.custom_op("pgl::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    dsum_NE: Tensor, dnormed_NE: Tensor, sum_NE: Tensor, scale: float
) -> Tensor:
    """Return the gradient of the sum, which is that of both its terms."""
    rows, dim = sum_NE.shape
    dx_NE = torch.empty_like(sum_NE)
    _sum_backward_kernel[(triton.cdiv(rows, SUM_BACKWARD.rows),)](
        dsum_NE.contiguous(), dnormed_NE.contiguous(), sum_NE, dx_NE, rows, scale, EPSILON,
        E=dim, BLOCK=triton.next_power_of_2(dim), ROWS=SUM_BACKWARD.rows,
        num_warps=SUM_BACKWARD.warps,
    )  # fmt: skip
    return dx_NE


@residual_norm_backward.register_fake
def _(dsum_NE: Tensor, dnormed_NE: Tensor, sum_NE: Tensor, scale: float) -> Tensor:
    return torch.empty_like(sum_NE)


def _save_sum(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.scale = inputs[2]
    ctx.save_for_backward(output[0])


def _sum_backward(
    ctx: torch.autograd.function.FunctionCtx, dsum_NE: Tensor, dnormed_NE: Tensor
) -> tuple[Tensor | None, ...]:
    dx_NE = residual_norm_backward(dsum_NE, dnormed_NE, *ctx.saved_tensors, ctx.scale)
    return dx_NE, dx_NE, None


residual_norm.register_autograd(_sum_backward, setup_context=_save_sum)


@torch.library.custom_op("pgl::mix_norm", mutates_args=())
def mix_norm(
    x_NE: Tensor, cached_NE: Tensor | None, x0_NE: Tensor, mix_2E: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the mixed stream and what attention reads, each (N, E) in the dtype of ``x``.

    Args:
        x_NE: Stream; ``s = mix[0] * x + mix[1] * x0``.
        cached_NE: Stream that attention reads in its place, mixed likewise; None: ``x``.
        x0_NE: The embedding's stream.
        mix_2E: Gains of stream and embedding per dimension.
        scale: Factor behind the norm.
    """
    return _forward(x_NE, cached_NE, x0_NE, mix_2E, scale)


@mix_norm.register_fake
def _(
    x_NE: Tensor, cached_NE: Tensor | None, x0_NE: Tensor, mix_2E: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _fake_forward(x_NE)


@torch.library.custom_op("pgl::mix_norm_backward", mutates_args=())
def mix_norm_backward(
    dsum_NE: Tensor,
    dnormed_NE: Tensor,
    x_NE: Tensor,
    cached_NE: Tensor | None,
    x0_NE: Tensor,
    mix_2E: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the cache (empty without it), x0 and the mix (float32)."""
    x_NE, x0_NE = x_NE.contiguous(), x0_NE.contiguous()
    rows, dim = x_NE.shape
    cached = cached_NE is not None
    dx_NE, dx0_NE = torch.empty_like(x_NE), torch.empty_like(x_NE)
    dcached_NE = torch.empty_like(x_NE) if cached else x_NE.new_empty(0, dim)
    launch = MIX_BACKWARD
    programs = min(MIX_PROGRAMS * processors(x_NE.device), triton.cdiv(rows, launch.rows))
    dmix_P2E = x_NE.new_empty(programs, 2, dim, dtype=torch.float32)
    _mix_backward_kernel[(programs,)](
        dsum_NE.contiguous(), dnormed_NE.contiguous(), x_NE,
        cached_NE.contiguous() if cached else x_NE, x0_NE, mix_2E.contiguous(),
        dx_NE, dcached_NE, dx0_NE, dmix_P2E, rows, scale, EPSILON,
        E=dim, BLOCK=triton.next_power_of_2(dim), ROWS=launch.rows, STAGES=MIX_STAGES,
        CACHED=cached, num_warps=launch.warps,
    )  # fmt: skip
    return dx_NE, dcached_NE, dx0_NE, dmix_P2E.sum(0)


@mix_norm_backward.register_fake
def _(
    dsum_NE: Tensor,
    dnormed_NE: Tensor,
    x_NE: Tensor,
    cached_NE: Tensor | None,
    x0_NE: Tensor,
    mix_2E: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx_NE, dx0_NE = _fake_forward(x_NE)
    dcached_NE = x_NE.new_empty(0 if cached_NE is None else x_NE.size(0), x_NE.size(1))
    return dx_NE, dcached_NE, dx0_NE, mix_2E.new_empty(mix_2E.shape, dtype=torch.float32)


def _save_mix(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x_NE, cached_NE, x0_NE, mix_2E, ctx.scale = inputs
    ctx.cached = cached_NE is not None
    ctx.save_for_backward(x_NE, x0_NE, mix_2E, *((cached_NE,) if ctx.cached else ()))


def _mix_backward(
    ctx: torch.autograd.function.FunctionCtx, dsum_NE: Tensor, dnormed_NE: Tensor
) -> tuple[Tensor | None, ...]:
    x_NE, x0_NE, mix_2E, *rest = ctx.saved_tensors
    cached_NE = rest[0] if ctx.cached else None
    dx_NE, dcached_NE, dx0_NE, dmix_2E = mix_norm_backward(
        dsum_NE, dnormed_NE, x_NE, cached_NE, x0_NE, mix_2E, ctx.scale
    )
    return dx_NE, dcached_NE if ctx.cached else None, dx0_NE, dmix_2E.to(mix_2E.dtype), None


mix_norm.register_autograd(_mix_backward, setup_context=_save_mix)
