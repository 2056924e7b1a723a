"""Schedules against the reference runs' numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pgl.optim import Progress, ScheduleConfig, lr_scale, mile_gamma, muon_momentum, swa_due

Golden = Callable[[str], dict[str, np.ndarray]]

BUDGET_SECONDS = 600.0
MAX_STEPS = 20_000
PULL_REQUESTS = ("236", "324", "388", "703", "base")
SWA = {
    "236": (0.5, 200, "zero"),
    "324": (0.35, 25, "one"),
    "388": (0.2, 50, "one"),
    "703": (0.2, 50, "one"),
}


def config_of(arrays: dict[str, np.ndarray], pull_request: str) -> ScheduleConfig:
    return ScheduleConfig(
        warmdown_steps=int(arrays[f"warmdown_iters_{pull_request}"]),
        warmdown_shape="cosine" if pull_request == "324" else "linear",
        warmdown_max_fraction=0.5 if pull_request == "324" else None,
    )


def on_budget(step: int, elapsed_ms: float) -> Progress:
    return Progress(int(step), float(elapsed_ms) / 1000, BUDGET_SECONDS, MAX_STEPS)


@pytest.mark.parametrize("pull_request", PULL_REQUESTS)
def test_lr_scale_on_a_time_budget(golden: Golden, pull_request: str) -> None:
    arrays = golden("schedules")
    config = config_of(arrays, pull_request)
    columns = [f"lr_{c}_{pull_request}" for c in ("step", "elapsed_ms", "scale")]
    for step, elapsed_ms, scale in zip(*(arrays[c] for c in columns), strict=True):
        assert lr_scale(on_budget(step, elapsed_ms), config) == pytest.approx(scale, abs=1e-12)


@pytest.mark.parametrize("pull_request", PULL_REQUESTS)
def test_lr_scale_on_steps(golden: Golden, pull_request: str) -> None:
    arrays = golden("schedules")
    config = config_of(arrays, pull_request)
    steps = arrays[f"nobudget_step_{pull_request}"].tolist()
    for step, scale in zip(steps, arrays[f"nobudget_scale_{pull_request}"], strict=True):
        # Past the last step the references jump back to 1; a run that is over stays at 0 here.
        expected = scale if step < MAX_STEPS else 0.0
        ours = lr_scale(Progress(step, 0.0, None, MAX_STEPS), config)
        assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pull_request", SWA)
def test_whole_run(golden: Golden, pull_request: str) -> None:
    arrays = golden("schedules")
    config = config_of(arrays, pull_request)
    step_ms = float(arrays[f"trace_step_ms_{pull_request}"])
    start_scale, every_steps, count_from = SWA[pull_request]
    scales, snapshots, elapsed_ms, step = [], [], 0.0, 0
    while elapsed_ms < BUDGET_SECONDS * 1000:
        scales.append(lr_scale(on_budget(step, elapsed_ms), config))
        if swa_due(step, scales[-1], start_scale, every_steps, count_from):
            snapshots.append(step + 1)
        elapsed_ms += step_ms
        step += 1
    assert step == int(arrays[f"trace_total_steps_{pull_request}"])
    assert snapshots == arrays[f"swa_snapshot_updates_{pull_request}"].tolist()
    steps = arrays[f"trace_step_{pull_request}"]
    inside = steps < step
    np.testing.assert_allclose(
        np.array(scales)[steps[inside]],
        arrays[f"trace_scale_{pull_request}"][inside],
        rtol=0,
        atol=1e-12,
    )


def test_muon_momentum(golden: Golden) -> None:
    arrays = golden("schedules")
    for step, momentum in zip(arrays["momentum_step"].tolist(), arrays["momentum"], strict=True):
        ours = muon_momentum(on_budget(step, 0.0), ScheduleConfig())
        assert ours == pytest.approx(momentum, abs=1e-12)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_mile_gamma(golden: Golden, name: str, dtype: torch.dtype) -> None:
    arrays = golden("schedules")
    for scale, gamma in zip(arrays["mile_scale"], arrays[f"mile_gamma_{name}"], strict=True):
        held = torch.tensor(mile_gamma(float(scale)), dtype=torch.float32).to(dtype)
        assert held.item() == pytest.approx(gamma, abs=1e-12)
