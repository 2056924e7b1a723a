"""MLP with a squared (leaky) ReLU, its activation fused into the products, forward and backward.

Plain twin: :class:`pgl.model.mlp.MLP`. The first product writes the activation in its epilogue,
and the backward product multiplies by the activation's derivative in its own; the other four
products are cuBLAS's. The hidden values are not kept: the derivative is twice the activation's
square root, times ``-|slope|`` below zero, and a bit for each value says on which side it was. That
saves a write of N * F numbers, 300 of 700 MB at 98,304 rows of 512 and 1,536 hidden units.

Shapes: N rows, E model dim, F hidden units. A number of the packed signs holds those of columns c,
c + 8, ..., c + 56 of 64 columns: on tensor cores a thread has these in its own registers. The
products of :mod:`pgl.kernels.quack_mlp` take the place of the Triton kernel where the operator's
``quack`` says so, and pack them differently.
"""

from importlib import import_module
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgl.kernels import processors

SIGN_COLUMNS = tl.constexpr(64)
"""Columns whose signs are 8 numbers of 8 bits for each row; F has to be a multiple of it."""

QUACK_SIGN_BLOCK = 64
"""Rows, and columns, whose signs are ``QUACK_SIGN_THREADS`` numbers of 32 bits for quack."""
QUACK_SIGN_THREADS = 128


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _signs_at(signs_ptr, N, n, f, BN: tl.constexpr, GROUPS: tl.constexpr):
    # (BN, GROUPS, 8) places: a group of columns after the other, and in each row by row.
    row = (n + tl.arange(0, BN))[:, None, None]
    group = (f // SIGN_COLUMNS + tl.arange(0, GROUPS))[None, :, None]
    return signs_ptr + (group.to(tl.int64) * N + row) * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def _store_signs(total, signs_ptr, N, n, f):
    BN: tl.constexpr = total.shape[0]
    GROUPS: tl.constexpr = total.shape[1] // SIGN_COLUMNS
    bit = tl.arange(0, 8)[None, None, :, None]
    raw = tl.reshape(total.to(tl.int32, bitcast=True), (BN, GROUPS, 8, 8))
    packed = tl.reduce((raw >> (31 - bit)) & (1 << bit), 2, _or)
    tl.store(_signs_at(signs_ptr, N, n, f, BN, GROUPS), packed.to(tl.uint8))


@triton.jit
def _load_signs(signs_ptr, N, n, f, BN: tl.constexpr, BF: tl.constexpr):
    # True below zero.
    bit = tl.arange(0, 8)[None, None, :, None]
    packed = tl.load(_signs_at(signs_ptr, N, n, f, BN, BF // SIGN_COLUMNS)).to(tl.int32)
    return tl.reshape(packed[:, :, None, :] & (1 << bit), (BN, BF)) != 0


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish(total, below, a_desc, out_desc, n, f, slope,
            LEAKY: tl.constexpr, BACKWARD: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    if PARTS > 1:  # parts of the columns one after the other need less shared memory
        left, right = _halves(total)
        below_left, below_right = _halves(below)
        HALF: tl.constexpr = total.shape[1] // 2
        _finish(left, below_left, a_desc, out_desc, n, f, slope, LEAKY, BACKWARD, PARTS // 2)
        _finish(right, below_right, a_desc, out_desc, n, f + HALF, slope, LEAKY, BACKWARD,
                PARTS // 2)  # fmt: skip
    elif BACKWARD:
        root = tl.sqrt(a_desc.load([n, f]).to(tl.float32))
        root *= tl.where(below, -2.0 * slope, 2.0) if LEAKY else 2.0
        out_desc.store([n, f], (total * root).to(out_desc.dtype))
    else:
        # Of the sum, not of a rounded hidden value: single conversions cost more than the rest.
        leaky = total * tl.where(below, slope, 1.0) if LEAKY else tl.maximum(total, 0.0)
        out_desc.store([n, f], (leaky * leaky).to(out_desc.dtype))


@triton.jit
def _activation_kernel(
    x_desc, w_desc, a_desc, out_desc, signs_ptr, N, F, slope,
    E: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr, LEAKY: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    f_tiles = tl.cdiv(F, BF)
    tiles = tl.cdiv(N, BN) * f_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        n = (tile // f_tiles) * BN
        f = (tile % f_tiles) * BF
        total = tl.zeros((BN, BF), dtype=tl.float32)
        for e in range(0, E, BE):
            x = x_desc.load([n, e])
            w = w_desc.load([e, f]) if BACKWARD else w_desc.load([f, e]).T
            total = tl.dot(x, w, total, input_precision="ieee")
        below = total < 0
        if LEAKY:
            if BACKWARD:
                below = _load_signs(signs_ptr, N, n, f, BN, BF)
            else:
                _store_signs(total, signs_ptr, N, n, f)
        _finish(total, below, a_desc, out_desc, n, f, slope, LEAKY, BACKWARD, PARTS)


class Tiles(NamedTuple):
    """How a product is cut up."""

    n: int
    f: int
    e: int
    parts: int
    """Parts of a tile's columns that are finished one after the other."""
    warps: int
    stages: int
    programs: int
    """Programs per multiprocessor."""


# Within 1 % of the fastest of nine and eleven on an H200 at 98,304 rows of 512 and 1,536 hidden
# units: 295 us with LeakyReLU squared and 264 with ReLU squared (cuBLAS takes 249 for the product
# alone), and 377 and 367 us backward (258).
FORWARD_TILES = Tiles(n=128, f=128, e=64, parts=4, warps=4, stages=3, programs=2)
BACKWARD_TILES = Tiles(n=128, f=128, e=64, parts=4, warps=4, stages=3, programs=2)


def _launch(
    x_NE: Tensor,
    w: Tensor,
    a_NF: Tensor,
    out_NF: Tensor,
    signs: Tensor,
    slope: float,
    backward: bool,
    quack: bool,
) -> None:
    if quack:
        product = import_module("pgl.kernels.quack_mlp")
        product.launch(x_NE, w, a_NF, out_NF, signs, slope, backward)
        return
    tiles = BACKWARD_TILES if backward else FORWARD_TILES
    rows, hidden = out_NF.shape
    assert rows % tiles.n == 0
    assert hidden % tiles.f == 0
    programs = tiles.programs * processors(x_NE.device)
    part = [tiles.n, tiles.f // tiles.parts]
    _activation_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_NE, [tiles.n, tiles.e]),
        TensorDescriptor.from_tensor(w, [tiles.e, tiles.f] if backward else [tiles.f, tiles.e]),
        TensorDescriptor.from_tensor(a_NF, part), TensorDescriptor.from_tensor(out_NF, part),
        signs, rows, hidden, abs(slope),  # which is squared
        E=x_NE.size(1), BN=tiles.n, BF=tiles.f, BE=tiles.e, PARTS=tiles.parts, PROGRAMS=programs,
        LEAKY=slope != 0, BACKWARD=backward, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@torch.library.custom_op("pgl::activated_product_backward", mutates_args=())
def activated_product_backward(
    dy_NE: Tensor, w_EF: Tensor, a_NF: Tensor, signs: Tensor, slope: float, quack: bool
) -> Tensor:
    """Return ``(dy w) * activation'``: the hidden values' gradient through the second product."""
    out_NF = torch.empty_like(a_NF)
    x_NE, w = dy_NE.contiguous(), w_EF.contiguous()
    _launch(x_NE, w, a_NF, out_NF, signs, slope, backward=True, quack=quack)
    return out_NF


@activated_product_backward.register_fake
def _(
    dy_NE: Tensor, w_EF: Tensor, a_NF: Tensor, signs: Tensor, slope: float, quack: bool
) -> Tensor:
    return torch.empty_like(a_NF)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x_NE, fc_FE, proj_EF, ctx.slope, ctx.quack = inputs
    ctx.save_for_backward(x_NE, fc_FE, proj_EF, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


@torch.library.custom_op("pgl::squared_mlp", mutates_args=())
def squared_mlp(
    x_NE: Tensor, fc_FE: Tensor, proj_EF: Tensor, slope: float, quack: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``activation(x fc^T) proj^T``, and for the backward pass the activation and signs.

    Args:
        x_NE: Input rows, of a shape that :func:`pgl.kernels.squared_mlp_fits`.
        fc_FE: Weight of the first product, in the dtype of ``x_NE``.
        proj_EF: Weight of the second.
        slope: Slope of the leaky ReLU below zero; 0 is ReLU squared, which needs no signs.
        quack: Whether to use quack's product instead of the Triton kernel.
    """
    a_NF, signs = _saved(x_NE, fc_FE, slope, quack)
    x, w = x_NE.contiguous(), fc_FE.contiguous()
    _launch(x, w, a_NF, a_NF, signs, slope, backward=False, quack=quack)
    return a_NF @ proj_EF.T, a_NF, signs


@squared_mlp.register_fake
def _(
    x_NE: Tensor, fc_FE: Tensor, proj_EF: Tensor, slope: float, quack: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x_NE.new_empty(x_NE.shape), *_saved(x_NE, fc_FE, slope, quack)


def _saved(x_NE: Tensor, fc_FE: Tensor, slope: float, quack: bool) -> tuple[Tensor, Tensor]:
    rows, hidden = x_NE.size(0), fc_FE.size(0)
    if not slope:
        shape, dtype = (0,), torch.uint8
    elif quack:
        block = QUACK_SIGN_BLOCK
        shape, dtype = (rows // block, hidden // block, QUACK_SIGN_THREADS), torch.int32
    else:
        shape, dtype = (hidden // SIGN_COLUMNS.value, rows, 8), torch.uint8
    return x_NE.new_empty(rows, hidden), x_NE.new_empty(shape, dtype=dtype)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy_NE: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    x_NE, fc_FE, proj_EF, a_NF, signs = ctx.saved_tensors
    dh_NF = activated_product_backward(dy_NE, proj_EF, a_NF, signs, ctx.slope, ctx.quack)
    return dh_NF @ fc_FE, dh_NF.T @ x_NE, dy_NE.T @ a_NF, None, None


squared_mlp.register_autograd(_backward, setup_context=_save)
