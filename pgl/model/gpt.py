"""GPT: the whole model, top to bottom.

    token + bigram embedding -> norm -> smear gate -> x0
    blocks, the second half fed by the first through U-Net skips
    backout -> norm -> head -> softcap

Each technique is a function or module of its own in this package and a switch in GPTConfig.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl import kernels
from pgl.model.attention import Attention, document_mask
from pgl.model.backends import flash_reads_last, prepare_backend, prepare_quack
from pgl.model.config import GPTConfig
from pgl.model.embeddings import BigramHash, SharedValueEmbedding, SmearGate, document_starts
from pgl.model.init import initialize
from pgl.model.linear import CastedLinear
from pgl.model.loss import token_cross_entropy
from pgl.model.mlp import MLP
from pgl.model.norm import rms_norm
from pgl.model.rotary import rotary_table

# Shape suffixes: B batch, T position, V vocabulary, E model dim, S last positions, C all key/value
# heads together, K key/value head, D dimension in the head.


class Block(nn.Module):
    """Attention and MLP, each normalised before and scaled after, on a stream mixed with x0.

    Args:
        config: The model's configuration.
        layer: Index of the layer, from 0.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        # LN scale (PR #388): damps later layers; the MLP's square makes it 1/(layer + 1).
        self.ln_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.kernels = False  # see GPT.prepare
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = None
        if config.resid_mix:
            self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(
        self,
        x_BTE: Tensor,
        x0_BTE: Tensor,
        cached_BTE: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask_B1TT: Tensor | None,
        value_embedding_BTC: Tensor | None,
        first_v_BTKD: Tensor | None,
        last: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the new stream (B, last or T, E) and the attention's values (B, T, K, D).

        With ``cached_BTE`` (Cache, PR #703) queries, keys and values are read from the cached
        stream; the residual sum and the MLP stay with the live one. With ``last`` only that many
        last positions go on: they read the keys and values of all. The other arguments are those
        of :meth:`Attention.forward`.
        """
        x_BTE, h_BTE = self._mix_norm(x_BTE, cached_BTE, x0_BTE)
        attn_BTE, v_BTKD = self.attn(
            h_BTE,
            rotary,
            mask_B1TT,
            value_embedding_BTC,
            first_v_BTKD,
            last,
            self.attn_scale,
        )
        if last is not None:
            x_BTE = x_BTE[:, -last:]
        x_BTE, h_BTE = self._add_norm(x_BTE, attn_BTE)
        return x_BTE + self.mlp(h_BTE, self.mlp_scale), v_BTKD

    def _mix_norm(
        self, x_BTE: Tensor, cached_BTE: Tensor | None, x0_BTE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the stream mixed with x0, and what attention reads: of it or of the cache."""
        if self.resid_mix is None:
            return x_BTE, self._norm(x_BTE if cached_BTE is None else cached_BTE)
        if self._uses_kernels():
            rows = [None if x is None else x.flatten(0, 1) for x in (x_BTE, cached_BTE, x0_BTE)]
            pair = torch.ops.pgl.mix_norm(*rows, self.resid_mix, self.ln_scale)
            return tuple(stream_NE.view_as(x_BTE) for stream_NE in pair)
        mix_2E = self.resid_mix.to(x_BTE.dtype)
        shared_BTE = mix_2E[1] * x0_BTE
        x_BTE = mix_2E[0] * x_BTE + shared_BTE
        if cached_BTE is None:
            return x_BTE, self._norm(x_BTE)
        return x_BTE, self._norm(mix_2E[0] * cached_BTE + shared_BTE)

    def _add_norm(self, x_BTE: Tensor, y_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x + y``, and its norm."""
        if self._uses_kernels():
            x_NE, y_NE = x_BTE.flatten(0, 1), y_BTE.flatten(0, 1)
            pair = torch.ops.pgl.residual_norm(x_NE, y_NE, self.ln_scale)
            return tuple(stream_NE.view_as(x_BTE) for stream_NE in pair)
        x_BTE = x_BTE + y_BTE
        return x_BTE, self._norm(x_BTE)

    def _norm(self, x_BTE: Tensor) -> Tensor:
        return self.ln_scale * rms_norm(x_BTE)

    def _uses_kernels(self) -> bool:
        return self.kernels and torch.compiler.is_compiling()


class GPT(nn.Module):
    """The language model of the four recipes; ``config`` says which techniques are in.

    Parameters are float32, the embedding tables optionally bfloat16 (``embedding_dtype``). The
    residual stream has the autocast dtype where autocast is on, else the dtype of the control
    vectors (gains and scales). Softcap and cross-entropy are float32 always.

    Example::

        gpt = GPT(GPTConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2))
        loss = gpt.token_losses(ids_BT, targets_BT).mean()
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.tok_emb = nn.Embedding(config.vocab_size, dim)
        self.bigram = BigramHash(config) if config.bigram_buckets else None
        self.smear = SmearGate(dim) if config.smear_gate else None
        self.ve_shared = SharedValueEmbedding(config) if config.value_embedding_layers else None
        self.ve_layer_scales = nn.ParameterList(
            nn.Parameter(torch.ones(1)) for _ in config.value_embedding_layers
        )
        self.skip_weights = self.backout_lambda = self.lm_head = None
        if config.num_skips:
            self.skip_weights = nn.Parameter(torch.ones(config.num_skips, dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.tensor(config.backout_lambda_init))
        if not config.tie_embeddings:
            self.lm_head = CastedLinear(dim, config.vocab_size)
        self._prepared_for: torch.device | None = None
        initialize(self)
        self._store_embeddings(getattr(torch, config.embedding_dtype))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the softcapped logits of the next token at each position.

        Args:
            ids_BT: Token ids, int32 or int64.

        Returns:
            float32, (B, T, V).
        """
        return self.logits(self.features(ids_BT))

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, last: int | None = None) -> Tensor:
        """Return the cross-entropy of each target in nats.

        Args:
            ids_BT: Token ids, int32 or int64.
            targets_BT: The token that follows each position.
            last: Score only this many last positions; the last block's queries, output and MLP, the
                head and the loss are computed for them alone. The scores are those of the whole
                computation up to rounding.

        Returns:
            float32, (B, last or T).

        Raises:
            ValueError: If ``last`` is not from 1 to T.
        """
        length = ids_BT.size(1)
        if last is not None and not 1 <= last <= length:
            raise ValueError(f"last must be from 1 to the sequence length {length}, not {last}")
        logits_BSV = self.logits(self.features(ids_BT, last))
        targets_BS = targets_BT if last is None else targets_BT[:, -last:]
        return token_cross_entropy(logits_BSV, targets_BS).view_as(targets_BS)

    def features(self, ids_BT: Tensor, last: int | None = None) -> Tensor:
        """Return what the head reads: the normalised last stream, (B, last or T, E)."""
        config = self.config
        if not torch.compiler.is_compiling():
            self.prepare(ids_BT.device)
        starts_BT = document_starts(ids_BT, config.bos_id)
        mask_B1TT = document_mask(starts_BT) if config.document_mask else None
        rotary = rotary_table(
            ids_BT.size(1),
            config.rope_base,
            config.rotated_dims,
            config.rope_train_len,
            ids_BT.device,
        )
        x_BTE = x0_BTE = self._embed(ids_BT, starts_BT)
        value_embeddings = self._value_embeddings(ids_BT, x_BTE.dtype)

        skips: list[Tensor] = []
        cached_BTE = first_v_BTKD = None
        for layer, block in enumerate(self.blocks):
            if layer >= config.num_layers // 2 and skips:
                skip_E = self.skip_weights[config.num_skips - len(skips)].to(x_BTE.dtype)
                x_BTE = x_BTE + skip_E * skips.pop()
            x_BTE, v_BTKD = block(
                x_BTE,
                x0_BTE,
                cached_BTE if config.cache_attention else None,
                rotary,
                mask_B1TT,
                value_embeddings.get(layer),
                first_v_BTKD,
                last if layer == config.num_layers - 1 else None,
            )
            if layer < config.num_skips:
                skips.append(x_BTE)
            if layer == config.cache_layer:
                cached_BTE = x_BTE
            if layer == 0:
                first_v_BTKD = v_BTKD
        if self.backout_lambda is not None:
            if last is not None:
                cached_BTE = cached_BTE[:, -last:]
            x_BTE = x_BTE - self.backout_lambda.to(x_BTE.dtype) * cached_BTE
        return rms_norm(x_BTE)

    def logits(self, h_BTE: Tensor) -> Tensor:
        """Head and softcap: features (B, T, E) -> float32 logits (B, T, V)."""
        head_VE = self.tok_emb.weight if self.lm_head is None else self.lm_head.weight
        logits_BTV = F.linear(h_BTE, head_VE.to(h_BTE.dtype)).float()
        return softcap(logits_BTV, self.config.logit_softcap)

    def prepare(self, device: torch.device) -> None:
        """Choose the kernels for ``device``; call it before compiling.

        Checks, and for fa3 activates, ``attention_backend``, and lets the blocks use the
        Triton kernels of :mod:`pgl.kernels` where they can run. Without torch.compile each forward
        pass calls it.

        Raises:
            ValueError: If the attention backend or quack cannot run on ``device``.
        """
        prepare_backend(self.config.attention_backend, device)
        if device == self._prepared_for:
            return
        if self.config.kernels == "quack":
            prepare_quack(device)
        on = self.config.kernels != "off" and kernels.available(device)
        if on:
            kernels.load()
        backend, head_dim = self.config.attention_backend, self.config.head_dim
        flash_last = flash_reads_last(backend, head_dim, device)
        for block in self.blocks:
            block.kernels = block.attn.kernels = on
            block.attn.flash_last = flash_last
            block.mlp.kernels = on and kernels.squared_mlp_available(device)
        self._prepared_for = device

    def _embed(self, ids_BT: Tensor, starts_BT: Tensor) -> Tensor:
        config = self.config
        dtype = self._compute_dtype()
        x_BTE = self.tok_emb(ids_BT).to(dtype)
        if self.bigram is not None:
            x_BTE = x_BTE + self.bigram(ids_BT, dtype, starts_BT if config.document_mask else None)
        x_BTE = rms_norm(x_BTE)
        if self.smear is not None:
            reset = config.document_mask or config.smear_document_reset
            x_BTE = self.smear(x_BTE, starts_BT if reset else None)
        return x_BTE

    def _value_embeddings(self, ids_BT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        if self.ve_shared is None:
            return {}
        shared_BTC = self.ve_shared(ids_BT, dtype)
        return {
            layer: scale.to(dtype) * shared_BTC
            for layer, scale in zip(
                self.config.value_embedding_layers, self.ve_layer_scales, strict=True
            )
        }

    def _compute_dtype(self) -> torch.dtype:
        control = self.blocks[0].attn_scale
        if torch.is_autocast_enabled(control.device.type):
            return torch.get_autocast_dtype(control.device.type)
        return control.dtype

    def _store_embeddings(self, dtype: torch.dtype) -> None:
        self.tok_emb.to(dtype)
        if self.bigram is not None:
            self.bigram.embed.to(dtype)
        if self.ve_shared is not None:
            self.ve_shared.embed.to(dtype)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Bound logits smoothly to (-cap, cap): ``cap * tanh(logits / cap)``; ``cap`` 0 leaves them."""
    return cap * torch.tanh(logits / cap) if cap else logits
