"""Where in the text, and where in the window, the nats of a score fell.

Shapes: B windows, S window length, L trailing positions that are scored, N targets, D documents.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from pgl.evaluate.byte_table import ByteTable
from pgl.evaluate.loader import WindowBatch
from pgl.evaluate.score import BatchScores


class ScoreMap:
    """Nats of each target and how often it was scored, kept on the device while scoring.

    What it costs is a handful of small kernels per batch and 8 bytes per target.

    Args:
        num_targets: Targets of the whole text.
        seq_len: Window length.
        device: Where the scores come from.
    """

    def __init__(self, num_targets: int, seq_len: int, device: torch.device | str = "cpu") -> None:
        # The element behind the last target takes what is not scored.
        self._nats_N1 = torch.zeros(num_targets + 1, device=device)
        self._times_N1 = torch.zeros(num_targets + 1, dtype=torch.int32, device=device)
        self._nats_S = torch.zeros(seq_len, dtype=torch.float64, device=device)
        self._times_S = torch.zeros(seq_len, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, batch: WindowBatch, scores: BatchScores) -> None:
        """Enter the scores of one batch."""
        nats_BL, mask_BL = scores.nats_BL.float(), scores.mask_BL
        seq_len, last = len(self._nats_S), batch.last
        position_L = torch.arange(seq_len - last, seq_len, device=nats_BL.device)
        target_BL = batch.start_B[:, None] + position_L
        slot_BL = torch.where(mask_BL, target_BL, len(self._nats_N1) - 1).flatten()
        nats_BL = torch.where(mask_BL, nats_BL, 0.0)
        self._nats_N1.index_add_(0, slot_BL, nats_BL.flatten())
        self._times_N1.index_add_(0, slot_BL, torch.ones_like(slot_BL, dtype=torch.int32))
        self._nats_S[-last:] += nats_BL.double().sum(0)
        self._times_S[-last:] += mask_BL.sum(0)

    def sum_over_ranks(self) -> None:
        """Give every process what all of them scored; all call it, once, after the last batch."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for sums in (self._nats_N1, self._times_N1, self._nats_S, self._times_S):
                dist.all_reduce(sums)

    def times(self) -> np.ndarray:
        """Return how often each target was scored, (N,) int32."""
        return self._times_N1[:-1].cpu().numpy()

    def nats(self) -> np.ndarray:
        """Return the mean nats of each target, (N,) float64; 0 where it was never scored."""
        nats_N = self._nats_N1[:-1].double().cpu().numpy()
        return nats_N / np.maximum(self.times(), 1)

    def nats_by_position(self) -> np.ndarray:
        """Return the mean nats at each position of the window, (S,); NaN where none was scored."""
        nats_S, times_S = self._nats_S.cpu().numpy(), self._times_S.cpu().numpy()
        return np.where(times_S > 0, nats_S / np.maximum(times_S, 1), np.nan)

    def times_by_position(self) -> np.ndarray:
        """Return how many targets were scored at each position of the window, (S,) int64."""
        return self._times_S.cpu().numpy()


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document, its first token (BOS) included."""

    index: int
    """Number of the document in the text, from 0."""
    start: int
    """Its first token."""
    stop: int
    """One past its last token."""
    nats: float
    bytes: int
    bpb: float
    """Bits per byte."""


def document_scores(
    nats_N: np.ndarray, tokens_N1: np.ndarray, table: ByteTable, bos_id: int = 1
) -> list[DocumentScore]:
    """Add up nats and bytes by document; a document begins with ``bos_id``.

    Args:
        nats_N: Nats of each target; target i is token i + 1.
        tokens_N1: The text.
        table: Byte counts.
        bos_id: The id that starts each document.

    Returns:
        The documents that have text, in order; what lies before the first BOS is document 0.
    """
    ids = torch.from_numpy(np.asarray(tokens_N1).astype(np.int64))
    bytes_N = table.target_bytes(ids[:-1], ids[1:]).numpy()
    starts = np.flatnonzero(np.asarray(tokens_N1) == bos_id)
    if len(starts) == 0 or starts[0] > 0:
        starts = np.concatenate([[0], starts])
    document_N = np.searchsorted(starts, np.arange(1, len(tokens_N1)), side="right") - 1
    nats_D = np.bincount(document_N, weights=nats_N, minlength=len(starts))
    bytes_D = np.bincount(document_N, weights=bytes_N, minlength=len(starts)).astype(np.int64)
    stops = np.append(starts[1:], len(tokens_N1))
    return [
        DocumentScore(index, int(start), int(stop), nats, int(count), nats / math.log(2.0) / count)
        for index, (start, stop, nats, count) in enumerate(
            zip(starts, stops, nats_D.tolist(), bytes_D.tolist(), strict=True)
        )
        if count > 0
    ]


def worst_documents(
    documents: list[DocumentScore], count: int, min_bytes: int = 200
) -> list[DocumentScore]:
    """Return the documents with the most bits per byte, worst first.

    Those of fewer than ``min_bytes`` bytes are left out, as a title alone is always bad, unless
    there are no others.
    """
    long_enough = [document for document in documents if document.bytes >= min_bytes]
    ranked = sorted(long_enough or documents, key=lambda document: -document.bpb)
    return ranked[:count]
