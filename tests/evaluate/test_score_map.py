"""Which target got which nats, and what documents make of it, against loops."""

import math

import numpy as np
import pytest
import torch

from pgl.evaluate import (
    BitsPerByte,
    ScoreMap,
    WindowLoader,
    document_scores,
    evaluate_windows,
    sliding_windows,
    worst_documents,
)


def mapped(gpt, table, tokens, stride, tail="exact", batch_windows=6):
    loader = WindowLoader(tokens, seq_len=16, stride=stride, batch_windows=batch_windows, tail=tail)
    score_map = ScoreMap(len(tokens) - 1, 16)
    result = evaluate_windows(gpt, loader, BitsPerByte(table), on_scores=score_map.add)
    return score_map, result


@pytest.mark.parametrize("stride", [4, 5, 16])
@torch.no_grad()
def test_targets_and_positions_are_those_of_the_windows(make_gpt, small_table, stream, stride):
    gpt, tokens = make_gpt(), stream(102)
    nats_N, by_position = np.full(101, np.nan), [[] for _ in range(16)]
    for start, end, first in sliding_windows(101, 16, stride).tolist():
        ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        window_nats = gpt.token_losses(ids[:, :-1], ids[:, 1:])[0].tolist()
        for target in range(first, end):
            nats_N[target] = window_nats[target - start]
            by_position[target - start].append(window_nats[target - start])

    score_map, result = mapped(gpt, small_table, tokens, stride)

    np.testing.assert_allclose(score_map.nats(), nats_N, rtol=2e-5)
    assert (score_map.times() == 1).all()
    assert score_map.times_by_position().tolist() == [len(nats) for nats in by_position]
    means = [np.mean(nats) if nats else np.nan for nats in by_position]
    np.testing.assert_allclose(score_map.nats_by_position(), means, rtol=2e-5)
    assert score_map.nats().sum() == pytest.approx(float(result["loss"]) * 101, rel=1e-6)


def test_repeated_and_missed_targets_are_counted(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(102)
    repeated, _ = mapped(gpt, small_table, tokens, 4, tail="pr388")
    missed, _ = mapped(gpt, small_table, tokens, 4, tail="pr324")

    windows_W3 = sliding_windows(101, 16, 4, "pr388")
    times = np.zeros(101, dtype=int)
    for _, end, first in windows_W3.tolist():
        times[first:end] += 1
    assert (repeated.times() == times).all()
    assert times.max() > 1
    assert missed.times().tolist() == [1] * 100 + [0]
    assert missed.nats()[-1] == 0


def test_the_batch_size_changes_nothing(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(102)
    one, _ = mapped(gpt, small_table, tokens, 4, batch_windows=1)
    many, _ = mapped(gpt, small_table, tokens, 4, batch_windows=50)
    np.testing.assert_allclose(one.nats(), many.nats(), rtol=1e-5)


def test_documents_add_up(small_table):
    tokens = np.array([9, 5, 1, 6, 7, 8, 1, 1, 4, 11, 12], dtype=np.uint16)
    nats = np.arange(1.0, 11.0)

    documents = document_scores(nats, tokens, small_table)

    ids = torch.from_numpy(tokens.astype(np.int64))
    bytes_N = small_table.target_bytes(ids[:-1], ids[1:]).tolist()
    # Target i is token i + 1: the BOS belongs to the document that it opens; the third is empty.
    expected = {0: [0], 1: [1, 2, 3, 4], 3: [6, 7, 8, 9]}
    assert [document.index for document in documents] == [0, 1, 3]
    assert [(d.start, d.stop) for d in documents] == [(0, 2), (2, 6), (7, 11)]
    for document in documents:
        targets = expected[document.index]
        assert document.nats == sum(nats[target] for target in targets)
        assert document.bytes == sum(bytes_N[target] for target in targets)
        assert document.bpb == pytest.approx(document.nats / math.log(2) / document.bytes)


def test_the_worst_documents_are_long_enough(small_table):
    tokens = np.array([1, 9, 1, *[14] * 60, 1, *[19] * 60], dtype=np.uint16)
    nats = np.concatenate([[90.0], [0.5] * 61, [2.0] * 61])
    documents = document_scores(nats, tokens, small_table)

    assert documents[0].bpb > documents[2].bpb > documents[1].bpb
    assert [d.index for d in worst_documents(documents, 2)] == [2, 1]
    assert [d.index for d in worst_documents(documents, 1)] == [2]
    assert [d.index for d in worst_documents(documents, 1, min_bytes=10**6)] == [0]
