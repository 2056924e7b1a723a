"""The training tokens, in the challenge's order, on any number of devices.

Shape suffixes: S sequences of one micro-batch, T sequence length.
"""

import atexit
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgl.data.shards import check_tokens, check_unchanged, read_tokens, shard_state, token_count

PREFETCH_BATCHES = 4
_STEPS_WITHOUT_END = 1_000_000_000


class TokenStream:
    """Shards laid end to end and repeated for ever; any position is read at once.

    Args:
        shards: Shard files, in the order in which they are read.
        vocab_size: Tokens at or above this are refused when they are read.

    Raises:
        ShardError: If a shard is not a valid file of the challenge's format.
    """

    def __init__(self, shards: Sequence[Path], vocab_size: int) -> None:
        if not shards:
            raise ValueError(
                "a token stream needs at least one shard: the source has none to train on"
            )
        self.paths = list(shards)
        self.vocab_size = vocab_size
        self._counts = [token_count(path) for path in self.paths]
        self._states = [shard_state(path) for path in self.paths]
        self._ends = np.cumsum(self._counts)
        self.total_tokens = int(self._ends[-1])

    def check_unchanged(self) -> None:
        """Check that all shards are as they were when the stream was opened.

        Raises:
            ShardError: If one was deleted or written to.
        """
        for path, state in zip(self.paths, self._states, strict=True):
            check_unchanged(path, state)

    def read(self, position: int, count: int) -> np.ndarray:
        """Return ``count`` tokens (uint16) from ``position``, wrapping after the last shard.

        Raises:
            ShardError: If a shard was deleted or written to since the stream was opened.
        """
        pieces = []
        position %= self.total_tokens
        while count > 0:
            index = int(np.searchsorted(self._ends, position, side="right"))
            path, end = self.paths[index], int(self._ends[index])
            start = position - (end - self._counts[index])
            piece = read_tokens(path, start, min(count, end - position), self._states[index])
            check_tokens(piece, self.vocab_size, path, start)
            pieces.append(piece)
            count -= len(piece)
            position = (position + len(piece)) % self.total_tokens
        return np.concatenate(pieces)


@dataclass(frozen=True)
class BatchLayout:
    """Which tokens belong to which optimizer step, rank and micro-step.

    A step reads ``spans_per_batch`` spans of ``batch_tokens / spans_per_batch + 1`` tokens, one
    behind the other; a span's sequences share one token with their neighbour, spans share none.
    The tokens of a step therefore do not depend on how many devices work on it or on how large
    their micro-batches are (the loader of PRs #236, #324, #388 and #703, where the number of
    spans is world size times accumulation, always 8).

    Raises:
        ValueError: If the numbers do not divide, with the numbers in the message.
    """

    batch_tokens: int
    """Tokens of one optimizer step, over all devices."""
    seq_len: int
    """Tokens of one sequence."""
    micro_batch_tokens: int
    """Tokens of one device's forward and backward pass."""
    spans_per_batch: int = 8
    """Contiguous spans that a step's tokens are read in."""
    world_size: int = 1
    """Number of processes."""
    rank: int = 0
    """This process."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "seq_len", "micro_batch_tokens", "spans_per_batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"data.{name} must be positive, got {getattr(self, name)}")
        if self.batch_tokens % (self.spans_per_batch * self.seq_len):
            raise ValueError(
                f"data.batch_tokens={self.batch_tokens} must be a multiple of data.spans_per_batch"
                f"={self.spans_per_batch} x data.seq_len={self.seq_len}"
            )
        if self.micro_batch_tokens % self.seq_len:
            raise ValueError(
                f"data.micro_batch_tokens={self.micro_batch_tokens} must be a multiple of "
                f"data.seq_len={self.seq_len}"
            )
        if self.batch_tokens % (self.micro_batch_tokens * self.world_size):
            raise ValueError(
                f"data.batch_tokens={self.batch_tokens} cannot be split evenly over "
                f"{self.world_size} devices in micro-batches of data.micro_batch_tokens="
                f"{self.micro_batch_tokens}: choose a micro-batch that divides "
                f"{self.batch_tokens / self.world_size:g}"
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches that each device runs in one optimizer step."""
        return self.batch_tokens // (self.micro_batch_tokens * self.world_size)

    @property
    def sequences(self) -> int:
        """Sequences of one micro-batch."""
        return self.micro_batch_tokens // self.seq_len

    @property
    def tokens_read_per_step(self) -> int:
        """Stream positions one step consumes: its tokens and one more for each span."""
        return self.batch_tokens + self.spans_per_batch

    def read_micro_batch(self, stream: TokenStream, step: int, micro_step: int) -> np.ndarray:
        """Return the (S, T+1) tokens of this rank's micro-batch: inputs are [:-1], targets [1:]."""
        per_span = self.batch_tokens // self.spans_per_batch // self.seq_len
        sequence = (micro_step * self.world_size + self.rank) * self.sequences
        end = sequence + self.sequences
        rows = []
        while sequence < end:
            span, offset = divmod(sequence, per_span)
            count = min(per_span - offset, end - sequence)
            position = (
                step * self.tokens_read_per_step
                + span * (per_span * self.seq_len + 1)
                + offset * self.seq_len
            )
            tokens = stream.read(position, count * self.seq_len + 1)
            rows.append(
                np.lib.stride_tricks.sliding_window_view(tokens, self.seq_len + 1)[:: self.seq_len]
            )
            sequence += count
        return np.concatenate(rows)


class TrainLoader:
    """Micro-batches for Lightning's fit loop, read ahead by a thread, resumable at any step.

    It has a length, because Lightning prefetches one batch from loaders without one and a resumed
    run would then skip that batch. The saved position counts whole optimizer steps: micro-batches
    of a step that was cut short are read again.

    Args:
        stream: Where the tokens come from.
        layout: Which of them belong to this rank.
        pin_memory: Whether batches lie in page-locked memory, for asynchronous copies.
    """

    def __init__(self, stream: TokenStream, layout: BatchLayout, pin_memory: bool = False) -> None:
        self.stream = stream
        self.layout = layout
        self.pin_memory = pin_memory
        self._next_micro_batch = 0

    def __len__(self) -> int:
        return _STEPS_WITHOUT_END * self.layout.accumulate

    def __iter__(self) -> Iterator[Tensor]:
        ready: queue.Queue[Tensor | BaseException] = queue.Queue(PREFETCH_BATCHES)
        stopped = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead, args=(self._next_micro_batch, ready, stopped), daemon=True
        )
        thread.start()
        # At interpreter exit too: a daemon thread that is cut off inside C++ aborts the process.
        atexit.register(_stop, stopped, thread)
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._next_micro_batch += 1
                yield item
        finally:
            _stop(stopped, thread)

    def state_dict(self) -> dict[str, int]:
        """Return the optimizer step whose tokens come next."""
        return {"step": self._next_micro_batch // self.layout.accumulate}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a saved step, whatever the world size that saved it."""
        self._next_micro_batch = state_dict["step"] * self.layout.accumulate

    def _read_ahead(self, micro_batch: int, ready: queue.Queue, stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                step, micro_step = divmod(micro_batch, self.layout.accumulate)
                tokens_ST = self.layout.read_micro_batch(self.stream, step, micro_step)
                item = torch.from_numpy(tokens_ST.astype(np.int32))
                if self.pin_memory:
                    item = item.pin_memory()
            except Exception as error:  # handed to the training thread, which raises it
                item = error
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            micro_batch += 1


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    thread.join()
