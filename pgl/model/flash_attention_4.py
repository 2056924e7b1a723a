"""FlashAttention-4 as an operator that torch.compile can trace; needs the package flash-attn-4.

torch's own switch for it (``torch.nn.attention.activate_flash_attention_impl``, torch 2.11 to 2.13)
expects two results of the package's forward function, where the package (4.0.0b36) gives five.

Source: https://github.com/Dao-AILab/flash-attention, ``flash_attn/cute``. Measured on an H200 at
48 x 2,048 tokens with 8 + 2 * 4 heads of 64: 0.53 ms forward and 1.43 ms backward, where cuDNN
takes 0.51 and 1.64; and 1.31 ms backward with one call for each query head of a group.

Shapes: B batch, T position, H query heads, K key/value heads, G = H / K query heads that read the
same, D dimension in the head.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def load() -> ModuleType:
    """Return the package's interface.

    Raises:
        ImportError: If flash-attn-4 or something that it needs is not installed.
    """
    return import_module("flash_attn.cute.interface")


LARGEST_SPLIT_GROUP = 2
"""Query heads that read the same keys, up to which copies of keys and values are worth it.

The package adds the gradients of a group in float32, for which 24 bytes a number are cleared, read
and written. G copies need 8 G instead; larger groups were not timed.
"""


@torch.library.custom_op("pgl::flash_attention_4_forward", mutates_args=())
def flash_attention_4_forward(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output and, float32 (B, H, T), the logarithms of the softmax's sums."""
    results = load()._flash_attn_fwd(q_BTHD, k_BTKD, v_BTKD, causal=True, return_lse=True)
    return results[0], results[1]


@flash_attention_4_forward.register_fake
def _(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
    sequences, length, heads, _ = q_BTHD.shape
    sums_BHT = q_BTHD.new_empty(sequences, heads, length, dtype=torch.float32)
    return q_BTHD.new_empty(q_BTHD.shape), sums_BHT


@torch.library.custom_op("pgl::flash_attention_4_backward", mutates_args=())
def flash_attention_4_backward(
    dy_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    y_BTHD: Tensor,
    sums_BHT: Tensor,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients: (B, T, H, D) of queries, (B, T, K, copies, D) of keys and of values.

    Args:
        dy_BTHD: Gradient of the output.
        q_BTHD: Queries.
        k_BTKD: Keys.
        v_BTKD: Values.
        y_BTHD: Output.
        sums_BHT: See :func:`flash_attention_4_forward`.
        copies: 1, or G: then the package is called once for each query head of a group, each time
            with gradients of its own in 16 bits. Else it adds them up in float32 in memory, which
            has to be cleared before and converted afterwards.
    """
    dq_BTHD, dk_BTKGD, dv_BTKGD = _gradients(q_BTHD, k_BTKD, v_BTKD, copies)
    for copy in range(copies):
        q, y, dy, dq = (x[:, :, copy::copies] for x in (q_BTHD, y_BTHD, dy_BTHD, dq_BTHD))
        load()._flash_attn_bwd(
            q, k_BTKD, v_BTKD, y, dy, sums_BHT[:, copy::copies], causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=dq, dk=dk_BTKGD[:, :, :, copy], dv=dv_BTKGD[:, :, :, copy],
        )  # fmt: skip
    return dq_BTHD, dk_BTKGD, dv_BTKGD


@flash_attention_4_backward.register_fake
def _(
    dy_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    y_BTHD: Tensor,
    sums_BHT: Tensor,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q_BTHD, k_BTKD, v_BTKD, copies)


def _gradients(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Dense, also where the inputs are views.
    dk_BTKGD, dv_BTKGD = (x.new_empty(*x.shape[:3], copies, x.size(3)) for x in (k_BTKD, v_BTKD))
    return q_BTHD.new_empty(q_BTHD.shape), dk_BTKGD, dv_BTKGD


class _FlashAttention4(torch.autograd.Function):
    # Not the operator's own gradient, which would have to be shaped as the keys that it reads.
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q_BTHD: Tensor, k_BTKGD: Tensor, v_BTKGD: Tensor
    ) -> Tensor:
        inputs = (q_BTHD, k_BTKGD[:, :, :, 0], v_BTKGD[:, :, :, 0])
        y_BTHD, sums_BHT = flash_attention_4_forward(*inputs)
        ctx.save_for_backward(*inputs, y_BTHD, sums_BHT)
        ctx.copies = k_BTKGD.size(3)
        return y_BTHD

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy_BTHD: Tensor) -> tuple[Tensor, ...]:
        return flash_attention_4_backward(dy_BTHD, *ctx.saved_tensors, ctx.copies)


def flash_attention_4(q_BTHD: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of 16-bit tensors on a Hopper GPU or newer, scaled by ``1 / sqrt(D)``.

    Args:
        q_BTHD: Queries.
        k: Keys (B, T, K, D), or (B, T, K, G, D): G views of the same, one for each query head that
            reads it. Each of these gets a gradient of its own, rounded to 16 bits, for who can add
            them on the way.
        v: Values, likewise; as many copies as of the keys, or one.

    Returns:
        (B, T, H, D).
    """
    copies = max(x.size(3) if x.dim() == 5 else 1 for x in (k, v))
    k_BTKGD, v_BTKGD = (
        x if x.dim() == 5 else x.unsqueeze(3).expand(-1, -1, -1, copies, -1) for x in (k, v)
    )
    return _FlashAttention4.apply(q_BTHD, k_BTKGD, v_BTKGD)
