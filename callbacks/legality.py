"""What a run did, gathered from its callbacks for :mod:`pgl.legality`."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from callbacks.find import find_callback, optional_callback
from callbacks.gptq_export import GPTQExport
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.test_time_training import TestTimeTraining
from callbacks.wall_clock_budget import WallClockBudget
from pgl.legality import Evidence, judge


def legality(
    trainer: pl.Trainer, data: dict[str, Any], trained_tokens: int, device: str
) -> dict[str, Any]:
    """Return the verdict on a finished run.

    Args:
        trainer: Its callbacks know what they did.
        data: What the data module says of itself.
        trained_tokens: Tokens of all optimizer steps.
        device: Number and type of the devices.
    """
    validation = find_callback(trainer, SlidingWindowBPB)
    exporter, budget = find_callback(trainer, GPTQExport), find_callback(trainer, WallClockBudget)
    ttt = optional_callback(trainer, TestTimeTraining)
    probes = validation.probes
    return judge(
        Evidence(
            data=data,
            trained_tokens=trained_tokens,
            steps=trainer.global_step,
            calibration=exporter.calibrated,
            budget=budget.report(),
            artifact=exporter.report(),
            score=asdict(validation.scores[-1]) if validation.scores else None,
            probes=None
            if probes is None
            else {**asdict(probes), "causal": probes.causal, "normalised": probes.normalised},
            ttt=ttt.report() if ttt is not None else {},
            device=device,
        )
    )
