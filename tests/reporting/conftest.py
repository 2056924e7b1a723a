"""Made-up runs on disk, as `pgl fit` leaves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


def a_report(name: str, bpb: float | None, **changes: Any) -> dict[str, Any]:
    scores = [
        {"weights": "raw", "windows": "chunked", "bpb": 1.5, "loss": 2.5, "tokens": 9, "bytes": 9},
        {
            "weights": "quantised",
            "windows": "sliding",
            "bpb": bpb,
            "loss": None if bpb is None else 1.7 * bpb,
            "tokens": 9,
            "bytes": 9,
        },
    ]
    return {
        "name": name,
        "training": {"steps": 200, "tokens": 51200, "seconds": 10.0, "tokens_per_second": 5120},
        "scores": [] if bpb is None else scores,
        "budget": {
            "phases": {
                "train": {"seconds": 10.0, "counts": True},
                "validation": {"seconds": 2.5, "counts": False},
            }
        },
        "artifact": {"total_bytes": 1000, "limit_bytes": 16000},
        "environment": {"device": "1 x cpu (x)"},
        **changes,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run's folder; ``bpb=None`` scores nothing, ``finished=False`` has no report."""

    def make(
        name: str,
        seed: int,
        bpb: float | None = 1.2,
        finished: bool = True,
        settings: dict[str, Any] | None = None,
        **report: Any,
    ) -> Path:
        folder = tmp_path / "runs" / name / f"version_{seed}"
        folder.mkdir(parents=True)
        config = {"seed_everything": seed, "data": {"batch_tokens": 256}, **(settings or {})}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if finished:
            (folder / "report.json").write_text(json.dumps(a_report(name, bpb, **report)))
        return folder

    return make
