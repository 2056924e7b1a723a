"""Averages against hand-made ones and against Lightning's own; what is exported and saved."""

import copy
import json
from types import SimpleNamespace

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import get_ema_avg_fn

from callbacks import (
    EMAConfig,
    GPTQExport,
    RunCheckpoint,
    SlidingWindowBPB,
    SnapshotConfig,
    WallClockBudget,
    WeightAveraging,
)
from callbacks.find import find_callback
from pgl.average_config import ema_decay
from pgl.evaluate import BitsPerByte, evaluate_windows
from pgl.module import GolfModule
from pgl.optim import Progress, ScheduleConfig
from tests.test_run import StopAfter, assert_same_state


class Weights(Callback):
    """Keeps the raw weights before the first and after each step."""

    def __init__(self) -> None:
        self.after: list[dict] = []

    def on_train_start(self, trainer, pl_module):
        self.after.append(snapshot(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.after):
            self.after.append(snapshot(pl_module))


class LightningsAverage(lightning_callbacks.WeightAveraging):
    """Lightning's average from step 3 on, which leaves the model and the checkpoint alone."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 2

    def _nothing(self, *arguments): ...

    def setup(self, trainer, pl_module, stage): ...

    def on_train_start(self, trainer, pl_module):
        super().setup(trainer, pl_module, "fit")  # later, when the module has all its buffers

    on_train_end = on_validation_epoch_start = on_validation_epoch_end = _nothing
    on_save_checkpoint = _nothing


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.gpt.named_parameters()}


def mean(snapshots):
    return {name: torch.stack([s[name] for s in snapshots]).mean(0) for name in snapshots[0]}


def test_averages_are_the_hand_made_ones_and_the_source_is_exported(golf_run, tiny_gpt):
    weights = Weights()
    averaging = WeightAveraging(
        EMAConfig(decay=0.5),
        SnapshotConfig(every_steps=1, start_scale=2.0, keep=2),
        source="swa",
    )
    module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=0))
    run = golf_run(module=module, averaging=averaging, extra=(weights,))
    assert len(weights.after) == 7
    ema = weights.after[0]
    for after in weights.after[1:]:
        ema = {name: 0.5 * ema[name] + 0.5 * after[name] for name in ema}
    close(averaging.averages["ema"].average(), ema)
    last_two = mean(weights.after[-2:])
    close(averaging.averages["swa"].average(), last_two)
    assert averaging.report() == {
        "source": "swa",
        "ema": {"setting": "decay 0.5", "updates": 7, "first_update_step": 0},
        "swa": {
            "setting": "every 1 steps below scale 2, last 2",
            "updates": 6,
            "first_update_step": 1,
        },
    }
    exported = run.callback(GPTQExport).exported.state_dict
    difference = max(float((exported[n] - last_two[n]).abs().max()) for n in exported)
    distance = max(float((exported[n] - weights.after[-1][n]).abs().max()) for n in exported)
    assert difference < 1e-3 < distance
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    for name in last_two:
        saved = checkpoint["state_dict"][f"gpt.{name}"]
        torch.testing.assert_close(saved, last_two[name])
        raw = checkpoint["current_model_state"][f"gpt.{name}"]
        torch.testing.assert_close(raw, weights.after[-1][name], rtol=0, atol=0)


def test_late_averages_agree_with_lightning_and_start_on_time(golf_run, tiny_gpt):
    weights = Weights()
    oracle = LightningsAverage(use_buffers=False, avg_fn=get_ema_avg_fn(0.7))
    averaging = WeightAveraging(
        EMAConfig(decay=0.7, start_fraction=0.5),
        SnapshotConfig(every_steps=2, start_scale=0.9, count_from="zero"),
        source="raw",
        device="cpu",
    )
    # Scale 1 for steps 0 to 3, then 2/3 and 1/3: the even one of those, step 4, is taken.
    module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=3))
    run = golf_run(module=module, averaging=averaging, extra=(weights, oracle))
    lightnings = oracle._average_model.module.gpt.named_parameters()
    close(averaging.averages["ema"].average(), {name: p.detach() for name, p in lightnings})
    close(averaging.averages["swa"].average(), weights.after[5])
    assert acted(averaging) == {"ema": (4, 3), "swa": (1, 5)}
    assert {average.device for average in averaging.averages.values()} == {"cpu"}
    exported = run.callback(GPTQExport).exported.state_dict
    for name, weight in weights.after[-1].items():
        torch.testing.assert_close(exported[name], weight, atol=1e-3, rtol=1e-2)


def acted(averaging):
    """Return updates and step of the first one of each average."""
    return {
        name: (state["updates"], state["first_update_step"])
        for name, state in averaging.report().items()
        if name != "source"
    }


def test_several_averages_side_by_side_are_each_their_own(golf_run, tiny_gpt):
    weights = Weights()
    averaging = WeightAveraging(
        EMAConfig(decay=0.5),
        SnapshotConfig(every_steps=2, start_scale=0.75),
        SnapshotConfig(every_steps=None, every_fraction=0.25, start_scale=2.0, keep=3),
        source="last",
        device="cpu",
    )
    # Scales 1, 7/8, 6/8, 5/8, ... : the SWA takes steps 4, 6 and 8, the ring every second one.
    module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=8))
    budget = WallClockBudget(seconds=None, steps=8, warmup_steps=0)
    run = golf_run(module=module, averaging=averaging, budget=budget, extra=(weights,))
    assert acted(averaging) == {"ema": (9, 0), "swa": (3, 4), "last": (4, 2)}
    close(averaging.averages["swa"].average(), mean([weights.after[n] for n in (4, 6, 8)]))
    last = mean([weights.after[n] for n in (4, 6, 8)])
    close(averaging.averages["last"].average(), last)
    scored = [score["weights"] for score in run.callback(SlidingWindowBPB).report()]
    assert scored == ["raw", "ema", "swa", "last", "quantised", "quantised"]
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    close({n: checkpoint["state_dict"][f"gpt.{n}"] for n in last}, last)


@pytest.mark.parametrize("stop", [3, 5])
def test_every_kind_of_average_resumes_exactly(golf_run, tiny_gpt, stop):
    def run(folder, **settings):
        averaging = WeightAveraging(
            EMAConfig(horizon_fraction=0.3, start_fraction=0.2),
            SnapshotConfig(every_steps=1, start_scale=0.9, keep=2),
            SnapshotConfig(every_steps=None, every_fraction=0.3, start_scale=2.0, keep=2),
        )
        torch.manual_seed(0)
        module = GolfModule(tiny_gpt, schedule=ScheduleConfig(warmdown_steps=6))
        return golf_run(folder, module=module, averaging=averaging, **settings)

    whole = run("whole")
    checkpoint = RunCheckpoint(every_steps=stop)
    part = run("part", checkpoint=checkpoint, extra=(StopAfter(stop),))
    resumed = run("resumed", ckpt_path=part.folder / "last.ckpt")
    assert_same_state(whole, resumed)
    averaging = resumed.callback(WeightAveraging)
    assert acted(averaging) == acted(whole.callback(WeightAveraging))
    assert acted(averaging)["last"] == (3, 2)


class Scores(Callback):
    """Scores the averages by hand at each validation, and notes what was logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.expected: list[float] = []
        self.clock: list[bool] = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.clock.append(find_callback(trainer, WallClockBudget).phases._open[-1] == "validation")

    def on_validation_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged.append((trainer.global_step, metrics))
        averaging = find_callback(trainer, WeightAveraging)
        gpt = copy.deepcopy(pl_module.gpt)
        for name, weight in averaging.averages["ema"].average().items():
            gpt.get_parameter(name).data.copy_(weight)
        metric = BitsPerByte(trainer.datamodule.byte_table)
        score = evaluate_windows(gpt, trainer.datamodule.chunk_loader(), metric)
        self.expected.append(float(score["bpb"]))


def test_validation_scores_the_averages_beside_the_raw_weights(golf_run, tiny_gpt):
    def run(folder, score, extra=()):
        averaging = WeightAveraging(
            EMAConfig(decay=0.5), SnapshotConfig(every_steps=2, start_scale=2.0), score=score
        )
        validation = SlidingWindowBPB(stride_tokens=32, every_n_steps=2)
        torch.manual_seed(0)
        module = GolfModule(tiny_gpt)
        return golf_run(
            folder, module=module, averaging=averaging, validation=validation, extra=extra
        )

    scores = Scores()
    scored = run("scored", True, (scores,))
    assert [step for step, _ in scores.logged] == [2, 4, 6]
    for (_, logged), expected in zip(scores.logged, scores.expected, strict=True):
        assert logged["val/bpb_ema"] == pytest.approx(expected, rel=1e-6)
        assert logged["val/bpb_ema"] != logged["val/bpb"]
    assert ["val/bpb_swa" in logged for _, logged in scores.logged] == [False, True, True]
    assert all(scores.clock), "the clock ran while averages were scored"
    # It leaves training alone, bit for bit, and the score of the raw weights too.
    plain = run("plain", False)
    assert_same_state(plain, scored)
    named = Scores()
    run("named", ["swa"], (named,))
    assert [
        sorted(name for name in logged if name.startswith("val/bpb_")) for _, logged in named.logged
    ] == [[], ["val/bpb_swa"], ["val/bpb_swa"]]
    assert [m["val/bpb"] for _, m in named.logged] == [m["val/bpb"] for _, m in scores.logged]


def test_the_budgets_step_scale_acts_on_the_averages(golf_run, tiny_gpt):
    averaging = WeightAveraging(
        EMAConfig(decay=0.9),
        SnapshotConfig(every_steps=20, start_scale=2.0),
        SnapshotConfig(every_steps=30, start_scale=2.0, keep=1),
    )
    budget = WallClockBudget(seconds=None, steps=6, warmup_steps=0, step_scale=0.1)
    run = golf_run(module=GolfModule(tiny_gpt), averaging=averaging, budget=budget)
    assert averaging.averages["ema"].decay == pytest.approx(0.9**10)
    assert acted(averaging) == {"ema": (7, 0), "swa": (3, 2), "last": (2, 3)}
    assert averaging.report()["swa"]["setting"] == "every 2 steps below scale 2"
    rows = json.loads((run.folder / "report.json").read_text())["techniques"]
    settings = {row["technique"]: row["setting"] for row in rows}
    assert settings["weight averaging: ema"] == "decay 0.348678"
    assert settings["shortened recipe"] == "0.1 x its steps"
    assert (averaging.ema.decay, averaging.swa.every_steps) == (0.9, 20)


def fake_trainer(**budget_settings):
    budget = WallClockBudget(**budget_settings)
    return SimpleNamespace(callbacks=[budget], global_step=0), budget


def close(actual, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight.float(), rtol=1e-5, atol=1e-6)


def test_the_horizon_is_a_share_of_the_expected_steps():
    progress = Progress(step=50, elapsed_seconds=5.0, budget_seconds=10.0, max_steps=None)
    assert ema_decay(progress, EMAConfig(decay=0.5)) == 0.5
    assert ema_decay(progress, EMAConfig(decay=0.5, horizon_fraction=0.1)) == pytest.approx(0.9)
    assert ema_decay(progress, EMAConfig(horizon_fraction=0.001)) == 0.0


def test_the_horizon_acts_on_the_average(tiny_gpt):
    averaging = WeightAveraging(EMAConfig(horizon_fraction=0.4))
    module = GolfModule(tiny_gpt)
    trainer, budget = fake_trainer(seconds=None, steps=10)
    averaging.setup(trainer, module, "fit")
    averaging.on_train_start(trainer, module)
    before = snapshot(module)
    with torch.no_grad():
        module.gpt.tok_emb.weight += 1.0
    trainer.global_step = 1
    budget.progress = Progress(1, 0.0, None, 10)
    averaging.on_train_batch_end(trainer, module, None, None, 3)
    averaging.on_train_batch_end(trainer, module, None, None, 4)  # same step: nothing happens
    # A horizon of 4 steps: a quarter of the new weights.
    average = averaging.averages["ema"].average()["tok_emb.weight"]
    torch.testing.assert_close(average, before["tok_emb.weight"] + 0.25)
    assert averaging.averages["ema"].decay == averaging.ema.decay  # its own setting is left alone


def test_resuming_training_goes_on_from_the_raw_weights(tiny_gpt):
    module, averaging = GolfModule(tiny_gpt), WeightAveraging()
    raw = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    checkpoint = {"state_dict": module.state_dict(), "current_model_state": raw}
    for fn, is_raw in ((TrainerFn.VALIDATING, False), (TrainerFn.FITTING, True)):
        trainer = SimpleNamespace(state=SimpleNamespace(fn=fn))
        averaging.on_load_checkpoint(trainer, module, checkpoint)
        assert bool((module.gpt.tok_emb.weight == 0).all()) == is_raw
