from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.evaluate import WindowLoader, default_batch_windows, sliding_windows, tokens_on

COUNTING = np.arange(301, dtype=np.uint16)


def scored_targets(batches) -> list[tuple[int, int, int]]:
    """(first input, target, position) of each scored target, from the tensors alone."""
    found = []
    for batch in batches:
        length = batch.tokens_BS1.shape[1] - 1
        for row, tokens in enumerate(batch.tokens_BS1.tolist()):
            first, stop = int(batch.first_scored_B[row]), int(batch.stop_scored_B[row])
            assert first >= length - batch.last or first == stop
            assert first == stop or tokens[0] == COUNTING[int(batch.start_B[row])]
            found += [(tokens[0], tokens[p + 1], p) for p in range(first, stop)]
    return found


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=4))
def test_shards_are_laid_end_to_end(cuts):
    tokens_N = tokens_on("cpu", np.split(COUNTING, sorted(cuts)))

    assert tokens_N.dtype == torch.int32
    np.testing.assert_array_equal(tokens_N.numpy(), COUNTING)
    assert tokens_on("cpu", tokens_N) is tokens_N


@settings(max_examples=80, deadline=None)
@given(
    num_targets=st.integers(1, 300),
    seq_len=st.integers(1, 24),
    stride_share=st.floats(0, 1),
    batch_windows=st.integers(1, 9),
    world_size=st.integers(1, 5),
    tail=st.sampled_from(["exact", "pr236", "pr324", "pr388"]),
)
def test_ranks_together_score_what_the_windows_say(
    num_targets, seq_len, stride_share, batch_windows, world_size, tail
):
    stride = max(1, round(stride_share * seq_len))
    windows_W3 = sliding_windows(num_targets, seq_len, stride, tail)
    expected = [
        (start, target + 1, target - start)
        for start, end, first in windows_W3.tolist()
        for target in range(first, end)
    ]

    loaders = [
        WindowLoader(
            np.split(COUNTING, [100, 107]),
            seq_len=seq_len,
            stride=stride,
            batch_windows=batch_windows,
            tail=tail,
            num_targets=num_targets,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    batches = [list(loader) for loader in loaders]

    assert sorted(scored_targets(chain(*batches))) == sorted(expected)
    # In lockstep: the same number of batches of the same shapes on every rank.
    shapes = [[(b.tokens_BS1.shape, b.last) for b in rank_batches] for rank_batches in batches]
    assert all(rank_shapes == shapes[0] for rank_shapes in shapes)
    assert len(shapes[0]) == len(loaders[0])
    bulk, single = ((batch_windows, seq_len + 1), stride), ((1, seq_len + 1), seq_len)
    assert set(shapes[0]) <= {bulk, single}


def test_windows_are_filled_with_zeros_on_the_right():
    loader = WindowLoader(COUNTING[5:12], seq_len=10, stride=2)

    (batch,) = loader

    assert batch.tokens_BS1.tolist() == [[5, 6, 7, 8, 9, 10, 11, 0, 0, 0, 0]]
    assert (int(batch.first_scored_B), int(batch.stop_scored_B), batch.last) == (0, 6, 10)


def test_first_window_comes_alone_and_the_rest_in_full_batches():
    loader = WindowLoader(COUNTING, seq_len=100, stride=10, batch_windows=8)

    shapes = [(tuple(batch.tokens_BS1.shape), batch.last) for batch in loader]

    assert shapes == [((1, 101), 100), ((8, 101), 10), ((8, 101), 10), ((8, 101), 10)]
    assert len(loader) == 4
    assert loader.num_single_batches == 1
    padding = list(loader)[-1]
    assert padding.first_scored_B.tolist() == [90] * 4 + [0] * 4
    assert padding.stop_scored_B.tolist() == [100] * 4 + [0] * 4
    assert not padding.tokens_BS1[4:].any()
    assert [batch.alone for batch in loader] == [True] + [False] * 3


def test_the_batch_size_follows_the_device():
    assert WindowLoader(COUNTING, seq_len=16, stride=4, batch_windows=None).batch_windows == 32
    assert default_batch_windows(torch.device("cuda"), 2048) == 128
    assert default_batch_windows(torch.device("cuda"), 1_000_000) == 1


def test_given_windows_are_used():
    windows_W3 = np.array([[10, 20, 15], [40, 50, 45]])
    loader = WindowLoader(COUNTING, seq_len=10, stride=5, windows_W3=windows_W3)

    assert [t for _, t, _ in scored_targets(loader)] == [*range(16, 21), *range(46, 51)]


def test_it_reads_memory_maps(tmp_path):
    path = tmp_path / "tokens.bin"
    COUNTING.tofile(path)
    mapped = np.memmap(path, dtype=np.uint16, mode="r")

    loader = WindowLoader([mapped[:150], mapped[150:]], seq_len=16, stride=4)

    assert sorted(t for _, t, _ in scored_targets(loader)) == list(range(1, 301))
    assert next(iter(loader)).tokens_BS1.dtype == torch.int32


def test_more_targets_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"num_targets is 301 but .* 300 targets"):
        WindowLoader(COUNTING, seq_len=16, stride=4, num_targets=301)


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="batch_windows is 0"):
        WindowLoader(COUNTING, seq_len=16, stride=4, batch_windows=0)


@pytest.mark.gpu
def test_batches_are_made_on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    made = [
        list(WindowLoader(COUNTING, seq_len=16, stride=4, batch_windows=7, device=device))
        for device in ("cpu", "cuda")
    ]
    for expected, batch in zip(*made, strict=True):
        assert batch.tokens_BS1.is_cuda
        assert torch.equal(batch.tokens_BS1.cpu(), expected.tokens_BS1)
        assert torch.equal(batch.stop_scored_B.cpu(), expected.stop_scored_B)
