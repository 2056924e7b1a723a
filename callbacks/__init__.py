"""When things happen in a run: Lightning callbacks, thin; what they do is in :mod:`pgl`."""

from callbacks.divergence_guard import DivergenceGuard
from callbacks.gptq_export import GPTQExport
from callbacks.progress import BudgetProgress
from callbacks.quantization_aware_training import QuantizationAwareTraining
from callbacks.random_state import RandomState
from callbacks.rank_watch import RankWatch
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.run_report import RunReport
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.test_time_training import TestTimeTraining
from callbacks.training_metrics import TrainingMetrics
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.average_config import EMAConfig, SnapshotConfig

__all__ = [
    "BudgetProgress",
    "DivergenceGuard",
    "EMAConfig",
    "GPTQExport",
    "QuantizationAwareTraining",
    "RandomState",
    "RankWatch",
    "RunCheckpoint",
    "RunReport",
    "SlidingWindowBPB",
    "SnapshotConfig",
    "TestTimeTraining",
    "TrainingMetrics",
    "WallClockBudget",
    "WeightAveraging",
]
