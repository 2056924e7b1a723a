"""Scoring: byte counts, bits per byte, evaluation windows, test-time training."""

from pgl.evaluate.adapt import TTTConfig
from pgl.evaluate.audit import AuditReport, ByteAuditError, audit_bytes
from pgl.evaluate.bits_per_byte import BitsPerByte
from pgl.evaluate.byte_table import ByteTable, target_bytes
from pgl.evaluate.loader import TokenShards, WindowBatch, WindowLoader
from pgl.evaluate.score import BatchScores, evaluate_windows, score_batch
from pgl.evaluate.ttt import (
    ChunkRecord,
    restored_weights,
    score_first_ttt,
    train_on_all,
)
from pgl.evaluate.windows import exact_windows, shard, sliding_windows

__all__ = [
    "AuditReport",
    "BatchScores",
    "BitsPerByte",
    "ByteAuditError",
    "ByteTable",
    "ChunkRecord",
    "TTTConfig",
    "TokenShards",
    "WindowBatch",
    "WindowLoader",
    "audit_bytes",
    "evaluate_windows",
    "exact_windows",
    "restored_weights",
    "score_batch",
    "score_first_ttt",
    "shard",
    "sliding_windows",
    "target_bytes",
    "train_on_all",
]
