import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgl.evaluate import exact_windows, shard, sliding_windows

sizes = st.integers(1, 40).flatmap(
    lambda seq_len: st.tuples(st.integers(1, 300), st.just(seq_len), st.integers(1, seq_len))
)


@settings(max_examples=200, deadline=None)
@given(sizes=sizes)
@example(sizes=(7, 8, 3))
@example(sizes=(8, 8, 3))
@example(sizes=(9, 8, 3))
def test_exact_windows_score_each_target_once_with_full_context(sizes):
    num_targets, seq_len, stride = sizes

    windows_W3 = exact_windows(num_targets, seq_len, stride)

    scored = np.zeros(num_targets, dtype=int)
    for start, end, first in windows_W3:
        assert 0 <= start <= first < end <= num_targets
        assert end - start == min(seq_len, num_targets)
        if start > 0:
            assert first - start >= seq_len - stride
            assert end - first <= stride
        scored[first:end] += 1
    assert (scored == 1).all()
    assert (np.diff(windows_W3[:, 0]) > 0).all()
    assert windows_W3.dtype == np.int64


@settings(max_examples=50, deadline=None)
@given(num_targets=st.integers(1, 300), seq_len=st.integers(1, 40))
def test_a_stride_of_the_length_gives_chunks(num_targets, seq_len):
    windows_W3 = exact_windows(num_targets, seq_len, seq_len)

    assert len(windows_W3) == -(-num_targets // seq_len)
    starts = np.arange(0, num_targets, seq_len)
    np.testing.assert_array_equal(windows_W3[:, 2], starts)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes)
def test_reference_forms_are_the_exact_ones_where_the_text_fits(sizes):
    num_targets, seq_len, stride = sizes
    num_targets = seq_len + stride * (num_targets // stride)
    exact = exact_windows(num_targets, seq_len, stride)

    np.testing.assert_array_equal(sliding_windows(num_targets, seq_len, stride, "pr324"), exact)
    for tail in ("pr236", "pr388"):
        windows_W3 = sliding_windows(num_targets, seq_len, stride, tail)
        np.testing.assert_array_equal(windows_W3[: len(exact)], exact)


def test_tails_differ():
    tails = ("exact", "pr236", "pr324", "pr388")
    assert [len(sliding_windows(103, 16, 4, tail)) for tail in tails] == [23, 25, 22, 26]


def test_a_million_windows_are_quick():
    start = time.process_time()
    windows_W3 = exact_windows(62_021_632, 2048, 64)
    assert time.process_time() - start < 1
    assert len(windows_W3) == 969_057
    assert int((windows_W3[:, 1] - windows_W3[:, 2]).sum()) == 62_021_632


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 100), world_size=st.integers(1, 12))
def test_shards_are_contiguous_even_and_complete(count, world_size):
    windows_W3 = np.arange(count * 3).reshape(count, 3)
    shards = [shard(windows_W3, rank, world_size) for rank in range(world_size)]

    np.testing.assert_array_equal(np.concatenate(shards), windows_W3)
    lengths = [len(part) for part in shards]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8, 4), "0 targets"),
        ((10, 8, 0), "stride is 0"),
        ((10, 8, 9), "stride is 9"),
    ],
)
@pytest.mark.parametrize("tail", ["exact", "pr388"])
def test_sizes_that_make_no_sense_are_refused(sizes, message, tail):
    with pytest.raises(ValueError, match=message):
        sliding_windows(*sizes, tail=tail)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, tail=st.sampled_from(["pr236", "pr324", "pr388"]))
def test_no_window_scores_what_it_does_not_read(sizes, tail):
    windows_W3 = sliding_windows(*sizes, tail=tail)
    start_W, end_W, first_W = windows_W3.T
    assert (start_W <= first_W).all()
    assert (first_W < end_W).all()
