"""What an average warns of, when it does not stand for the model, and what is refused."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import (
    EMAConfig,
    QuantizationAwareTraining,
    SlidingWindowBPB,
    SnapshotConfig,
    WallClockBudget,
    WeightAveraging,
)
from pgl.module import GolfModule
from pgl.optim import Progress, ScheduleConfig
from pgl.trainer import GolfTrainer
from tests.callbacks.test_weight_averaging import acted, fake_trainer


def finish(averaging, module, steps, first_step=1):
    """Update the averages after each step from ``first_step`` on; return what the end warns of."""
    trainer, budget = fake_trainer(seconds=None, steps=steps)
    averaging.setup(trainer, module, "fit")
    trainer.global_step = first_step - 1
    averaging.on_train_start(trainer, module)
    for step in range(first_step, steps + 1):
        trainer.global_step = step
        budget.progress = Progress(step, 0.0, None, steps)
        averaging.on_train_batch_end(trainer, module, None, None, step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averaging.on_train_end(trainer, module)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("ema", "share"),
    [
        (EMAConfig(decay=0.99), "67%"),
        (EMAConfig(decay=0.9), None),
        (EMAConfig(horizon_fraction=1.0), "36%"),
        (EMAConfig(horizon_fraction=0.5), "13%"),
        (EMAConfig(horizon_fraction=0.3), None),
        (EMAConfig(decay=0.99, start_fraction=0.001), "68%"),
        (EMAConfig(horizon_fraction=1.0, start_fraction=0.05), "38%"),
        (EMAConfig(decay=0.99, start_fraction=0.5), None),
        (EMAConfig(horizon_fraction=1.0, start_fraction=0.5), None),
    ],
)
def test_an_ema_of_the_initial_weights_warns(tiny_gpt, ema, share):
    module = GolfModule(tiny_gpt)
    averaging = WeightAveraging(ema)
    messages = finish(averaging, module, steps=40)
    assert len(messages) == (share is not None)
    assert all(f"still holds {share} of the weights" in message for message in messages)


@pytest.mark.parametrize("horizon_fraction", [0.3, 0.5, 1.0])
def test_the_share_of_the_initial_weights_is_the_one_in_the_average(tiny_gpt, horizon_fraction):
    module, averaging = (
        GolfModule(tiny_gpt),
        WeightAveraging(EMAConfig(horizon_fraction=horizon_fraction)),
    )
    trainer, budget = fake_trainer(seconds=None, steps=50)
    averaging.setup(trainer, module, "fit")
    weight = module.gpt.tok_emb.weight
    with torch.no_grad():
        weight.fill_(1.0)
        averaging.on_train_start(trainer, module)
        weight.zero_()
    for step in range(1, 51):
        trainer.global_step = step
        budget.progress = Progress(step, 0.0, None, 50)
        averaging.on_train_batch_end(trainer, module, None, None, step)
    share = float(averaging.averages["ema"].average()["tok_emb.weight"][0, 0])
    assert averaging._initial_share(trainer) == pytest.approx(share, rel=1e-4)
    assert share == pytest.approx(math.exp(-1 / horizon_fraction), abs=0.01)


def test_an_ema_switched_on_in_a_resumed_run_does_not_hold_the_initial_weights(tiny_gpt):
    averaging = WeightAveraging(EMAConfig(decay=0.999))
    assert finish(averaging, GolfModule(tiny_gpt), steps=40, first_step=30) == []


def test_an_average_that_never_started_warns_and_gives_the_raw_weights(tiny_gpt):
    averaging = WeightAveraging(ema=None, swa=SnapshotConfig(), source="swa")
    module = GolfModule(tiny_gpt)
    averaging.setup(fake_trainer()[0], module, "fit")
    with pytest.warns(UserWarning, match=r"averaging\.swa was never updated.*raw weights"):
        averaging.on_train_end(None, module)
    weights = averaging.source_weights(module)
    for name, parameter in module.gpt.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
    assert acted(averaging) == {"swa": (0, None)}


@pytest.mark.parametrize(
    ("keep", "snapshots", "usable"),
    [(None, 1, False), (None, 2, True), (3, 1, False), (1, 1, True)],
)
def test_a_mean_of_one_snapshot_does_not_stand_for_the_model(tiny_gpt, keep, snapshots, usable):
    module = GolfModule(tiny_gpt)
    swa = SnapshotConfig(every_steps=6 // snapshots, start_scale=2.0, keep=keep)
    averaging = WeightAveraging(None, swa, source="swa")
    messages = finish(averaging, module, steps=7)
    assert averaging.averages["swa"].count == snapshots
    with torch.no_grad():
        module.gpt.tok_emb.weight += 1.0
    raw = averaging.weights(module, "raw")["tok_emb.weight"]
    exported = averaging.source_weights(module)["tok_emb.weight"]
    assert torch.equal(exported, raw) != usable
    assert averaging.is_usable("swa") == usable
    assert len(messages) == (not usable)
    assert all("averaging.swa took a single snapshot" in message for message in messages)


def test_a_mean_of_one_snapshot_is_neither_scored_nor_saved_as_the_model(golf_run, tiny_gpt):
    averaging = WeightAveraging(
        EMAConfig(decay=0.1),
        SnapshotConfig(every_steps=4, start_scale=2.0),
        source="swa",
        score=True,
    )
    seen = []

    class Logged(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(sorted(trainer.callback_metrics))

    with pytest.warns(UserWarning, match=r"averaging\.swa took a single snapshot"):
        run = golf_run(
            averaging=averaging,
            validation=SlidingWindowBPB(stride_tokens=32, every_n_steps=5),
            extra=(Logged(),),
        )
    assert averaging.averages["swa"].count == 1
    assert "val/bpb_ema" in seen[-1]
    assert "val/bpb_swa" not in seen[-1]
    scored = [score["weights"] for score in run.callback(SlidingWindowBPB).report()]
    assert "swa" not in scored
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    for name, weight in checkpoint["current_model_state"].items():
        assert torch.equal(checkpoint["state_dict"][name], weight)


@pytest.mark.parametrize("kind", [WeightAveraging, QuantizationAwareTraining])
def test_a_callback_before_the_budget_it_follows_is_refused(tiny_gpt, kind):
    callback = kind() if kind is WeightAveraging else kind(start="late", start_scale=0.5)
    budget = WallClockBudget(seconds=None, steps=6)
    trainer = GolfTrainer(callbacks=[callback, budget], accelerator="cpu", logger=False)
    module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=6))
    budget.setup(trainer, module, "fit")
    with pytest.raises(ValueError, match=r"put WallClockBudget before it in"):
        callback.setup(trainer, module, "fit")
    trainer.callbacks.reverse()
    callback.setup(trainer, module, "fit")


def test_a_saved_average_that_is_off_now_is_dropped_with_a_warning(tiny_gpt):
    module = GolfModule(tiny_gpt)
    trainer, _ = fake_trainer()
    both = WeightAveraging(EMAConfig(), SnapshotConfig())
    both.setup(trainer, module, "fit")
    both.on_train_start(trainer, module)
    saved = both.state_dict()
    only_swa = WeightAveraging(None, SnapshotConfig(), source="swa")
    only_swa.setup(trainer, module, "fit")
    with pytest.warns(UserWarning, match=r"ema average of 1 updates is dropped.*averaging\.ema is"):
        only_swa.load_state_dict(saved)
    assert set(only_swa.report()) == {"source", "swa"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = WeightAveraging(EMAConfig(), SnapshotConfig())
        same.setup(trainer, module, "fit")
        same.load_state_dict(saved)
    assert same.report() == both.report()


def test_a_ring_needs_a_length():
    with pytest.raises(ValueError, match=r"averaging\.last\.keep"):
        WeightAveraging(last=SnapshotConfig())


def test_an_average_that_is_off_cannot_be_scored():
    with pytest.raises(ValueError, match=r"averaging\.score names swa but averaging\.swa is off"):
        WeightAveraging(score=["ema", "swa"])


@pytest.mark.parametrize("source", ["ema", "swa", "last"])
def test_a_source_that_is_off_is_refused(source):
    with pytest.raises(ValueError, match=f"source is {source}.*averaging.{source} is off"):
        WeightAveraging(ema=None, swa=None, source=source)


@pytest.mark.parametrize(
    ("config", "settings", "name"),
    [
        (EMAConfig, {"decay": 1.0}, "decay"),
        (EMAConfig, {"horizon_fraction": 0.0}, "horizon_fraction"),
        (EMAConfig, {"start_fraction": 1.0}, "start_fraction"),
        (SnapshotConfig, {"every_steps": 0}, "every_steps"),
        (SnapshotConfig, {"start_scale": 0.0}, "start_scale"),
        (SnapshotConfig, {"keep": 0}, "keep"),
    ],
)
def test_bad_settings_are_refused(config, settings, name):
    with pytest.raises(ValueError, match=name):
        config(**settings)
