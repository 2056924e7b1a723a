"""GPTConfig: every architecture technique of the four recipes, one switch each."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from pgl.kernels import squared_mlp_fits

MAX_PARAMETERS = 1 << 27
"""Weights of the largest model, and of the largest artifact that is read: five times what 16 MB
hold at 5 bits."""

MAX_START = 65504.0
"""Largest magnitude of what a weight starts with: artifacts keep it as float16."""

POSITIVE_FIELDS = (
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_hidden",
    "rope_base",
    "rope_train_len",
    "embed_init_std",
    "bigram_dim",
    "value_embedding_dim",
)
STARTS = ("embed_init_std", "qk_gain_init", "backout_lambda_init", "mlp_negative_slope")


@dataclass
class GPTConfig:
    """The architecture of :class:`pgl.model.GPT`.

    The defaults are the stock baseline of the challenge (9 layers, 2x MLP). ``docs/techniques.md``
    has one paragraph on each technique: formula, source, measured effect, cost.

    Raises:
        ValueError: If the settings contradict each other; the message names the rule.
    """

    vocab_size: int = 1024
    """Number of token ids."""

    num_layers: int = 9
    """Number of transformer blocks."""

    model_dim: int = 512
    """Width of the residual stream."""

    num_heads: int = 8
    """Number of query heads."""

    num_kv_heads: int = 4
    """Number of key/value heads (grouped-query attention); divides num_heads."""

    mlp_hidden: int = 1024
    """Hidden width of the MLP; the record recipes use 1536, three times the model's width."""

    mlp_activation: Literal["relu2", "leaky_relu2"] = "relu2"
    """Squared ReLU, or squared leaky ReLU (PR #549, #703)."""

    mlp_negative_slope: float = 0.5
    """Slope below zero of leaky_relu2, before squaring."""

    rope_base: float = 10000.0
    """Base of the rotary frequencies up to rope_train_len."""

    rope_dims: int | None = None
    """Rotated dimensions of each head, the first ones; null rotates the whole head."""

    rope_train_len: int = 1024
    """Reference length in tokens: longer contexts raise rope_base by the NTK-aware rule."""

    qk_norm: bool = True
    """RMS-normalise queries and keys over each head."""

    qk_gain_init: float | None = 1.5
    """Start of the learned gain on each query head, after RoPE; null leaves the gain out."""

    logit_softcap: float = 30.0
    """Logits become cap * tanh(logits / cap); 0 switches the cap off."""

    tie_embeddings: bool = True
    """Use the token embedding as output head; false adds lm_head, which starts at zero."""

    embed_init_std: float = 0.005
    """Standard deviation of the token embedding at the start."""

    embedding_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the three embedding tables; the PRs keep them in bfloat16."""

    init: Literal["default", "orthogonal"] = "default"
    """Start of the matrices: torch.nn.Linear's default, or orthogonal with gain 1 (OrthoInit)."""

    output_proj_init: Literal["zero", "scaled"] = "zero"
    """Start of the attention and MLP output projections: zero, or orthogonal / sqrt(2 layers)."""

    side_proj_gain: Literal["unit", "depth"] = "unit"
    """Gain of bigram.proj and ve_shared.proj: 1 (PR #703), or 1/sqrt(2 layers) (the others)."""

    unet_skips: bool = True
    """Add the first half's outputs to the second half's inputs, mirrored, with learned weights."""

    resid_mix: bool = True
    """Let each block blend the residual stream with the embedding x0, by learned weights."""

    resid_mix_init: Literal["identity", "phase"] = "identity"
    """Start of resid_mix: the stream alone, or x0 giving way to it with depth (PR #324)."""

    smear_gate: bool = False
    """Blend each embedding with its predecessor's through a learned gate per dimension."""

    smear_document_reset: bool = False
    """Do not let smear_gate blend across the start of a document (bos_id)."""

    bigram_buckets: int = 0
    """Rows of the hashed bigram embedding (BigramHash); 0 leaves it out."""

    bigram_dim: int = 128
    """Width of the hashed bigram embedding."""

    value_embedding_layers: list[int] = field(default_factory=list)
    """Layers (from 0) whose values get the shared value embedding; empty leaves it out."""

    value_embedding_dim: int = 128
    """Width of the shared value embedding."""

    value_residual: bool = False
    """Blend each layer's values with the first layer's, by learned weights from 0.5 each."""

    ln_scale: bool = False
    """Multiply the inputs of attention and MLP by 1/sqrt(layer + 1)."""

    xsa_last_layers: int = 0
    """Exclusive self-attention (XSA) on this many last layers."""

    gated_attention: bool = False
    """Multiply each head's output by a learned sigmoid of the attention input."""

    cache_layer: int | None = None
    """Layer (from 0) whose output is kept for cache_attention and backout; null keeps none."""

    cache_attention: bool = True
    """Let all attentions after cache_layer read the kept stream instead of the live one."""

    backout: bool = False
    """Subtract lambda times the kept stream before the final norm; needs cache_layer."""

    backout_lambda_init: float = 0.1
    """Start of backout's learned lambda."""

    document_mask: bool = False
    """Confine attention, smear_gate and the bigram hash to one document, from its bos_id on."""

    bos_id: int = 1
    """Token id that starts a document."""

    attention_backend: Literal["auto", "cudnn", "flash", "math", "fa3", "fa4"] = "auto"
    """Attention kernel: torch's choice, or exactly this one (an error where it cannot run).

    The last block of a sliding evaluation in 16 bits on CUDA has fewer queries than keys, for
    which cuDNN has no causality: there all but math run the flash kernel, or a mask where it
    cannot run.
    """

    kernels: Literal["auto", "off", "quack"] = "auto"
    """Fused Triton kernels in compiled graphs on NVIDIA GPUs (auto), or plain torch everywhere.

    quack: as auto, but the MLP's activated products by the package quack-kernels, on Hopper GPUs in
    bfloat16 (an error where it cannot run).
    """

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_attention()
        self._check_kernels()
        self._check_layers()
        self._check_total()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotated_dims(self) -> int:
        """Dimensions of each head that RoPE rotates."""
        return self.head_dim if self.rope_dims is None else self.rope_dims

    @property
    def num_skips(self) -> int:
        """Number of U-Net skip connections; the first half is the smaller one if layers are odd."""
        return self.num_layers // 2 if self.unet_skips else 0

    @property
    def num_weights(self) -> int:
        """Weights of the model, a tied head not counted twice."""
        return sum(self._weights_by_setting().values())

    def _check_sizes(self) -> None:
        for name in POSITIVE_FIELDS:
            value = getattr(self, name)
            _require(value > 0, f"{name} must be above 0, not {value}")
        for name in STARTS:
            value = getattr(self, name)
            _require(
                value is None or abs(value) <= MAX_START,
                f"{name} must be at most {MAX_START:g} in magnitude, not {value}",
            )
        _require(
            self.logit_softcap >= 0,
            f"logit_softcap must be 0 (off) or above, not {self.logit_softcap}",
        )
        _require(
            self.bigram_buckets == 0 or self.bigram_buckets >= 2,
            f"bigram_buckets must be 0 (off) or at least 2, since the last row is the row start's; "
            f"it is {self.bigram_buckets}",
        )
        _require(
            0 <= self.bos_id < self.vocab_size,
            f"bos_id must be a token id below vocab_size {self.vocab_size}, not {self.bos_id}",
        )

    def _check_total(self) -> None:
        weights = self._weights_by_setting()
        _require(
            self.num_weights <= MAX_PARAMETERS,
            f"{max(weights, key=lambda name: weights[name])} must be lower: the model would have "
            f"{self.num_weights:,} weights, more than {MAX_PARAMETERS:,}",
        )

    def _weights_by_setting(self) -> dict[str, int]:
        dim, heads = self.model_dim, self.num_heads
        block = 2 * dim * (dim + self.kv_dim + self.mlp_hidden + 1 + self.resid_mix)
        block += heads * (self.qk_gain_init is not None) + (dim + 1) * heads * self.gated_attention
        values = self.value_embedding_dim * (self.vocab_size + self.kv_dim) + 1
        return {
            "num_layers, model_dim, mlp_hidden": self.num_layers * block
            + dim * (self.num_skips + self.smear_gate)
            + 2 * (self.num_layers - 1) * self.value_residual
            + self.backout,
            "vocab_size": dim * self.vocab_size * (1 if self.tie_embeddings else 2),
            "bigram_buckets, bigram_dim": self.bigram_dim * (self.bigram_buckets + dim) + 1
            if self.bigram_buckets
            else 0,
            "value_embedding_dim": values + len(self.value_embedding_layers)
            if self.value_embedding_layers
            else 0,
        }

    def _check_attention(self) -> None:
        _require(
            self.model_dim % self.num_heads == 0,
            f"model_dim {self.model_dim} must be a multiple of num_heads {self.num_heads}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(
            self.rotated_dims % 2 == 0 and 4 <= self.rotated_dims <= self.head_dim,
            f"rope_dims must be even, at least 4 and at most the head size {self.head_dim} "
            f"(model_dim / num_heads), not {self.rotated_dims}",
        )
        _require(
            not self.document_mask or self.attention_backend in ("auto", "math"),
            f"document_mask needs attention_backend auto or math, since {self.attention_backend} "
            f"takes no mask",
        )

    def _check_kernels(self) -> None:
        _require(
            self.kernels != "quack"
            or squared_mlp_fits(128, self.model_dim, self.mlp_hidden, torch.bfloat16),
            f"kernels quack needs model_dim to be a multiple of 64 and mlp_hidden of 128, not "
            f"{self.model_dim} and {self.mlp_hidden}; use auto",
        )

    def _check_layers(self) -> None:
        layers = self.value_embedding_layers
        _require(
            len(set(layers)) == len(layers) and all(0 <= i < self.num_layers for i in layers),
            f"value_embedding_layers must be different layers from 0 to {self.num_layers - 1}, "
            f"not {layers}",
        )
        _require(
            0 <= self.xsa_last_layers <= self.num_layers,
            f"xsa_last_layers must be from 0 to num_layers {self.num_layers}, "
            f"not {self.xsa_last_layers}",
        )
        _require(
            self.resid_mix_init == "identity" or self.num_layers >= 2,
            "resid_mix_init phase needs num_layers of at least 2",
        )
        _require(
            self.cache_layer is None or 0 <= self.cache_layer < self.num_layers - 1,
            f"cache_layer must be from 0 to {self.num_layers - 2}, so that a layer follows it, "
            f"not {self.cache_layer}",
        )
        _require(
            self.cache_layer is None or self.cache_attention or self.backout,
            "cache_layer needs cache_attention or backout to use it; set it to null otherwise",
        )
        _require(
            self.cache_layer is not None or not self.backout,
            "backout needs cache_layer, the layer whose output it subtracts",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"model.gpt.{message}")
