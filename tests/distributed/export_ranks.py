"""What each rank of a run with a searched artifact does, for test_export_ddp.py."""

import json
from pathlib import Path

import torch.distributed as dist
from runs import digest, fit

import callbacks
import pgl.artifact.fit
from pgl.quant import GPTQConfig, QuantConfig, TensorRule

LIMIT_BYTES = 92_000


def export(folder: Path, source: tuple[str, str]) -> None:
    """Fit and export with a search, on ranks whose floats differ; leave what each one got."""
    code_bytes = pgl.artifact.fit.code_bytes

    def differs_by_rank(stored):
        return code_bytes(stored) * (1 + 0.1 * dist.get_rank())

    pgl.artifact.fit.code_bytes = differs_by_rank
    rule = TensorRule(method="gptq")
    gptq = GPTQConfig(steps="balanced")
    quant = QuantConfig(attention=rule, mlp=rule, passthrough_max_numel=0, gptq=gptq)
    exporter = callbacks.GPTQExport(
        quant, codec="rans", limit_bytes=LIMIT_BYTES, search="step", calibration_sequences=4
    )
    run = fit(
        folder / "run",
        source,
        artifact=exporter,
        budget=callbacks.WallClockBudget(seconds=None, steps=1, warmup_steps=0),
    )
    exported = run.callback(callbacks.GPTQExport).exported
    result = {
        "step_factor": exported.step_factor,
        "attempts": [attempt.total_bytes for attempt in exported.attempts],
        "weights": digest(exported.state_dict),
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
