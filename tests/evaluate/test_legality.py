"""The challenge's conditions on evaluation, as properties: see docs/legality.md."""

import numpy as np
import pytest
import torch

from pgl.evaluate import (
    BitsPerByte,
    TTTConfig,
    WindowLoader,
    evaluate_windows,
    score_batch,
    score_first_ttt,
    token_losses,
    train_on_all,
)

SEQ_LEN, STRIDE, NUM_TOKENS = 16, 5, 120


class RecordingMetric(BitsPerByte):
    """Keeps every score that is counted, in order."""

    def __init__(self, table) -> None:
        super().__init__(table)
        self.recorded = []

    def update(self, nats, previous_ids, target_ids, mask=None) -> None:
        assert not torch.is_grad_enabled()
        super().update(nats, previous_ids, target_ids, mask)
        self.recorded.append((nats[mask], target_ids[mask]))

    def nats_of_targets(self, tokens: np.ndarray) -> np.ndarray:
        """Nats by target; the windows go forward, so the order of scoring is that of the text."""
        nats, targets = (torch.cat(parts).numpy() for parts in zip(*self.recorded, strict=True))
        np.testing.assert_array_equal(targets, tokens[1:], "each target once, from left to right")
        return nats


def of_targets(tokens: np.ndarray):
    """Scores windows of any text as if these were its targets: only what is read may differ."""
    tokens_N = torch.from_numpy(tokens.astype(np.int32))

    def score(gpt, batch):
        index_BS = batch.start_B[:, None] + 1 + torch.arange(SEQ_LEN)
        targets_BS = tokens_N[index_BS.clamp(max=len(tokens) - 1)]
        return score_batch(
            gpt, batch, lambda gpt, ids, _, last: token_losses(gpt, ids, targets_BS, last)
        )

    return score


def sliding_scores(gpt, table, tokens, targets=None) -> np.ndarray:
    metric = RecordingMetric(table)
    loader = WindowLoader(tokens, seq_len=SEQ_LEN, stride=STRIDE, batch_windows=4)
    evaluate_windows(gpt, loader, metric, score=of_targets(tokens if targets is None else targets))
    return metric.nats_of_targets(tokens)


def ttt_scores(gpt, table, tokens, targets=None, on_chunk=None) -> np.ndarray:
    metric = RecordingMetric(table)
    score_first_ttt(
        gpt,
        tokens,
        metric,
        TTTConfig(chunk_tokens=32, lr=0.05, epochs=2, batch_seqs=1),
        seq_len=SEQ_LEN,
        stride=STRIDE,
        batch_windows=4,
        on_chunk=on_chunk,
        score=of_targets(tokens if targets is None else targets),
    )
    return metric.nats_of_targets(tokens)


def perturbed(tokens: np.ndarray, first: int) -> np.ndarray:
    """Other tokens from ``first`` on."""
    changed = tokens.copy()
    changed[first:] = (tokens[first:] + 7) % 28 + 4
    assert (changed[first:] != tokens[first:]).all()
    return changed


def assert_same_before(after: np.ndarray, before: np.ndarray, first: int) -> None:
    # Target i is scored by what reads tokens up to i, and is token i + 1: a model that reads one
    # token too many knows of the change when it scores target first - 1.
    np.testing.assert_allclose(after[:first], before[:first], rtol=0, atol=1e-6)
    assert (np.abs(after[first:] - before[first:]) > 1e-3).any()


@pytest.mark.parametrize("first", [1, 2, 15, 16, 17, 40, 77, 118])
@pytest.mark.parametrize("document_mask", [False, True])
def test_no_score_depends_on_a_later_token(make_gpt, small_table, stream, first, document_mask):
    gpt, tokens = make_gpt(document_mask=document_mask), stream(NUM_TOKENS)

    before = sliding_scores(gpt, small_table, tokens)
    after = sliding_scores(gpt, small_table, perturbed(tokens, first), targets=tokens)

    assert_same_before(after, before, first)


class ReadsItsTarget(torch.nn.Module):
    """A mask that is off by one: a score is better if the next token read is its target."""

    def __init__(self, gpt) -> None:
        super().__init__()
        self.gpt = gpt

    def token_losses(self, ids_BT, targets_BT, last=None):
        nats_BT = self.gpt.token_losses(ids_BT, targets_BT)
        hit_BT = torch.nn.functional.pad(ids_BT[:, 1:] == targets_BT[:, :-1], (0, 1))
        return (nats_BT - 0.5 * hit_BT)[:, -(last or nats_BT.shape[1]) :]


def test_a_model_that_reads_its_target_is_caught(make_gpt, small_table, stream):
    gpt, tokens = ReadsItsTarget(make_gpt()), stream(NUM_TOKENS)

    before = sliding_scores(gpt, small_table, tokens)
    after = sliding_scores(gpt, small_table, perturbed(tokens, 40), targets=tokens)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_before(after, before, 40)


@pytest.mark.parametrize("first", [33, 36, 64, 66, 101])
def test_test_time_training_hears_nothing_from_the_future(make_gpt, small_table, stream, first):
    tokens = stream(NUM_TOKENS)

    before = ttt_scores(make_gpt(), small_table, tokens)
    after = ttt_scores(make_gpt(), small_table, perturbed(tokens, first), targets=tokens)

    assert_same_before(after, before, first)


def test_training_before_scoring_does_hear_from_the_future(make_gpt, small_table, stream):
    # What the test above would say of PR #388: it can fail.
    tokens, first, scores = stream(NUM_TOKENS), 101, []
    for text in (tokens, perturbed(tokens, first)):
        gpt, config = make_gpt(), TTTConfig(lr=0.05, epochs=2)
        train_on_all(gpt, text, config, seq_len=SEQ_LEN, allow_illegal=True)
        scores.append(sliding_scores(gpt, small_table, text))

    assert np.abs(scores[1] - scores[0])[: first - 1].max() > 1e-3


@torch.no_grad()
def test_probabilities_of_all_tokens_sum_to_one(make_gpt, stream):
    gpt, vocab_size = make_gpt().eval(), 32
    ids = torch.from_numpy(stream(SEQ_LEN * 2).astype(np.int64)).view(2, SEQ_LEN)

    total = sum(
        gpt.token_losses(ids, torch.full_like(ids, token), last=STRIDE).double().neg().exp()
        for token in range(vocab_size)
    )

    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


class WatchedGPT(torch.nn.Module):
    """Notes of every call whether gradients were on, and the versions of the weights."""

    def __init__(self, gpt) -> None:
        super().__init__()
        self.gpt = gpt
        self.calls = []

    def versions(self) -> list[int]:
        return [parameter._version for parameter in self.gpt.parameters()]

    def token_losses(self, ids_BT, targets_BT, last=None):
        self.calls.append((torch.is_grad_enabled(), self.versions()))
        return self.gpt.token_losses(ids_BT, targets_BT, last)


def test_a_chunk_is_scored_before_any_weight_changes_because_of_it(make_gpt, small_table, stream):
    gpt, chunks = WatchedGPT(make_gpt()), []
    start = gpt.versions()

    def end_of_chunk(record) -> None:
        chunks.append((gpt.calls, gpt.versions()))
        gpt.calls = []

    ttt_scores(gpt, small_table, stream(NUM_TOKENS), on_chunk=end_of_chunk)

    assert len(chunks) == 4
    for index, (calls, end) in enumerate(chunks):
        scoring = [versions for training, versions in calls if not training]
        # First all scores, by the weights of before, then the training.
        assert [training for training, _ in calls] == sorted(training for training, _ in calls)
        assert scoring
        assert all(versions == start for versions in scoring)
        assert len(calls) - len(scoring) == (4 if index < 3 else 0)
        assert (end > start) if index < 3 else (end == start)
        start = end
