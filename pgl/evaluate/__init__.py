"""Scoring: byte counts, bits per byte, evaluation windows, test-time training."""

from pgl.evaluate.adapt import FullTTTConfig, SGDConfig, TTTConfig, sequence_loss
from pgl.evaluate.audit import AuditReport, ByteAuditError, audit_bytes
from pgl.evaluate.bits_per_byte import BitsPerByte, RunningBPB
from pgl.evaluate.byte_table import ByteTable, target_bytes
from pgl.evaluate.loader import (
    WindowBatch,
    WindowLoader,
    default_batch_windows,
    tokens_on,
)
from pgl.evaluate.probes import Change, Probes, probe
from pgl.evaluate.score import (
    BatchScores,
    CompiledScorer,
    evaluate_windows,
    score_batch,
    token_losses,
)
from pgl.evaluate.score_map import DocumentScore, ScoreMap, document_scores, worst_documents
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
    "Change",
    "ChunkRecord",
    "CompiledScorer",
    "DocumentScore",
    "FullTTTConfig",
    "Probes",
    "RunningBPB",
    "SGDConfig",
    "ScoreMap",
    "TTTConfig",
    "WindowBatch",
    "WindowLoader",
    "audit_bytes",
    "default_batch_windows",
    "document_scores",
    "evaluate_windows",
    "exact_windows",
    "probe",
    "restored_weights",
    "score_batch",
    "score_first_ttt",
    "sequence_loss",
    "shard",
    "sliding_windows",
    "target_bytes",
    "token_losses",
    "tokens_on",
    "train_on_all",
    "worst_documents",
]
