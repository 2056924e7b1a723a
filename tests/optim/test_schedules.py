"""Schedules: limits, fraction forms, steps in place of seconds, refusals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.optim import Progress, ScheduleConfig, lr_scale, mile_gamma, muon_momentum, swa_due


def seconds(elapsed: float, step: int = 1000, budget: float = 600.0) -> Progress:
    return Progress(step, elapsed, budget, None)


def steps(step: int, maximum: int = 1000) -> Progress:
    return Progress(step, 0.0, None, maximum)


def test_fraction_of_time_or_of_steps() -> None:
    assert seconds(150.0).fraction == 0.25
    assert seconds(700.0).fraction == 1.0
    assert steps(250).fraction == 0.25
    assert steps(2000).fraction == 1.0
    assert Progress(500, 60.0, 600.0, 1000).fraction == 0.1  # time wins


def test_first_step_runs_at_full_rate() -> None:
    for config in (ScheduleConfig(), ScheduleConfig(warmdown_shape="cosine")):
        assert lr_scale(seconds(0.0, step=0), config) == 1.0
        assert muon_momentum(seconds(0.0, step=0), config) == pytest.approx(0.92)


def test_rate_is_zero_when_the_run_is_over() -> None:
    for shape in ("linear", "cosine"):
        config = ScheduleConfig(warmdown_shape=shape)
        assert lr_scale(seconds(600.0), config) == 0.0
        assert lr_scale(seconds(650.0), config) == 0.0
        assert lr_scale(steps(1000), config) == 0.0
        assert lr_scale(steps(1001), config) == 0.0


def test_warmdown_as_a_fraction_is_the_same_on_time_and_on_steps() -> None:
    config = ScheduleConfig(warmdown_steps=None, warmdown_fraction=0.4)
    assert lr_scale(seconds(359.0), config) == 1.0
    assert lr_scale(seconds(480.0), config) == pytest.approx(0.5)
    assert lr_scale(steps(599), config) == 1.0
    assert lr_scale(steps(800), config) == pytest.approx(0.5)


def test_cosine_value() -> None:
    config = ScheduleConfig(warmdown_steps=None, warmdown_fraction=0.5, warmdown_shape="cosine")
    assert lr_scale(seconds(375.0), config) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_cap_keeps_slow_hardware_from_decaying_at_once() -> None:
    slow = seconds(10.0, step=20)  # 0.5 s a step: 3000 steps are 1500 s
    assert lr_scale(slow, ScheduleConfig()) < 1.0
    assert lr_scale(slow, ScheduleConfig(warmdown_max_fraction=0.5)) == 1.0


@pytest.mark.parametrize("name", ["warmdown_steps", "warmdown_fraction"])
def test_warmdown_of_no_length_is_no_warmdown(name: str) -> None:
    config = ScheduleConfig(**{"warmdown_steps": None, name: 0})
    assert lr_scale(seconds(600.0), config) == 1.0
    assert lr_scale(steps(999), config) == 1.0


@settings(max_examples=50, deadline=None)
@given(
    shape=st.sampled_from(["linear", "cosine"]),
    fraction=st.floats(0.01, 1.0),
    elapsed=st.floats(0.0, 700.0),
    later=st.floats(0.0, 100.0),
)
def test_rate_never_rises_and_stays_in_bounds(
    shape: str, fraction: float, elapsed: float, later: float
) -> None:
    config = ScheduleConfig(warmdown_steps=None, warmdown_fraction=fraction, warmdown_shape=shape)
    first, second = lr_scale(seconds(elapsed), config), lr_scale(seconds(elapsed + later), config)
    assert 0.0 <= second <= first <= 1.0


def test_momentum_warmup_by_steps_and_by_fraction() -> None:
    assert muon_momentum(seconds(0.0, step=750), ScheduleConfig()) == pytest.approx(0.955)
    assert muon_momentum(seconds(0.0, step=9999), ScheduleConfig()) == pytest.approx(0.99)
    config = ScheduleConfig(
        momentum_start=0.8,
        momentum_end=0.9,
        momentum_warmup_steps=None,
        momentum_warmup_fraction=0.5,
    )
    assert muon_momentum(seconds(150.0), config) == pytest.approx(0.85)
    assert muon_momentum(steps(250), config) == pytest.approx(0.85)
    assert muon_momentum(steps(900), config) == pytest.approx(0.9)
    assert muon_momentum(steps(0), ScheduleConfig(momentum_warmup_steps=0)) == pytest.approx(0.99)


def test_mile_gamma() -> None:
    assert mile_gamma(1.0) == pytest.approx(1.1)
    assert mile_gamma(0.15) == 0.0
    assert mile_gamma(0.0) == 0.0
    assert mile_gamma(0.575) == pytest.approx(0.55)
    assert mile_gamma(0.5, peak=2.0, threshold=0.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="MiLe threshold"):
        mile_gamma(1.0, threshold=1.0)


def test_swa_due() -> None:
    assert swa_due(200, 0.4, 0.5, 200, "zero")
    assert not swa_due(199, 0.4, 0.5, 200, "zero")
    assert swa_due(199, 0.4, 0.5, 200)
    assert not swa_due(199, 0.5, 0.5, 200)
    with pytest.raises(ValueError, match="every_steps"):
        swa_due(0, 0.0, 0.5, 0)


def test_progress_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="A schedule needs an end"):
        Progress(0, 0.0, None, None)
    with pytest.raises(ValueError, match="time budget must be positive"):
        Progress(0, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="maximum of steps must be positive"):
        Progress(0, 0.0, None, -1)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"warmdown_steps": None}, "warmdown_steps and warmdown_fraction"),
        ({"warmdown_fraction": 0.5}, "warmdown_steps and warmdown_fraction"),
        ({"warmdown_steps": -1}, "warmdown_steps"),
        ({"warmdown_steps": None, "warmdown_fraction": 1.5}, "warmdown_fraction"),
        ({"warmdown_max_fraction": 2.0}, "warmdown_max_fraction"),
        ({"momentum_warmup_fraction": 0.5}, "momentum_warmup_steps and momentum_warmup_fraction"),
        ({"momentum_start": 1.0}, "momentum_start"),
    ],
)
def test_bad_settings_are_refused_by_name(settings_: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScheduleConfig(**settings_)
