"""Evaluation windows cut out of the token shards, in batches of few shapes.

Shapes: B windows in a batch, S window length, W windows, N tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgl.evaluate.windows import Tail, shard_range, sliding_windows


class WindowBatch(NamedTuple):
    """Windows to score together: inputs ``tokens[:, :-1]``, targets ``tokens[:, 1:]``."""

    tokens_BS1: Tensor
    """int32 (B, S + 1); 0 to the right of a window shorter than S."""

    first_scored_B: Tensor
    """int64: first position that is scored, counted from the start of the window."""

    stop_scored_B: Tensor
    """int64: one past the last position that is scored."""

    last: int
    """Number of trailing positions that hold all the scored ones: the head is needed there only."""


class TokenShards:
    """Token shards end to end, as one sequence that copies nothing until a slice is read.

    Args:
        arrays: One array, or several in order (``np.memmap`` stays on disk).
    """

    def __init__(self, arrays: np.ndarray | Sequence[np.ndarray]) -> None:
        self.arrays = [arrays] if isinstance(arrays, np.ndarray) else list(arrays)
        self.offsets = np.cumsum([0] + [len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start .. stop - 1`` as int32, across shard ends."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        out = np.empty(stop - start, dtype=np.int32)
        index = int(np.searchsorted(self.offsets, start, side="right")) - 1
        done = 0
        while done < len(out):
            offset = start + done - int(self.offsets[index])
            part = self.arrays[index][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out


Tokens = np.ndarray | Sequence[np.ndarray] | TokenShards
"""Token array, or several shards in order."""


def open_tokens(tokens: Tokens, num_targets: int | None) -> tuple[TokenShards, int]:
    """The shards as one sequence, and how many of its targets to use: all where it is None.

    Raises:
        ValueError: There are not that many.
    """
    shards = tokens if isinstance(tokens, TokenShards) else TokenShards(tokens)
    available = len(shards) - 1
    if num_targets is not None and num_targets > available:
        raise ValueError(
            f"num_targets is {num_targets} but the validation data holds {available} targets; "
            "lower it or leave it unset"
        )
    return shards, available if num_targets is None else num_targets


class WindowLoader:
    """The evaluation windows of one rank, in batches: a validation dataloader.

    Windows are shared out in contiguous parts without duplicates. A batch has one of two shapes,
    so that a compiled model is compiled at most twice: the bulk, ``batch_windows`` full windows of
    which at most the last ``stride`` positions are scored; and single windows that need the head
    everywhere (the first window, and those cut short by the end of the text).
    Every rank yields the same number of batches of each shape, so that a collective inside the
    model cannot hang: what a rank lacks is filled with rows that score nothing.

    Args:
        tokens: Token array, or several shards in order.
        seq_len: Window length in tokens.
        stride: Targets that a window adds; ``seq_len`` gives chunked evaluation.
        batch_windows: Windows in a bulk batch.
        tail: See :func:`pgl.evaluate.windows.sliding_windows`.
        num_targets: Score only this many targets from the start; None scores all.
        windows_W3: These windows instead of those of ``tail`` and ``num_targets`` (test-time
            training scores chunk by chunk).
        rank: This process.
        world_size: Number of processes.
        pin_memory: Put batches into page-locked memory, for copies that do not block.

    Raises:
        ValueError: A size does not fit; see the message.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        stride: int,
        batch_windows: int = 32,
        tail: Tail = "exact",
        num_targets: int | None = None,
        windows_W3: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.tokens, num_targets = open_tokens(tokens, num_targets)
        if batch_windows < 1:
            raise ValueError(f"batch_windows is {batch_windows}; it must be at least 1")
        if windows_W3 is None:
            windows_W3 = sliding_windows(num_targets, seq_len, stride, tail)
        self.seq_len = seq_len
        self.stride = stride
        self.batch_windows = batch_windows
        self.pin_memory = pin_memory
        self._share_out(windows_W3, rank, world_size)

    def _share_out(self, windows_W3: np.ndarray, rank: int, world_size: int) -> None:
        start_W, end_W, first_W = windows_W3.T
        is_bulk_W = (end_W - start_W == self.seq_len) & (end_W - first_W <= self.stride)
        bulk_before = np.concatenate([[0], np.cumsum(is_bulk_W)])
        bounds = [shard_range(len(windows_W3), r, world_size) for r in range(world_size)]
        bulk_counts = [int(bulk_before[stop] - bulk_before[first]) for first, stop in bounds]
        counts = [stop - first for first, stop in bounds]
        self.num_single_batches = max(c - b for c, b in zip(counts, bulk_counts, strict=True))
        self.num_bulk_batches = -(-max(bulk_counts) // self.batch_windows)
        share = slice(*bounds[rank])
        self.single_windows_W3 = windows_W3[share][~is_bulk_W[share]]
        self.bulk_windows_W3 = windows_W3[share][is_bulk_W[share]]

    def __len__(self) -> int:
        return self.num_single_batches + self.num_bulk_batches

    def __iter__(self) -> Iterator[WindowBatch]:
        for i in range(self.num_single_batches):
            yield self._batch(self.single_windows_W3[i : i + 1], 1, self.seq_len)
        for i in range(self.num_bulk_batches):
            first = i * self.batch_windows
            rows_B3 = self.bulk_windows_W3[first : first + self.batch_windows]
            yield self._batch(rows_B3, self.batch_windows, self.stride)

    def _batch(self, rows_B3: np.ndarray, num_rows: int, last: int) -> WindowBatch:
        # A new tensor each time: an asynchronous copy of the one before may still be under way.
        # Padding rows read token 0 and score nothing.
        tokens_BS1 = torch.empty(
            (num_rows, self.seq_len + 1), dtype=torch.int32, pin_memory=self.pin_memory
        )
        # Filled as the numpy array on the same memory: cheaper slices, and no thread pool to wake.
        out_BS1 = tokens_BS1.numpy()
        out_BS1.fill(0)
        scored_2B = torch.full(
            (2, num_rows), self.seq_len, dtype=torch.int64, pin_memory=self.pin_memory
        )
        if len(rows_B3):
            lowest = int(rows_B3[:, 0].min())
            block = self.tokens.read(lowest, int(rows_B3[:, 1].max()) + 1)
            for row, (start, end, _) in enumerate(rows_B3.tolist()):
                out_BS1[row, : end - start + 1] = block[start - lowest : end - lowest + 1]
            scored_2B[0, : len(rows_B3)] = torch.from_numpy(rows_B3[:, 2] - rows_B3[:, 0])
            scored_2B[1, : len(rows_B3)] = torch.from_numpy(rows_B3[:, 1] - rows_B3[:, 0])
        return WindowBatch(tokens_BS1, scored_2B[0], scored_2B[1], last)
