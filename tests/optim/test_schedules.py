"""Schedules: limits, fraction forms, steps in place of seconds, refusals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.optim import (
    Progress,
    ScheduleConfig,
    intervals_done,
    lr_scale,
    mile_gamma,
    muon_momentum,
    scaled_decay,
    scaled_steps,
    swa_due,
)


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


@pytest.mark.parametrize(
    ("recipe", "scale", "warmdown_steps", "momentum_warmup_steps"),
    [
        ("236", 405 / 7000, 174, 87),
        ("236", 420 / 9000, 140, 70),  # the reference's three minutes on one H200
        ("324", 0.1, 300, 150),
        ("388", 0.1, 400, 150),
        ("703", 290 / 7000, 145, 62),  # likewise
    ],
)
def test_a_shorter_run_has_a_shorter_schedule(
    recipe: str, scale: float, warmdown_steps: int, momentum_warmup_steps: int
) -> None:
    steps = {"236": 3000, "324": 3000, "388": 4000, "703": 3500}[recipe]
    shape = "cosine" if recipe == "324" else "linear"
    config = ScheduleConfig(warmdown_shape=shape, warmdown_steps=steps)
    scaled = config.scaled(scale)
    assert scaled.warmdown_steps == warmdown_steps
    assert scaled.momentum_warmup_steps == momentum_warmup_steps
    assert scaled.warmdown_shape == shape
    assert config.scaled(1.0) == config
    # The same part of a run of the same number of steps over all.
    for part in (0.2, 0.5, 0.8):
        whole, short = seconds(600 * part, round(7000 * part)), seconds(600 * part, 1)
        short = Progress(round(7000 * scale * part), short.elapsed_seconds, 600.0, None)
        assert lr_scale(short, scaled) == pytest.approx(lr_scale(whole, config), abs=0.02)
        assert muon_momentum(short, scaled) == pytest.approx(muon_momentum(whole, config), abs=2e-3)


def test_what_is_a_fraction_or_off_does_not_scale() -> None:
    config = ScheduleConfig(
        warmdown_steps=None,
        warmdown_fraction=0.4,
        warmdown_max_fraction=0.5,
        momentum_warmup_steps=0,
    )
    assert config.scaled(0.05) == config


def test_scaled_steps_and_decay() -> None:
    assert [scaled_steps(n, 0.1) for n in (0, 1, 4, 25, 3000)] == [0, 1, 1, 2, 300]
    assert scaled_decay(0.99, 0.5) == pytest.approx(0.99**2)
    assert scaled_decay(0.99, 1.0) == 0.99
    assert scaled_decay(0.0, 0.1) == 0.0


def test_intervals_done() -> None:
    assert [intervals_done(steps(n, 10), 0.1) for n in range(11)] == list(range(11))
    assert [intervals_done(steps(n, 10), 0.25) for n in (0, 2, 3, 4, 5, 10)] == [0, 0, 1, 1, 2, 4]
