"""The MLP's two activated products on quack's GEMM; needs the package quack-kernels.

The same as the Triton kernel of :mod:`pgl.kernels.squared_mlp`, with the same operators around it.
quack's product for Hopper lets one group of warps finish a tile while another multiplies, and
fetches rows for two multiprocessors at once, which Triton cannot say; what is done with a tile is
defined here. Source of the product: https://github.com/Dao-AILab/quack. Measured on an H200 at
98,304 rows of 512 and 1,536 hidden units: 238 us forward and 342 us backward, where Triton takes
271 and 369 in the same process and gives the same bits, and cuBLAS 249 and 253 without activation.

Signs are 32-bit numbers, (rows / 64, F / 64, 128): each of the 128 threads that have 64 x 64 values
packs those of its own 32. So they depend neither on the tile nor on the direction.

Shapes: N rows, E model dim, F hidden units.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Float32, Int32, Uint32, const_expr, cute
from quack.compile_utils import make_fake_tensor
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.ops import EpiOp
from torch import Tensor

from pgl.kernels.squared_mlp import QUACK_SIGN_BLOCK, QUACK_SIGN_THREADS

# quack keeps compiled kernels between processes; of what is defined here it reads the functions
# under @gemm_epilogue only.
SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

TILE_ROWS = 128
PART_COLUMNS = 32
"""Columns of a tile that are finished at a time; a thread has 16 values of them."""


class _Signs(EpiOp):
    """Packed signs in device memory."""

    def config_key(self) -> tuple:
        return (SOURCE,)

    def host_fake_arg(self, key: tuple, fctx: Any) -> Any:
        shape = (cute.sym_int(), cute.sym_int(), QUACK_SIGN_THREADS)
        return make_fake_tensor(key[0], shape, leading_dim=2, divisibility=4)

    def param_fields(self) -> list[tuple]:
        return [(self.name, object, None)]

    def to_params(self, gemm: Any, args: Any) -> dict[str, Any]:
        return {self.name: getattr(args, self.name)}

    def epi_m_major_score(self, arg_tensor: Any, gemm: Any) -> int:
        return -1  # the two halves of a number one after the other

    def places(self, gemm: Any, signs: Any, ctx: Any) -> Any:
        """Return this thread's numbers of this tile: (parts along the rows, numbers)."""
        assert cute.size(ctx.epi_tile[1]) == PART_COLUMNS
        assert gemm.atom_layout_mnk[1] == 1
        row_groups, column_groups = ctx.tile_M // QUACK_SIGN_BLOCK, ctx.tile_N // QUACK_SIGN_BLOCK
        groups_of_part = cute.size(ctx.epi_tile[0]) // QUACK_SIGN_BLOCK
        first = (
            ctx.tile_coord_mnkl[0] * row_groups + ctx.tidx // QUACK_SIGN_THREADS,
            ctx.tile_coord_mnkl[1] * column_groups,
            ctx.tidx % QUACK_SIGN_THREADS,
        )
        layout = cute.make_layout(
            (row_groups // groups_of_part, column_groups),
            stride=(signs.stride[0] * groups_of_part, signs.stride[1]),
        )
        return cute.make_tensor(cute.domain_offset(first, signs).iterator, layout)


class _StoreSigns(_Signs):
    """Takes the sums, and writes their signs."""

    fn_port = "sink"

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> tuple:
        return self.places(gemm, param, ctx), cute.make_rmem_tensor(1, Uint32)

    def begin_loop(self, gemm: Any, state: tuple, epi_coord: tuple) -> tuple:
        return (*state, epi_coord)

    @cute.jit
    def fn_sink_flush(self, gemm: Any, state: tuple, frag: Any) -> None:
        places, packed, part = state
        bits = cute.recast_tensor(frag, Uint32)
        number = Uint32(0) if const_expr(part[1] % 2 == 0) else packed[0]
        for i in cutlass.range_constexpr(cute.size(frag)):
            number = (number << 1) | (bits[i] >> 31)
        packed[0] = number
        if const_expr(part[1] % 2 == 1):
            places[part[0], part[1] // 2] = Int32(number)


class _LoadSigns(_Signs):
    """Gives one factor for each sum above zero, another one below."""

    fn_port = "value"

    def __init__(self, name: str, above: float, below: float) -> None:
        super().__init__(name)
        self.above, self.below = above, below

    def config_key(self) -> tuple:
        return (*super().config_key(), self.above, self.below)

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        places = self.places(gemm, param, ctx)
        numbers = cute.make_rmem_tensor(places.shape, Int32)
        for m in cutlass.range_constexpr(places.shape[0]):
            for n in cutlass.range_constexpr(places.shape[1]):
                numbers[m, n] = places[m, n]
        return numbers

    def begin_loop(self, gemm: Any, state: Any, epi_coord: tuple) -> tuple:
        return (state, epi_coord)

    @cute.jit
    def fn_prepare(self, gemm: Any, state: tuple, paired: bool) -> Any:
        numbers, part = state
        number = Uint32(numbers[part[0], part[1] // 2])
        factors = cute.make_rmem_tensor(PART_COLUMNS // 2, Float32)
        for i in cutlass.range_constexpr(PART_COLUMNS // 2):
            bit = const_expr(31 - 16 * (part[1] % 2) - i)
            below = (number & Uint32(1 << bit)) != Uint32(0)
            factors[i] = cutlass.select_(below, Float32(self.below), Float32(self.above))
        return factors


@cache
def _forward(slope: float) -> EpiMod:
    if slope == 0:

        @gemm_epilogue()
        def relu_squared(acc):
            positive = cute.arch.fmax(acc, Float32(0.0))
            return {"D": positive * positive}

        return relu_squared

    @gemm_epilogue(outs={"signs": _StoreSigns("signs")})
    def leaky_relu_squared(acc):
        leaky = acc * cutlass.select_(acc < 0.0, Float32(slope), Float32(1.0))
        return {"D": leaky * leaky, "signs": acc}

    return leaky_relu_squared


@cache
def _backward(slope: float) -> EpiMod:
    # Times the derivative: 2 sqrt(c) above zero, -2 slope sqrt(c) below, c being the activation.
    if slope == 0:

        @gemm_epilogue()
        def relu_squared(acc, c):
            return {"D": acc * (cute.math.sqrt(c, fastmath=True) * 2.0)}

        return relu_squared

    @gemm_epilogue(ops={"signs": _LoadSigns("signs", above=2.0, below=-2.0 * slope)})
    def leaky_relu_squared(acc, c, signs):
        return {"D": acc * (cute.math.sqrt(c, fastmath=True) * signs)}

    return leaky_relu_squared


def launch(
    x_NE: Tensor,
    w: Tensor,
    a_NF: Tensor,
    out_NF: Tensor,
    signs: Tensor,
    slope: float,
    backward: bool,
) -> None:
    """Multiply into ``out_NF``; see :func:`pgl.kernels.squared_mlp.activated_product_backward`.

    Args:
        x_NE: Rows, in bfloat16.
        w: (F, E) forward, (E, F) backward.
        a_NF: The activation; forward writes it as ``out_NF``.
        out_NF: What is written.
        signs: As above; not read without a slope.
        slope: Slope of the leaky ReLU below zero.
        backward: Whether to multiply by the activation's derivative in place of activating.
    """
    rows, hidden = out_NF.shape
    assert rows % TILE_ROWS == 0
    assert hidden % (2 * QUACK_SIGN_BLOCK) == 0
    product = _backward(abs(slope)) if backward else _forward(abs(slope))  # which is squared
    product.gemm(
        x_NE, w, out_NF, a_NF if backward else None,
        epi_args={"signs": signs} if slope else {},
        # A tile and how many multiprocessors share its rows: the fastest of ten on an H200. Signs
        # of a tile beyond the last row have no place.
        tile_M=TILE_ROWS, tile_N=192 if hidden % 192 == 0 else 128,
        cluster_M=2 if rows % (2 * TILE_ROWS) == 0 else 1, cluster_N=1,
        pingpong=True, b_kn=backward,
    )  # fmt: skip
