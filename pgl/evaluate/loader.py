"""Evaluation windows gathered on the device that scores them, in batches of few shapes.

Shapes: B windows in a batch, S window length, W windows, N tokens.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgl.evaluate.windows import Tail, shard_range, sliding_windows

TOKENS_OF_A_CUDA_BATCH = 262_144


class WindowBatch(NamedTuple):
    """Windows to score together: inputs ``tokens[:, :-1]``, targets ``tokens[:, 1:]``."""

    tokens_BS1: Tensor
    """int32 (B, S + 1); 0 to the right of a window shorter than S."""

    start_B: Tensor
    """int64: index of the window's first token in the text."""

    first_scored_B: Tensor
    """int64: first position that is scored, counted from the start of the window."""

    stop_scored_B: Tensor
    """int64: one past the last position that is scored."""

    last: int
    """Number of trailing positions that hold all the scored ones: the head is needed there only."""

    alone: bool = False
    """One of the few windows that come by themselves; not worth compiling for."""


Tokens = np.ndarray | Sequence[np.ndarray] | Tensor
"""Token array, several shards in order, or what :func:`tokens_on` made of them."""


def tokens_on(device: torch.device | str, tokens: Tokens) -> Tensor:
    """The whole text on one device, (N,) int32; a tensor that is there already is not copied.

    62 M tokens, the challenge's validation split, take 248 MB.
    """
    if isinstance(tokens, Tensor):
        return tokens.to(device, torch.int32)
    shards = [tokens] if isinstance(tokens, np.ndarray) else list(tokens)
    whole = np.concatenate([np.asarray(shard, dtype=np.int32) for shard in shards])
    return torch.from_numpy(whole).to(device)


def count_targets(tokens_N: Tensor, num_targets: int | None) -> int:
    """How many targets to use: all where ``num_targets`` is None.

    Raises:
        ValueError: There are not that many.
    """
    available = len(tokens_N) - 1
    if num_targets is not None and num_targets > available:
        raise ValueError(
            f"num_targets is {num_targets} but the validation data holds {available} targets; "
            "lower it or leave it unset"
        )
    return available if num_targets is None else num_targets


def default_batch_windows(device: torch.device, seq_len: int) -> int:
    """Windows of one forward pass: 262,144 tokens on CUDA, 32 windows elsewhere."""
    return max(TOKENS_OF_A_CUDA_BATCH // seq_len, 1) if device.type == "cuda" else 32


class WindowLoader:
    """The evaluation windows of one rank, in batches: a validation dataloader.

    Windows are shared out in contiguous parts without duplicates. The text lies on ``device`` and
    windows are gathered there: a batch costs the host a few launches and no copy.

    A batch has one of two shapes, so that a compiled model is compiled at most twice: the bulk,
    ``batch_windows`` full windows of which at most the last ``stride`` positions are scored; and
    single windows that need the head everywhere (the first window of an overlapping evaluation,
    and those cut short by the end of the text). The last bulk batch is filled with rows that score
    nothing: neither the number of windows nor the number of processes changes the shape, and so
    the arithmetic, of a batch.
    Every rank yields the same number of batches of each shape, so that a collective inside the
    model cannot hang: what a rank lacks is filled likewise.

    Args:
        tokens: Token array, several shards in order, or a tensor of :func:`tokens_on`.
        seq_len: Window length in tokens.
        stride: Targets that a window adds; ``seq_len`` gives chunked evaluation.
        batch_windows: Windows in a bulk batch. None: :func:`default_batch_windows`.
        tail: See :func:`pgl.evaluate.windows.sliding_windows`.
        num_targets: Score only this many targets from the start; None scores all.
        windows_W3: These windows instead of those of ``tail`` and ``num_targets`` (test-time
            training scores chunk by chunk).
        rank: This process.
        world_size: Number of processes.
        device: Where batches are made, and the text is kept.

    Raises:
        ValueError: A size does not fit; see the message.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        stride: int,
        batch_windows: int | None = 32,
        tail: Tail = "exact",
        num_targets: int | None = None,
        windows_W3: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.tokens_N = tokens_on(self.device, tokens)
        num_targets = count_targets(self.tokens_N, num_targets)
        if batch_windows is None:
            batch_windows = default_batch_windows(self.device, seq_len)
        if batch_windows < 1:
            raise ValueError(f"batch_windows is {batch_windows}; it must be at least 1")
        if windows_W3 is None:
            windows_W3 = sliding_windows(num_targets, seq_len, stride, tail)
        self.seq_len = seq_len
        self.stride = stride
        self.batch_windows = batch_windows
        self._share_out(windows_W3, rank, world_size)

    @property
    def num_targets(self) -> int:
        """Targets of the whole text."""
        return len(self.tokens_N) - 1

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
        yield from self._batches(self.single_windows_W3, self.num_single_batches, 1, self.seq_len)
        yield from self._batches(
            self.bulk_windows_W3, self.num_bulk_batches, self.batch_windows, self.stride
        )

    def _batches(
        self, windows_W3: np.ndarray, count: int, num_rows: int, last: int
    ) -> Iterator[WindowBatch]:
        # Padding rows are windows of no length: they read zeros and score nothing.
        rows_R3 = np.zeros((count * num_rows, 3), dtype=np.int64)
        rows_R3[: len(windows_W3)] = windows_W3
        rows_R3 = torch.from_numpy(rows_R3).to(self.device)
        for index in range(count):
            rows_B3 = rows_R3[index * num_rows : (index + 1) * num_rows]
            yield self._gather(rows_B3, last, alone=windows_W3 is self.single_windows_W3)

    def _gather(self, rows_B3: Tensor, last: int, alone: bool) -> WindowBatch:
        start_B, end_B, first_B = rows_B3.unbind(1)
        index_BS1 = start_B[:, None] + torch.arange(self.seq_len + 1, device=self.device)
        is_text_BS1 = (index_BS1 <= end_B[:, None]) & (end_B > start_B)[:, None]
        tokens_BS1 = self.tokens_N[index_BS1.clamp(max=len(self.tokens_N) - 1)]
        return WindowBatch(
            tokens_BS1=torch.where(is_text_BS1, tokens_BS1, 0),
            start_B=start_B,
            first_scored_B=first_B - start_B,
            stop_scored_B=end_B - start_B,
            last=last,
            alone=alone,
        )
