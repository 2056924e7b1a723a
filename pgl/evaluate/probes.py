"""Two questions to the very model that is scored: does it look ahead, and is it a distribution?

Shapes: B rows of a batch, S window length, P positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.evaluate.score import Losses, TokenLosses, token_losses

PROBED_POSITIONS = 8
UNHEARD_NATS = 1e-4


@dataclass(frozen=True)
class Change:
    """How scores changed when the model read other tokens from one position on.

    The targets stayed what they were, so that a model which reads its own target is caught.
    """

    first: int
    """First position that read another token."""
    before: float
    """Largest change, in nats, of a score before that position; must be 0."""
    after: float
    """Largest change of a score from that position on; 0 would mean that nothing was tested."""

    @property
    def causal(self) -> bool:
        """Whether no score heard of a token after its position."""
        return self.before <= UNHEARD_NATS < self.after


@dataclass(frozen=True)
class Probes:
    """What the probes of :func:`probe` found."""

    window: Change
    """All scores of a window, by the model as it is."""
    scored: Change | None
    """The last scores of a window, computed as a batch of windows is; None if that was not asked.
    """
    probability_error: float
    """Largest distance from 1 of the summed probabilities of all tokens, over 8 positions, by the
    model as it is."""

    @property
    def causal(self) -> bool:
        """Whether no score heard of a token after its position."""
        return self.window.causal and (self.scored is None or self.scored.causal)

    @property
    def normalised(self) -> bool:
        """Whether the probabilities sum to 1."""
        return self.probability_error <= 1e-3


@torch.no_grad()
def probe(
    gpt: TokenLosses,
    tokens_S1: Tensor,
    vocab_size: int,
    *,
    losses: Losses = token_losses,
    last: int | None = None,
    batch_windows: int = 2,
) -> Probes:
    """Ask the model, in the state and precision in which it is scored.

    Causality: the model reads other tokens from the middle of a window on, with the targets of
    before, and no score before them may change. Where ``last`` is given it is asked once more of
    ``losses``, from the middle of the last positions on, in batches of the shape that is scored: a
    compiled ``losses`` then runs the graph that it scored with.
    Normalisation: every token of the vocabulary is scored as the target of the same context.

    Args:
        gpt: The model.
        tokens_S1: A window of the text, S + 1 token ids on the model's device, S at least 2.
        vocab_size: Number of token ids.
        losses: How batches are scored, see :func:`pgl.evaluate.score_batch`.
        last: Trailing positions that are scored of each window of a batch, at least 2; None: leave
            out the second question.
        batch_windows: Windows of a batch.
    """
    seq_len = len(tokens_S1) - 1
    assert seq_len >= 2, "one target alone has nothing before it"
    return Probes(
        window=_change(gpt, tokens_S1, vocab_size, token_losses, seq_len, None, 2),
        scored=None
        if last is None
        else _change(gpt, tokens_S1, vocab_size, losses, last, last, batch_windows),
        probability_error=_probability_error(gpt, tokens_S1, vocab_size),
    )


def _change(
    gpt: TokenLosses,
    tokens_S1: Tensor,
    vocab_size: int,
    losses: Losses,
    positions: int,
    last: int | None,
    batch_windows: int,
) -> Change:
    """Replace what is read from the middle of the last ``positions`` on."""
    assert positions >= 2, "one score alone has nothing before it"
    seq_len = len(tokens_S1) - 1
    first_scored = seq_len - positions
    first = first_scored + positions // 2
    read_S, targets_S = tokens_S1[:-1], tokens_S1[1:]
    other_S = read_S.clone()
    other_S[first:] = (read_S[first:] + vocab_size // 2) % vocab_size
    # One batch of both, filled up with the first; or two batches where they hold one row.
    rows_RS = torch.stack([read_S, other_S])
    if batch_windows > 2:
        rows_RS = torch.cat([rows_RS, read_S.expand(batch_windows - 2, seq_len)])
    targets_BS = targets_S.repeat(batch_windows, 1)
    nats_RP = torch.cat(
        [losses(gpt, ids_BS, targets_BS, last) for ids_BS in rows_RS.split(batch_windows)]
    )
    change_P = (nats_RP[0] - nats_RP[1]).abs()
    return Change(
        first=first,
        before=float(change_P[: first - first_scored].max()),
        after=float(change_P[first - first_scored :].max()),
    )


def _probability_error(gpt: TokenLosses, tokens_S1: Tensor, vocab_size: int) -> float:
    context = min(PROBED_POSITIONS, len(tokens_S1) - 1)
    ids_VP = tokens_S1[:context].repeat(vocab_size, 1)
    targets_VP = torch.arange(vocab_size, device=ids_VP.device)[:, None].expand_as(ids_VP)
    nats_VP = gpt.token_losses(ids_VP, targets_VP.to(ids_VP.dtype).contiguous())
    total_P = nats_VP.double().neg().exp().sum(0)
    return float((total_P - 1).abs().max())
