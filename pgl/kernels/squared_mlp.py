"""MLP with a squared (leaky) ReLU, its activation fused into the products, forward and backward.

Plain twin: :class:`pgl.model.mlp.MLP`. The first product writes the hidden values and their
activation in its epilogue, and the backward product multiplies by the activation's derivative in
its own; the other four products are cuBLAS's.

Shapes: N rows, E model dim, F hidden units.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgl.kernels import processors


@triton.jit
def _finish(total, h_desc, out_desc, n, f, slope, BACKWARD: tl.constexpr):
    if BACKWARD:
        h = h_desc.load([n, f]).to(tl.float32)
        slopes = tl.where(h > 0, 1.0, slope)
        out_desc.store([n, f], (total * (2.0 * h * slopes * slopes)).to(out_desc.dtype))
    else:
        h = total.to(h_desc.dtype)
        h_desc.store([n, f], h)
        leaky = h.to(tl.float32)
        leaky = leaky * tl.where(leaky > 0, 1.0, slope)
        out_desc.store([n, f], (leaky * leaky).to(out_desc.dtype))


@triton.jit
def _activation_kernel(
    x_desc, w_desc, h_desc, out_desc, N, F, slope,
    E: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr,
    PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr,
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
        # In two halves, which need half of the shared memory.
        halves = tl.permute(tl.reshape(total, (BN, 2, BF // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish(left, h_desc, out_desc, n, f, slope, BACKWARD)
        _finish(right, h_desc, out_desc, n, f + BF // 2, slope, BACKWARD)


class Tiles(NamedTuple):
    """How a product is cut up."""

    n: int
    f: int
    e: int
    warps: int
    stages: int
    programs: int
    """Programs per multiprocessor."""


# The fastest of nine on an H200 at 98,304 rows: 320 and 367 us, where cuBLAS and a kernel for the
# activation take 380 and 464.
FORWARD_TILES = Tiles(n=128, f=128, e=64, warps=4, stages=3, programs=2)
BACKWARD_TILES = Tiles(n=128, f=256, e=64, warps=8, stages=3, programs=1)


def _launch(
    x_NE: Tensor, w: Tensor, h_NF: Tensor, out_NF: Tensor, slope: float, backward: bool
) -> None:
    tiles = BACKWARD_TILES if backward else FORWARD_TILES
    rows, hidden = h_NF.shape
    programs = tiles.programs * processors(x_NE.device)
    half_block = [tiles.n, tiles.f // 2]
    _activation_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_NE, [tiles.n, tiles.e]),
        TensorDescriptor.from_tensor(w, [tiles.e, tiles.f] if backward else [tiles.f, tiles.e]),
        TensorDescriptor.from_tensor(h_NF, half_block),
        TensorDescriptor.from_tensor(out_NF, half_block),
        rows, hidden, slope,
        E=x_NE.size(1), BN=tiles.n, BF=tiles.f, BE=tiles.e, PROGRAMS=programs, BACKWARD=backward,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@torch.library.custom_op("pgl::activated_product_backward", mutates_args=())
def activated_product_backward(dy_NE: Tensor, w_EF: Tensor, h_NF: Tensor, slope: float) -> Tensor:
    """Return ``(dy w) * activation'(h)``: the gradient of ``h`` through the second product."""
    out_NF = torch.empty_like(h_NF)
    _launch(dy_NE.contiguous(), w_EF.contiguous(), h_NF, out_NF, slope, backward=True)
    return out_NF


@activated_product_backward.register_fake
def _(dy_NE: Tensor, w_EF: Tensor, h_NF: Tensor, slope: float) -> Tensor:
    return torch.empty_like(h_NF)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x_NE, fc_FE, proj_EF, ctx.slope = inputs
    ctx.save_for_backward(x_NE, fc_FE, proj_EF, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


@torch.library.custom_op("pgl::squared_mlp", mutates_args=())
def squared_mlp(
    x_NE: Tensor, fc_FE: Tensor, proj_EF: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``activation(x fc^T) proj^T``, and for the backward pass the hidden values twice.

    Args:
        x_NE: Input rows, of a shape that :func:`pgl.kernels.squared_mlp_fits`.
        fc_FE: Weight of the first product, in the dtype of ``x_NE``.
        proj_EF: Weight of the second.
        slope: Slope of the leaky ReLU below zero; 0 is ReLU squared.
    """
    h_NF = x_NE.new_empty(x_NE.size(0), fc_FE.size(0))
    a_NF = torch.empty_like(h_NF)
    _launch(x_NE.contiguous(), fc_FE.contiguous(), h_NF, a_NF, slope, backward=False)
    return a_NF @ proj_EF.T, h_NF, a_NF


@squared_mlp.register_fake
def _(x_NE: Tensor, fc_FE: Tensor, proj_EF: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    h_NF = x_NE.new_empty(x_NE.size(0), fc_FE.size(0))
    return x_NE.new_empty(x_NE.shape), h_NF, torch.empty_like(h_NF)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy_NE: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    x_NE, fc_FE, proj_EF, h_NF, a_NF = ctx.saved_tensors
    dh_NF = activated_product_backward(dy_NE, proj_EF, h_NF, ctx.slope)
    return dh_NF @ fc_FE, dh_NF.T @ x_NE, dy_NE.T @ a_NF, None


squared_mlp.register_autograd(_backward, setup_context=_save)
