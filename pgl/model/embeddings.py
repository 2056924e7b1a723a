"""What feeds the residual stream and the values besides the token embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl.model.config import GPTConfig
from pgl.model.linear import CastedLinear

# Shape suffixes: B batch, T position, E model dim, C all key/value heads together.

HASH_TOKEN = 36313
HASH_PREVIOUS = 27191


def document_starts(ids_BT: Tensor, bos_id: int) -> Tensor:
    """True where a document starts, that is at each ``bos_id``: (B, T)."""
    return ids_BT == bos_id


def bigram_bucket(ids_BT: Tensor, num_buckets: int, starts_BT: Tensor | None = None) -> Tensor:
    """Row of the bigram table for each token and its predecessor: int64, (B, T).

    ``((36313 id_t) XOR (27191 id_{t-1})) mod (num_buckets - 1)``. The last row of the table is kept
    for positions without predecessor: the first of each row, and each true entry of ``starts_BT``.
    """
    ids_BT = ids_BT.long()
    mixed_BT = (HASH_TOKEN * ids_BT) ^ (HASH_PREVIOUS * ids_BT.roll(1, dims=1))
    bucket_BT = mixed_BT % (num_buckets - 1)
    first_T = torch.arange(ids_BT.size(1), device=ids_BT.device) == 0
    no_predecessor = first_T if starts_BT is None else first_T | starts_BT
    return bucket_BT.masked_fill(no_predecessor, num_buckets - 1)


class BigramHash(nn.Module):
    """Hashed embedding of token pairs, added to the token embedding.

    ``scale * proj(embed[bucket])`` with the bucket of :func:`bigram_bucket`.
    Source: PR #236 (2048 rows), #324 (10240), #388 (2048), #703 (1536). Measured: 2048 to 3072 rows
    gave -0.0009 bits per byte. It starts at zero through its table; ``proj`` does not, or nothing
    would ever get a gradient.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_buckets = config.bigram_buckets
        self.embed = nn.Embedding(config.bigram_buckets, config.bigram_dim)
        self.proj = CastedLinear(config.bigram_dim, config.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids_BT: Tensor, dtype: torch.dtype, starts_BT: Tensor | None) -> Tensor:
        """(B, T) token ids -> (B, T, E) in ``dtype``; no pair reaches across ``starts_BT``."""
        bucket_BT = bigram_bucket(ids_BT, self.num_buckets, starts_BT)
        return self.scale.to(dtype) * self.proj(self.embed(bucket_BT).to(dtype))


class SmearGate(nn.Module):
    """Blend each position with the one before: ``(1 - g) x_t + g x_{t-1}``, g = sigmoid(gate).

    The gate has one entry per dimension and starts at 0, an even blend. Before the first position
    stands a zero. Source: PR #236 and all later ones.
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))

    def forward(self, x_BTE: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E). Where ``starts_BT`` is true the predecessor counts as zero."""
        gate_E = torch.sigmoid(self.gate).to(x_BTE.dtype)
        previous_BTE = F.pad(x_BTE[:, :-1], (0, 0, 1, 0))
        if starts_BT is not None:
            previous_BTE = previous_BTE.masked_fill(starts_BT.unsqueeze(-1), 0.0)
        return (1 - gate_E) * x_BTE + gate_E * previous_BTE


class SharedValueEmbedding(nn.Module):
    """Token embedding for the values, shared by some layers: ``scale * proj(embed[ids])``.

    Each layer adds it to its values, times a learned scalar of its own. Source: PR #388 ("VE128",
    on layers 9 and 10); its effect was never measured alone. 163,843 parameters at the full size.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.value_embedding_dim)
        self.proj = CastedLinear(config.value_embedding_dim, config.kv_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) token ids -> (B, T, C) in ``dtype``."""
        return self.scale.to(dtype) * self.proj(self.embed(ids_BT).to(dtype))
