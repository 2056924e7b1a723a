"""Causal self-attention with grouped queries, and what the recipes add to it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl import kernels
from pgl.model.backends import attention_kernel
from pgl.model.config import GPTConfig
from pgl.model.flash_attention_4 import LARGEST_SPLIT_GROUP, flash_attention_4
from pgl.model.linear import CastedLinear
from pgl.model.norm import rms_norm
from pgl.model.rotary import apply_rotary

# Shape suffixes: B batch, T position, E model dim, C all key/value heads together, H query head,
# K key/value head, G query head within the group of one key/value head, D dimension in the head,
# R half of the rotated dimensions, S query positions where they are the last of the T.


def attend(
    q_BTHD: Tensor,
    k: Tensor,
    v: Tensor,
    mask_B1TT: Tensor | None = None,
    backend: str = "auto",
    flash_last: bool = False,
) -> Tensor:
    """Causal attention with scale 1/sqrt(D); query head h reads key/value head h // (H / K).

    Args:
        q_BTHD: Queries; fewer than keys are those of the last positions.
        k: Keys (B, T, K, D), and for fa4 also copies of them, see
            :func:`pgl.model.flash_attention_4.flash_attention_4`.
        v: Values, likewise.
        mask_B1TT: True where position t may read position s; has to be causal. None means all
            earlier positions and itself.
        backend: Kernel to use, see ``GPTConfig.attention_backend``.
        flash_last: Whether the flash kernel may run for fewer queries than keys, see
            :func:`pgl.model.backends.flash_reads_last`.

    Returns:
        Shaped as the queries, (B, T, H, D). Heads are moved by strides, never copied.
    """
    if backend == "fa4":
        assert mask_B1TT is None  # see GPTConfig
        if q_BTHD.size(1) == k.size(1):
            return flash_attention_4(q_BTHD, k, v)
    q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k, v))
    if mask_B1TT is None and q_BHTD.size(2) < k_BKTD.size(2):
        # SDPA's is_causal lets the first query read the first key only.
        if flash_last and q_BHTD.dtype in (torch.bfloat16, torch.float16):
            return _flash_lower_right(q_BHTD, k_BKTD, v_BKTD).transpose(1, 2)
        mask_B1TT = lower_right_mask(q_BHTD.size(2), k_BKTD.size(2), q_BHTD.device)
        if backend != "math":
            backend = "auto"  # the flash kernels take no mask
    grouped = q_BHTD.size(1) != k_BKTD.size(1)
    if grouped and mask_B1TT is not None:
        # CUDA's fused kernels take either a mask or grouped heads.
        group_size = q_BHTD.size(1) // k_BKTD.size(1)
        k_BKTD = k_BKTD.repeat_interleave(group_size, dim=1)
        v_BKTD = v_BKTD.repeat_interleave(group_size, dim=1)
        grouped = False
    with attention_kernel(backend):
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD,
            k_BKTD,
            v_BKTD,
            attn_mask=mask_B1TT,
            is_causal=mask_B1TT is None,
            enable_gqa=grouped,
        )
    return y_BHTD.transpose(1, 2)


def lower_right_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Causal mask of the last ``queries`` of ``keys`` positions: bool, (1, 1, S, T)."""
    mask_ST = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask_ST[None, None]


def _flash_lower_right(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    # This operator's causality is aligned at the bottom right, and it takes grouped heads, but it
    # checks nothing: torch.nn.attention.bias.causal_lower_right asks first and pads the heads.
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q_BHSD, k_BKTD, v_BKTD, 0.0, True)[0]


def exclusive_attention(y_BTHD: Tensor, v_BTKD: Tensor) -> Tensor:
    """XSA: take from each head's output its component along the position's own value vector.

    ``y_h - (y_h . u) u`` with ``u = v / max(|v|, 1e-12)`` of the head's key/value group,
    in float32. Source: PR #549 and #703, on the last 4 layers; measured -0.0047 bits per byte
    together with EMA, for about 2 ms a step on 8 H100.
    """
    y_BTKGD = y_BTHD.float().unflatten(2, (v_BTKD.size(2), -1))
    u_BTK1D = F.normalize(v_BTKD.float(), dim=-1).unsqueeze(3)
    along_BTKG1 = (y_BTKGD * u_BTK1D).sum(dim=-1, keepdim=True)
    return (y_BTKGD - along_BTKG1 * u_BTK1D).flatten(2, 3).to(y_BTHD.dtype)


def document_mask(starts_BT: Tensor) -> Tensor:
    """Causal mask within documents, (B, 1, T, T): true where t may read s <= t of its own document.

    Args:
        starts_BT: True at the first token of each document. Tokens before the first start of a row
            belong to a document that began earlier.
    """
    document_BT = starts_BT.cumsum(dim=1)
    same_BTT = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
    return same_BTT.tril().unsqueeze(1)


class HeadGate(nn.Module):
    """Gate per head, ``sigmoid(W x + b)`` of the attention input: starts nearly open (b = 4).

    Source: switched off in PR #388, #549 and #703; not measured there.
    """

    def __init__(self, model_dim: int, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, model_dim))
        self.bias = nn.Parameter(torch.full((num_heads,), 4.0))

    def forward(self, x_BTE: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, H, 1)."""
        logits_BTH = F.linear(x_BTE, self.weight.to(x_BTE.dtype), self.bias.to(x_BTE.dtype))
        return torch.sigmoid(logits_BTH).unsqueeze(-1)


class Attention(nn.Module):
    """Self-attention of one layer: QK norm, RoPE, a gain per query head, then :func:`attend`.

    Args:
        config: The model's configuration.
        layer: Index of the layer, from 0: decides XSA and the value residual.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.backend = config.attention_backend
        self.kernels = self.flash_last = False  # see GPT.prepare
        self.exclusive = layer >= config.num_layers - config.xsa_last_layers
        group_size = config.num_heads // config.num_kv_heads
        splits = config.attention_backend == "fa4" and group_size <= LARGEST_SPLIT_GROUP
        self.copies = group_size if splits else 1
        self.values_go_on = self.exclusive or config.value_residual  # elsewhere than to attend
        self.c_q = CastedLinear(config.model_dim, config.model_dim)
        self.c_k = CastedLinear(config.model_dim, config.kv_dim)
        self.c_v = CastedLinear(config.model_dim, config.kv_dim)
        self.proj = CastedLinear(config.model_dim, config.model_dim)
        self.q_gain = self.value_mix = self.gate = None
        if config.qk_gain_init is not None:
            self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.value_residual and layer > 0:
            self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        if config.gated_attention:
            self.gate = HeadGate(config.model_dim, config.num_heads)

    def forward(
        self,
        x_BTE: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TT: Tensor | None = None,
        value_embedding_BTC: Tensor | None = None,
        first_v_BTKD: Tensor | None = None,
        last: int | None = None,
        out_gain_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x_BTE: Normalised input.
            rotary: Cosines and sines, each (T, R).
            mask_B1TT: See :func:`attend`.
            value_embedding_BTC: What the shared value embedding adds to the values.
            first_v_BTKD: The first layer's values, for the value residual.
            last: Queries and output of this many last positions only.
            out_gain_E: Gain of the output per dimension.

        Returns:
            The output (B, last or T, E) and this layer's values (B, T, K, D).
        """
        if self._uses_kernels(last) and self.qk_norm and self.q_gain is not None:
            values_go_on = self.values_go_on or value_embedding_BTC is not None
            q_BTHD, k, v = self._fused(x_BTE, rotary, 1 if values_go_on else self.copies)
        else:
            q_BTHD, k = self._queries_and_keys(x_BTE, rotary, last)
            v = self.c_v(x_BTE).unflatten(-1, (-1, self.head_dim))
        copied = v.dim() == 5
        v_BTKD = v[:, :, :, 0] if copied else v
        if value_embedding_BTC is not None:
            v_BTKD = v_BTKD + value_embedding_BTC.view_as(v_BTKD)
        if self.value_mix is not None:
            mix_2 = self.value_mix.to(v_BTKD.dtype)
            v_BTKD = mix_2[0] * first_v_BTKD + mix_2[1] * v_BTKD
        v_read_BTKD = v_BTKD
        if last is not None:
            v_read_BTKD = v_BTKD[:, -last:]
            mask_B1TT = None if mask_B1TT is None else mask_B1TT[:, :, -last:]

        v = v if copied else v_BTKD
        y_BTHD = attend(q_BTHD, k, v, mask_B1TT, self.backend, self.flash_last)
        if self.exclusive and self._uses_kernels(last):
            rows = (x.flatten(0, 1) for x in (y_BTHD, v_BTKD))
            y_BTHD = torch.ops.pgl.exclusive_attention(*rows).view_as(y_BTHD)
        elif self.exclusive:
            y_BTHD = exclusive_attention(y_BTHD, v_read_BTKD)
        if self.gate is not None:
            y_BTHD = self.gate(x_BTE[:, -y_BTHD.size(1) :]) * y_BTHD
        return self.proj(y_BTHD.flatten(2), out_gain_E), v_BTKD

    def _queries_and_keys(
        self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor], last: int | None
    ) -> tuple[Tensor, Tensor]:
        k_BTKD = self.c_k(x_BTE).unflatten(-1, (-1, self.head_dim))
        q_rotary = rotary
        if last is not None:
            x_BTE = x_BTE[:, -last:]
            q_rotary = tuple(table_TR[-last:] for table_TR in rotary)
        q_BTHD = self.c_q(x_BTE).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q_BTHD, k_BTKD = rms_norm(q_BTHD), rms_norm(k_BTKD)
        q_BTHD, k_BTKD = apply_rotary(q_BTHD, *q_rotary), apply_rotary(k_BTKD, *rotary)
        if self.q_gain is not None:
            q_BTHD = q_BTHD * self.q_gain.to(q_BTHD.dtype).unsqueeze(-1)
        return q_BTHD, k_BTKD

    def _uses_kernels(self, last: int | None) -> bool:
        power_of_two = self.head_dim & (self.head_dim - 1) == 0
        return self.kernels and last is None and power_of_two and torch.compiler.is_compiling()

    def _fused(
        self, x_BTE: Tensor, rotary: tuple[Tensor, Tensor], value_copies: int
    ) -> tuple[Tensor, ...]:
        # One product for queries, keys and values, and one pass over what it yields, by a module
        # that GPT.prepare has loaded. Keys and values in one copy have no dimension for copies.
        layers = (self.c_q, self.c_k, self.c_v)
        weights = [layer.compute_weight(x_BTE.dtype) for layer in layers]
        qkv_NC = F.linear(x_BTE, torch.cat(weights)).flatten(0, 1)
        kv_heads = self.c_k.out_features // self.head_dim
        q_NHD, k_NKGD, v_NKGD = kernels.qkv_norm_rope.qkv_norm_rope(
            qkv_NC, *rotary, self.q_gain, kv_heads, self.copies, value_copies
        )
        k, v = (x.squeeze(2) if x.size(2) == 1 else x for x in (k_NKGD, v_NKGD))
        return tuple(x.unflatten(0, x_BTE.shape[:2]) for x in (q_NHD, k, v))
