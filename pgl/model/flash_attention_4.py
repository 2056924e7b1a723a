"""FlashAttention-4 as an operator that torch.compile can trace; needs the package flash-attn-4.

torch's own switch for it (``torch.nn.attention.activate_flash_attention_impl``, torch 2.11 to 2.13)
expects two results of the package's forward function, where the package (4.0.0b36) gives five.

Source: https://github.com/Dao-AILab/flash-attention, ``flash_attn/cute``. Measured on an H200 at
48 x 2,048 tokens with 8 + 2 * 4 heads of 64: 0.53 ms forward and 1.43 ms backward, where cuDNN
takes 0.51 and 1.64.

Shapes: B batch, T position, H query heads, K key/value heads, D dimension in the head.
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


@torch.library.custom_op("pgl::flash_attention_4", mutates_args=())
def flash_attention_4(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of 16-bit tensors on a Hopper GPU or newer, scaled by ``1 / sqrt(D)``.

    Returns:
        The output (B, T, H, D), and for the backward pass the logarithms of the softmax's sums,
        float32 (B, H, T).
    """
    results = load()._flash_attn_fwd(q_BTHD, k_BTKD, v_BTKD, causal=True, return_lse=True)
    return results[0], results[1]


@flash_attention_4.register_fake
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    dq_BTHD, dk_BTKD, dv_BTKD = _like(q_BTHD, k_BTKD, v_BTKD)
    load()._flash_attn_bwd(
        q_BTHD, k_BTKD, v_BTKD, y_BTHD, dy_BTHD, sums_BHT, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq_BTHD, dk=dk_BTKD, dv=dv_BTKD,
    )  # fmt: skip
    return dq_BTHD, dk_BTKD, dv_BTKD


@flash_attention_4_backward.register_fake
def _(dy_BTHD: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return _like(*inputs[:3])


def _like(*inputs: Tensor) -> tuple[Tensor, ...]:
    # Dense, also where the inputs are views.
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy_BTHD: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return flash_attention_4_backward(dy_BTHD, *ctx.saved_tensors)


flash_attention_4.register_autograd(_backward, setup_context=_save)
