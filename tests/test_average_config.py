"""What describes an average, and what a shorter run makes of it."""

import pytest

from pgl.average_config import EMAConfig, SnapshotConfig, ema_decay, make_average
from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage
from pgl.optim import Progress

# One H200 makes 405 steps of PR #236 in three minutes; the recipe was tuned for about 7,000.
SCALE = 405 / 7000


def test_a_shorter_run_has_a_faster_ema():
    ema = EMAConfig(decay=0.997, start_fraction=0.1).scaled(SCALE)
    assert ema.decay == pytest.approx(0.997 ** (7000 / 405)) == pytest.approx(0.9494, abs=1e-4)
    assert ema.start_fraction == 0.1
    # What is left of the first weights at the end does not depend on the length of the run.
    assert ema.decay**405 == pytest.approx(0.997**7000)
    horizon = EMAConfig(horizon_fraction=0.1)
    progress = Progress(50, 0.0, None, 200)
    assert ema_decay(progress, horizon.scaled(SCALE)) == ema_decay(progress, horizon)


@pytest.mark.parametrize(
    ("config", "every_steps"),
    [
        (SnapshotConfig(every_steps=200, start_scale=0.5, count_from="zero"), 12),  # PR #236
        (SnapshotConfig(every_steps=25, start_scale=0.35), 1),  # PR #324
        (SnapshotConfig(every_steps=50, start_scale=0.2, keep=16), 3),  # PR #388
        (SnapshotConfig(every_steps=8), 1),
    ],
)
def test_a_shorter_run_takes_snapshots_closer_together(config, every_steps):
    scaled = config.scaled(SCALE)
    assert scaled.every_steps == every_steps
    assert (scaled.start_scale, scaled.keep) == (config.start_scale, config.keep)
    assert scaled.count_from == config.count_from
    assert config.scaled(1.0) == config


def test_distances_that_are_fractions_scale_by_themselves():
    config = SnapshotConfig(every_steps=None, every_fraction=0.01)
    assert config.scaled(SCALE) is config


def test_each_configuration_makes_its_average():
    assert isinstance(make_average(EMAConfig(), None), ExponentialAverage)
    assert isinstance(make_average(SnapshotConfig(), None), UniformAverage)
    last = make_average(SnapshotConfig(keep=3), "cpu")
    assert isinstance(last, LastAverage)
    assert (last.length, last.device) == (3, "cpu")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (EMAConfig(), "decay 0.997"),
        (EMAConfig(horizon_fraction=0.02), "horizon 0.02 of the run"),
        (SnapshotConfig(every_steps=200, start_scale=0.5), "every 200 steps below scale 0.5"),
        (
            SnapshotConfig(every_steps=None, every_fraction=0.1, keep=4),
            "every 0.1 of the run below scale 0.2, last 4",
        ),
    ],
)
def test_the_report_gets_a_description(config, text):
    assert str(config) == text


@pytest.mark.parametrize(
    "settings",
    [
        {"every_steps": None},
        {"every_fraction": 0.1},
        {"every_steps": None, "every_fraction": 1.5},
    ],
)
def test_distances_must_be_given_once(settings):
    with pytest.raises(ValueError, match="every_fraction"):
        SnapshotConfig(**settings)
