import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from pgl.evaluate import BitsPerByte, WindowLoader, evaluate_windows, score_batch, sliding_windows


def naive_nats(gpt, tokens, windows_W3) -> list[tuple[int, float]]:
    """(target, nats) of each scored target: one window, one position and full logits at a time."""
    out = []
    for start, end, first in windows_W3.tolist():
        ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
        logits_TV = gpt(ids[None, :-1])[0]
        for position in range(first - start, end - start):
            nats = F.cross_entropy(logits_TV[position], ids[position + 1])
            out.append((start + position, float(nats)))
    return out


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("tail", ["exact", "pr236", "pr324", "pr388"])
@torch.no_grad()
def test_scores_are_those_of_the_naive_loop(make_gpt, small_table, stream, stride, tail):
    gpt, tokens = make_gpt(), stream(102)
    windows_W3 = sliding_windows(101, 16, stride, tail)
    expected = naive_nats(gpt, tokens, windows_W3)
    loader = WindowLoader(tokens, seq_len=16, stride=stride, batch_windows=6, tail=tail)

    found = []
    for batch in loader:
        scores = score_batch(gpt, batch)
        assert scores.nats_BL.shape == (len(batch.tokens_BS1), batch.last)
        assert scores.nats_BL.dtype == torch.float32
        found += scores.nats_BL[scores.mask_BL].tolist()
    metric = BitsPerByte(small_table)
    total = evaluate_windows(gpt, loader, metric)

    assert sorted(found) == pytest.approx(sorted(nats for _, nats in expected), rel=2e-5)
    assert float(metric.nats) == pytest.approx(sum(nats for _, nats in expected), rel=1e-6)
    assert int(total["tokens"]) == len(expected)
    naive_bytes = sum(
        int(
            small_table.target_bytes(
                torch.tensor(int(tokens[target])), torch.tensor(int(tokens[target + 1]))
            )
        )
        for target, _ in expected
    )
    assert int(total["bytes"]) == naive_bytes


@pytest.mark.parametrize("tail", ["exact", "pr388"])
def test_batch_size_and_world_size_do_not_change_the_sums(make_gpt, small_table, stream, tail):
    # In float64, so that only the order of the sums can differ.
    gpt, tokens = make_gpt().double(), stream(300)

    def totals(batch_windows: int, world_size: int) -> tuple[float, int, int]:
        metric = BitsPerByte(small_table)
        sums = torch.zeros(3, dtype=torch.float64)
        for rank in range(world_size):
            loader = WindowLoader(
                tokens,
                seq_len=16,
                stride=3,
                batch_windows=batch_windows,
                tail=tail,
                rank=rank,
                world_size=world_size,
            )
            evaluate_windows(gpt, loader, metric)
            sums += torch.stack([metric.nats, metric.num_tokens, metric.num_bytes])
        return sums.tolist()

    one_by_one = totals(1, 1)
    for batch_windows, world_size in [(32, 1), (200, 1), (32, 3), (7, 3)]:
        nats, num_tokens, num_bytes = totals(batch_windows, world_size)
        assert nats == pytest.approx(one_by_one[0], rel=1e-9)
        assert [num_tokens, num_bytes] == one_by_one[1:]


class RecordingGPT(torch.nn.Module):
    """Scores nothing, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Linear(4, 4)
        self.frozen = torch.nn.Dropout()
        self.frozen.eval()
        self.calls = []

    def token_losses(self, ids_BT, targets_BT, last=None):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        modes = (self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.calls.append((last, modes, autocast))
        return torch.ones(len(ids_BT), last)


def test_the_loop_sets_and_restores_modes(small_table, stream):
    gpt, seen = RecordingGPT(), []
    loader = WindowLoader(stream(100), seq_len=16, stride=4, batch_windows=8)

    evaluate_windows(
        gpt, loader, BitsPerByte(small_table), autocast_dtype=torch.bfloat16, on_batch=seen.append
    )

    # One batch late; each target costs 1 nat here.
    assert len(seen) == len(loader)
    assert math.isnan(seen[0])
    assert all(bpb > 0 for bpb in seen[1:])
    modes = (False, False, False)
    assert gpt.calls == [(16, modes, torch.bfloat16)] + 3 * [(4, modes, torch.bfloat16)]
    assert gpt.training
    assert not gpt.frozen.training
    gpt.calls.clear()
    evaluate_windows(gpt, loader, BitsPerByte(small_table))
    assert gpt.calls[0] == (16, modes, False)


def test_the_metric_starts_anew(small_table, stream):
    metric = BitsPerByte(small_table)
    loader = WindowLoader(stream(100), seq_len=16, stride=4)
    first = evaluate_windows(RecordingGPT(), loader, metric)

    assert evaluate_windows(RecordingGPT(), loader, metric) == first
    assert float(first["loss"]) == 1.0


def test_sliding_gives_more_context_than_chunks(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), np.tile(stream(40), 6)
    losses = []
    for stride in (4, 32):
        loader = WindowLoader(tokens, seq_len=32, stride=stride)
        losses.append(evaluate_windows(gpt, loader, BitsPerByte(small_table)))
    assert losses[0]["tokens"] == losses[1]["tokens"]
    assert losses[0]["bytes"] == losses[1]["bytes"]
    assert losses[0]["loss"] != losses[1]["loss"]


def test_a_compiled_model_compiles_twice_and_no_more(make_gpt, small_table, stream):
    gpt, tokens, counter = make_gpt(), stream(300), CompileCounter()
    loader = WindowLoader(tokens, seq_len=16, stride=4, batch_windows=7, tail="pr388")
    expected = evaluate_windows(gpt, loader, BitsPerByte(small_table))

    gpt.token_losses = torch.compile(
        gpt.token_losses, backend=counter, fullgraph=True, dynamic=False
    )
    scores = evaluate_windows(gpt, loader, BitsPerByte(small_table))

    assert len({batch.tokens_BS1.shape for batch in loader}) == counter.frame_count == 2
    assert float(scores["bpb"]) == pytest.approx(float(expected["bpb"]), rel=1e-6)
