"""When things happen in a run: Lightning callbacks, thin; what they do is in :mod:`pgl`."""

from callbacks.gptq_export import GPTQExport
from callbacks.progress import BudgetProgress
from callbacks.random_state import RandomState
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.run_report import RunReport
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.training_metrics import TrainingMetrics
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import EMAConfig, SnapshotConfig, WeightAveraging

__all__ = [
    "BudgetProgress",
    "EMAConfig",
    "GPTQExport",
    "RandomState",
    "RunCheckpoint",
    "RunReport",
    "SlidingWindowBPB",
    "SnapshotConfig",
    "TrainingMetrics",
    "WallClockBudget",
    "WeightAveraging",
]
