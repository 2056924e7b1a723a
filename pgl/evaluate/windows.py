"""Which window scores which target: chunked and sliding evaluation are the same thing here.

A window is a row ``(start, end, first_scored)`` of targets. Target ``i`` is token ``i + 1``; the
window reads tokens ``start .. end - 1`` and scores targets ``first_scored .. end - 1``.

Shapes: W windows.
"""

from typing import Literal

import numpy as np

Tail = Literal["exact", "pr236", "pr324", "pr388"]


def exact_windows(num_targets: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows that score every target exactly once.

    The first window scores all of its targets, each later one the ``stride`` targets that follow.
    What is left at the end is scored by a window shifted left, so that every window is ``seq_len``
    long (one shorter window if there are fewer targets than that) and every target but the first
    window's has at least ``seq_len - stride`` tokens of context before its own.
    ``stride == seq_len`` gives chunks side by side.

    Args:
        num_targets: Targets to score, one fewer than there are tokens.
        seq_len: Tokens the model reads at once.
        stride: Targets that a window adds. Measured: 64 instead of 2048 is worth -0.0235 bits per
            byte (PR #388's model).

    Returns:
        (W, 3) int64: start, end (exclusive), first scored target.

    Raises:
        ValueError: A size is below 1, or ``stride`` is above ``seq_len``.
    """
    _check(num_targets, seq_len, stride)
    if num_targets <= seq_len:
        return np.array([[0, num_targets, 0]], dtype=np.int64)
    windows_W3 = _full_windows(num_targets, seq_len, stride)
    reached = windows_W3[-1, 1]
    if reached < num_targets:
        tail_13 = np.array([[num_targets - seq_len, num_targets, reached]], dtype=np.int64)
        windows_W3 = np.concatenate([windows_W3, tail_13])
    return windows_W3


def sliding_windows(
    num_targets: int, seq_len: int, stride: int, tail: Tail = "exact"
) -> np.ndarray:
    """:func:`exact_windows`, or the windows of a reference run.

    The reference forms differ at the end of the text: ``pr324`` leaves a tail unscored, ``pr388``
    (and #549, #703) and ``pr236`` score the last targets again in each truncated window (1,984
    duplicates in the challenge's 62.0 M targets, about 1e-5 of bpb). They are there to repeat a
    published number, and may be empty.

    Args:
        num_targets: See :func:`exact_windows`.
        seq_len: See :func:`exact_windows`.
        stride: See :func:`exact_windows`.
        tail: Which form.

    Returns:
        (W, 3) int64: start, end (exclusive), first scored target.

    Raises:
        ValueError: As :func:`exact_windows`.
    """
    if tail == "exact":
        return exact_windows(num_targets, seq_len, stride)
    _check(num_targets, seq_len, stride)
    if tail == "pr324":
        return _full_windows(num_targets, seq_len, stride)
    starts_W = np.arange(0, num_targets, stride, dtype=np.int64)
    if tail == "pr236":
        starts_W = starts_W[starts_W <= num_targets - stride]
    return _windows_at(starts_W, num_targets, seq_len, stride)


def shard(windows_W3: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Rank's contiguous part of ``windows_W3``: no window twice, none padded."""
    first, stop = shard_range(len(windows_W3), rank, world_size)
    return windows_W3[first:stop]


def shard_range(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and stop index of rank's contiguous share of ``count`` things."""
    return count * rank // world_size, count * (rank + 1) // world_size


def _full_windows(num_targets: int, seq_len: int, stride: int) -> np.ndarray:
    starts_W = np.arange(0, num_targets - seq_len + 1, stride, dtype=np.int64)
    return _windows_at(starts_W, num_targets, seq_len, stride)


def _windows_at(starts_W: np.ndarray, num_targets: int, seq_len: int, stride: int) -> np.ndarray:
    ends_W = np.minimum(starts_W + seq_len, num_targets)
    first_scored_W = np.maximum(ends_W - stride, starts_W)
    first_scored_W[:1] = 0
    return np.stack([starts_W, ends_W, first_scored_W], axis=1)


def _check(num_targets: int, seq_len: int, stride: int) -> None:
    if num_targets < 1:
        raise ValueError(
            f"there are {num_targets} targets to score; evaluation needs at least two tokens"
        )
    if not 1 <= stride <= seq_len:
        raise ValueError(
            f"stride is {stride} but must lie between 1 and seq_len = {seq_len}: a longer stride "
            "would leave targets unscored"
        )
