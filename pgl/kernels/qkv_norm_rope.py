"""Queries, keys and values of one product: norm, RoPE and gain in one pass; values stay in place.

Plain twin: ``_queries_and_keys`` of :class:`pgl.model.attention.Attention`.
Arithmetic is float32, whatever the tensors are.
Forward and backward each read and write every number once, but for the values, which forward does
not touch: at 98,304 tokens, 8 + 2 * 4 heads of 64 in bfloat16 0.30 GB forward and 0.55 GB backward,
72 and 132 us at the 4.2 TB/s of an H200.

An item is one head of one row; a program does a block of items of one kind: queries, keys or, in
the backward pass, values. Its tile is (items, D), and a dimension's partner in the rotation is R
before or behind it.

Keys and values go out in G copies, one or more, which take no memory: each has a gradient of its
own, and the backward kernel adds them up. More than one is for an attention kernel that would else
add the gradients of several query heads itself.

Shapes: N rows (tokens of all sequences), T positions of a sequence, H query heads, K key heads and
as many value heads, G copies, D dimension in the head, R half of the rotated dimensions,
C = (H + 2K) * D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgl.kernels import Launch
from pgl.model.norm import EPSILON

# 79 and 144 us on an H200 at 98,304 rows of 8 + 2 * 4 heads, of which 16 of 64 dimensions turn;
# the bytes take 72 and 132. The fastest of twelve when forward still moved the values.
FORWARD = Launch(items=16, warps=4)
BACKWARD = Launch(items=8, warps=1)


@triton.jit
def _items(block, rows, FIRST: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
           D: tl.constexpr, ITEMS: tl.constexpr):  # fmt: skip
    # Row and head of a block's items, where each begins in x and in its kind's tensor, and a mask.
    item = block * ITEMS + tl.arange(0, ITEMS)
    row, head = item // HEADS, item % HEADS
    in_x = row.to(tl.int64) * C + (FIRST + head) * D
    in_kind = item.to(tl.int64) * D
    return row, head, in_x[:, None], in_kind[:, None], (row < rows)[:, None]


@triton.jit
def _load_sum(ptr, mask, D: tl.constexpr, COPIES: tl.constexpr):
    total = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    for copy in tl.static_range(1, COPIES):
        total += tl.load(ptr + copy * D, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _load_rotated(ptr, position, mask, cos_ptr, sin_ptr, D: tl.constexpr, R: tl.constexpr,
                  SIGN: tl.constexpr, COPIES: tl.constexpr = 1):  # fmt: skip
    # (a, b) -> (a cos + b sin, b cos - a sin); the transpose, which goes backward, for SIGN -1.
    d = tl.arange(0, D)[None, :]
    turning = mask & (d < 2 * R)
    partner = tl.where(d < R, d + R, d - R)
    angle = (position * R)[:, None] + d % R
    x = _load_sum(ptr + d, mask, D, COPIES)
    other = _load_sum(ptr + partner, turning, D, COPIES)
    cos = tl.load(cos_ptr + angle, mask=turning, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turning, other=0.0)
    return x * cos + tl.where(d < R, SIGN, -SIGN) * sin * other


@triton.jit
def _gain(gain_ptr, head):
    return 1.0 if gain_ptr is None else tl.load(gain_ptr + head).to(tl.float32)


@triton.jit
def _forward_heads(
    x_ptr, cos_ptr, sin_ptr, gain_ptr, y_ptr, block, rows, T, eps,
    FIRST: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, head, in_x, in_y, mask = _items(block, rows, FIRST, HEADS, C, D, ITEMS)
    d = tl.arange(0, D)[None, :]
    turned = _load_rotated(x_ptr + in_x, row % T, mask, cos_ptr, sin_ptr, D, R, 1.0)
    # A rotation keeps the norm.
    scale = tl.rsqrt(tl.sum(turned * turned, axis=1) / D + eps) * _gain(gain_ptr, head)
    y = turned * scale[:, None]
    tl.store(y_ptr + in_y + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr, cos_ptr, sin_ptr, gain_ptr, q_ptr, k_ptr, rows, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = (H + 2 * K) * D
    block = tl.program_id(0)
    q_blocks = tl.cdiv(rows * H, ITEMS)
    if block < q_blocks:
        _forward_heads(x_ptr, cos_ptr, sin_ptr, gain_ptr, q_ptr, block, rows, T, eps,
                       0, H, C, D, R, ITEMS)  # fmt: skip
    else:
        _forward_heads(x_ptr, cos_ptr, sin_ptr, None, k_ptr, block - q_blocks, rows, T, eps,
                       H, K, C, D, R, ITEMS)  # fmt: skip


@triton.jit
def _backward_heads(
    dy_ptr, x_ptr, cos_ptr, sin_ptr, gain_ptr, dx_ptr, dgain_ptr, block, rows, T, eps,
    FIRST: tl.constexpr, HEADS: tl.constexpr, COPIES: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    row, head, in_x, in_y, mask = _items(block, rows, FIRST, HEADS, C, D, ITEMS)
    d = tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + in_x + d, mask=mask).to(tl.float32)
    turned = _load_rotated(dy_ptr + in_y * COPIES, row % T, mask, cos_ptr, sin_ptr, D, R, -1.0,
                           COPIES)  # fmt: skip
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    normed = x * scale[:, None]
    # A rotation keeps inner products: the gain's gradient needs no rotated value.
    along = tl.sum(turned * normed, axis=1)
    dx = (turned - normed * (along / D)[:, None]) * (scale * _gain(gain_ptr, head))[:, None]
    tl.store(dx_ptr + in_x + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dgain_ptr is not None:
        tl.store(dgain_ptr + row * HEADS + head, along, mask=row < rows)


@triton.jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, x_ptr, cos_ptr, sin_ptr, gain_ptr, dx_ptr, dgain_ptr, rows, T, eps,
    H: tl.constexpr, K: tl.constexpr, KEY_COPIES: tl.constexpr, VALUE_COPIES: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = (H + 2 * K) * D
    block = tl.program_id(0)
    q_blocks = tl.cdiv(rows * H, ITEMS)
    k_blocks = tl.cdiv(rows * K, ITEMS)
    if block < q_blocks:
        _backward_heads(dq_ptr, x_ptr, cos_ptr, sin_ptr, gain_ptr, dx_ptr, dgain_ptr, block,
                        rows, T, eps, 0, H, 1, C, D, R, ITEMS)  # fmt: skip
    elif block < q_blocks + k_blocks:
        _backward_heads(dk_ptr, x_ptr, cos_ptr, sin_ptr, None, dx_ptr, None, block - q_blocks,
                        rows, T, eps, H, K, KEY_COPIES, C, D, R, ITEMS)  # fmt: skip
    else:
        v_block = block - q_blocks - k_blocks
        _, _, in_x, in_v, mask = _items(v_block, rows, H + K, K, C, D, ITEMS)
        d = tl.arange(0, D)[None, :]
        dv = _load_sum(dv_ptr + in_v * VALUE_COPIES + d, mask, D, VALUE_COPIES)
        tl.store(dx_ptr + in_x + d, dv.to(dx_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("pgl::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    x_NC: Tensor, cos_TR: Tensor, sin_TR: Tensor, gain_H: Tensor, key_heads: int
) -> tuple[Tensor, Tensor]:
    """Return the queries and keys of :func:`qkv_norm_rope`."""
    heads, dim = _sizes(x_NC, gain_H, key_heads)
    q_NHD, k_NKD = _outputs(x_NC, gain_H, key_heads)
    _forward_kernel[(sum(_blocks(x_NC.size(0), (heads, key_heads), FORWARD)),)](
        x_NC.contiguous(), cos_TR.contiguous(), sin_TR.contiguous(), gain_H.contiguous(),
        q_NHD, k_NKD, x_NC.size(0), cos_TR.size(0), EPSILON,
        H=heads, K=key_heads, D=dim, R=cos_TR.size(1),
        ITEMS=FORWARD.items, num_warps=FORWARD.warps,
    )  # fmt: skip
    return q_NHD, k_NKD


@torch.library.custom_op("pgl::qkv_norm_rope_backward", mutates_args=())
def qkv_norm_rope_backward(
    dq_NHD: Tensor,
    dk_NKGD: Tensor,
    dv_NKGD: Tensor,
    x_NC: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    gain_H: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x_NC`` (its dtype) and ``gain_H`` (float32)."""
    rows, key_heads = x_NC.size(0), dk_NKGD.size(1)
    heads, dim = _sizes(x_NC, gain_H, key_heads)
    dx_NC = x_NC.new_empty(x_NC.shape)
    dgain_NH = x_NC.new_empty(rows, heads, dtype=torch.float32)
    blocks = _blocks(rows, (heads, key_heads, key_heads), BACKWARD)
    _backward_kernel[(sum(blocks),)](
        dq_NHD.contiguous(), dk_NKGD.contiguous(), dv_NKGD.contiguous(), x_NC.contiguous(),
        cos_TR.contiguous(), sin_TR.contiguous(), gain_H.contiguous(), dx_NC, dgain_NH,
        rows, cos_TR.size(0), EPSILON,
        H=heads, K=key_heads, KEY_COPIES=dk_NKGD.size(2), VALUE_COPIES=dv_NKGD.size(2), D=dim,
        R=cos_TR.size(1), ITEMS=BACKWARD.items, num_warps=BACKWARD.warps,
    )  # fmt: skip
    return dx_NC, dgain_NH.sum(0)


@qk_norm_rope.register_fake
def _(
    x_NC: Tensor, cos_TR: Tensor, sin_TR: Tensor, gain_H: Tensor, key_heads: int
) -> tuple[Tensor, Tensor]:
    return _outputs(x_NC, gain_H, key_heads)


@qkv_norm_rope_backward.register_fake
def _(
    dq_NHD: Tensor,
    dk_NKGD: Tensor,
    dv_NKGD: Tensor,
    x_NC: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    gain_H: Tensor,
) -> tuple[Tensor, Tensor]:
    return x_NC.new_empty(x_NC.shape), gain_H.new_empty(gain_H.shape, dtype=torch.float32)


class _QKVNormRope(torch.autograd.Function):
    # Not the operator's own gradient: an operator may not return a view of what it is given, and
    # slicing the values outside would add a gradient of zeros to that of queries and keys.
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_NC: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        gain_H: Tensor,
        key_heads: int,
        key_copies: int,
        value_copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_NC, cos_TR, sin_TR, gain_H)
        q_NHD, k_NKD = qk_norm_rope(x_NC, cos_TR, sin_TR, gain_H, key_heads)
        dim = k_NKD.size(-1)
        v_NKD = x_NC[:, -key_heads * dim :].unflatten(1, (key_heads, dim))
        return q_NHD, _copies(k_NKD, key_copies), _copies(v_NKD, value_copies)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, dq_NHD: Tensor, dk_NKGD: Tensor, dv_NKGD: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_NC, cos_TR, sin_TR, gain_H = ctx.saved_tensors
        dx_NC, dgain_H = qkv_norm_rope_backward(
            dq_NHD, dk_NKGD, dv_NKGD, x_NC, cos_TR, sin_TR, gain_H
        )
        return dx_NC, None, None, dgain_H.to(gain_H.dtype), None, None, None


def qkv_norm_rope(
    x_NC: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    gain_H: Tensor,
    key_heads: int,
    key_copies: int = 1,
    value_copies: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, rotate and scale the queries and keys of N = sequences * T rows.

    Args:
        x_NC: Query heads, then key heads, then value heads: (N, (H + 2K) * D).
        cos_TR: float32 cosines, (T, R); T divides N, and D is a power of two.
        sin_TR: float32 sines.
        gain_H: Gain of each query head.
        key_heads: K.
        key_copies: Copies of the keys, whose gradients are added up.
        value_copies: Copies of the values.

    Returns:
        Queries (N, H, D), keys and values (N, K, copies, D), in the dtype of ``x_NC``. The values
        are a view of it.
    """
    return _QKVNormRope.apply(x_NC, cos_TR, sin_TR, gain_H, key_heads, key_copies, value_copies)


def _copies(x_NKD: Tensor, copies: int) -> Tensor:
    return x_NKD.unsqueeze(2).expand(-1, -1, copies, -1)


def _sizes(x_NC: Tensor, gain_H: Tensor, key_heads: int) -> tuple[int, int]:
    heads = gain_H.numel()
    return heads, x_NC.size(1) // (heads + 2 * key_heads)


def _outputs(x_NC: Tensor, gain_H: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    heads, dim = _sizes(x_NC, gain_H, key_heads)
    rows = x_NC.size(0)
    return x_NC.new_empty(rows, heads, dim), x_NC.new_empty(rows, key_heads, dim)


def _blocks(rows: int, heads: tuple[int, ...], launch: Launch) -> list[int]:
    return [triton.cdiv(rows * count, launch.items) for count in heads]
