"""Two questions to the very model that is scored: does it look ahead, and is it a distribution?

Shapes: S window length, P positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.evaluate.score import TokenLosses

PROBED_POSITIONS = 8


@dataclass(frozen=True)
class Probes:
    """What the probes of :func:`probe` found."""

    changed_from: int
    """First token that was changed."""
    change_before: float
    """Largest change, in nats, of a score before that token; must be 0."""
    change_after: float
    """Largest change of a score from that token on; 0 would mean that the probe tests nothing."""
    probability_error: float
    """Largest distance from 1 of the summed probabilities of all tokens, over 8 positions."""

    @property
    def causal(self) -> bool:
        """Whether no score heard of a later token."""
        return self.change_before <= 1e-4 < self.change_after

    @property
    def normalised(self) -> bool:
        """Whether the probabilities sum to 1."""
        return self.probability_error <= 1e-3


@torch.no_grad()
def probe(gpt: TokenLosses, tokens_S1: Tensor, vocab_size: int) -> Probes:
    """Ask the model, in the state and precision in which it is scored.

    Causality: the second half of a window is replaced, and no score before it may change.
    Normalisation: every token of the vocabulary is scored as the target of the same context.

    Args:
        gpt: The model.
        tokens_S1: A window of the text, S + 1 token ids on the model's device, S at least 2.
        vocab_size: Number of token ids.
    """
    seq_len = len(tokens_S1) - 1
    assert seq_len >= 2, "one target alone has nothing before it"
    first = seq_len // 2 + 1
    other_S1 = tokens_S1.clone()
    other_S1[first:] = (tokens_S1[first:] + vocab_size // 2) % vocab_size
    both_2S1 = torch.stack([tokens_S1, other_S1])
    # Contiguous, as in scoring.
    nats_2S = gpt.token_losses(both_2S1[:, :-1].contiguous(), both_2S1[:, 1:].contiguous())
    # Target i is token i + 1: the scores before token `first` are those of targets < first - 1.
    change_S = (nats_2S[0] - nats_2S[1]).abs()
    context = min(PROBED_POSITIONS, seq_len)
    ids_VP = tokens_S1[:context].repeat(vocab_size, 1)
    targets_VP = torch.arange(vocab_size, device=ids_VP.device)[:, None].expand_as(ids_VP)
    nats_VP = gpt.token_losses(ids_VP, targets_VP.to(ids_VP.dtype).contiguous())
    total_P = nats_VP.double().neg().exp().sum(0)
    return Probes(
        changed_from=first,
        change_before=float(change_S[: first - 1].max()),
        change_after=float(change_S[first - 1 :].max()),
        probability_error=float((total_P - 1).abs().max()),
    )
