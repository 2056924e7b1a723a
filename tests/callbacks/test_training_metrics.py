"""Curves in the event file, and that steps which do not log wait for nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import SlidingWindowBPB, TrainingMetrics, WallClockBudget
from pgl.module import GolfModule
from pgl.objective import LossConfig
from pgl.optim import ScheduleConfig
from pgl.phases import PhaseTimer


class Watch(Callback):
    """Three seconds a step, as if of a million tokens; notes what the curves should show."""

    def __init__(self) -> None:
        self.time = 0.0
        self.steps: dict[int, dict] = {}
        self._losses: list[float] = []
        self._batches: list[torch.Tensor] = []

    def __call__(self) -> float:
        return self.time

    def on_train_start(self, trainer, pl_module):
        trainer.datamodule.batch_tokens = 1_000_000

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.time += 0.75

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._losses.append(float(outputs["loss"]))
        self._batches.append(batch.clone())
        if (batch_idx + 1) % 4:
            return
        optimizer = trainer.optimizers[0]
        self.steps[trainer.global_step] = {
            "loss": self._losses,
            "batches": self._batches,
            "grad_norm": float(optimizer.grad_norm),
            "clip": optimizer.grad_clip_norm,
            **{f"lr/{g['name']}": g["lr"] for g in optimizer.param_groups},
            "momentum": next(g["momentum"] for g in optimizer.param_groups if g["kind"] == "muon"),
        }
        self._losses = []
        self._batches = []

    def on_validation_epoch_start(self, trainer, pl_module):
        self.time += 50.0


@pytest.fixture
def curves(golf_run, tiny_gpt, monkeypatch):
    waits: dict[int, int] = {}
    inside = []
    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, original=original):
            if inside:
                waits[inside[-1]] = waits.get(inside[-1], 0) + 1
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Watched(TrainingMetrics):
        def on_train_batch_end(self, trainer, *arguments):
            inside.append(trainer.global_step)
            super().on_train_batch_end(trainer, *arguments)
            inside.pop()

    watch = Watch()
    budget = WallClockBudget(seconds=None, steps=6, warmup_steps=0)
    budget.phases = PhaseTimer(watch)
    run = golf_run(
        module=GolfModule(
            tiny_gpt, schedule=ScheduleConfig(warmdown_steps=4), loss=LossConfig(mile_gamma=1.1)
        ),
        budget=budget,
        metrics=Watched(),
        validation=SlidingWindowBPB(stride_tokens=16, every_n_steps=4),
        extra=(watch,),
    )
    events = EventAccumulator(str(run.folder))
    events.Reload()
    return run, watch, events, waits


def test_curves_hold_the_values_of_the_steps_that_log(curves):
    run, watch, events, waits = curves

    def curve(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    def expected(key):
        return [(step, pytest.approx(watch.steps[step][key], rel=1e-5)) for step in (2, 4, 6)]

    # A tag is there for each group, and its values are those of the optimizer.
    for group in ("matrix", "scalar", "embedding"):
        assert curve(f"lr/{group}") == expected(f"lr/{group}")
    assert curve("lr/matrix")[0][1] > curve("lr/matrix")[-1][1] > 0
    assert curve("schedule/muon_momentum") == expected("momentum")
    assert curve("train/grad_norm") == expected("grad_norm")
    assert [step for step, _ in curve("schedule/mile_gamma")] == [2, 4, 6]
    scales = [min(1, (6 - step) / 4) for step in (1, 3, 5)]
    assert [value for _, value in curve("schedule/lr_scale")] == pytest.approx(scales)
    # Lightning has divided each micro-batch's loss by their number: the sum is the step's mean.
    losses = [sum(watch.steps[step]["loss"]) for step in (2, 4, 6)]
    assert [value for _, value in curve("train/loss")] == pytest.approx(losses, rel=1e-5)
    assert run.callback(TrainingMetrics).last_loss == pytest.approx(losses[-1], rel=1e-5)
    # The bytes are those of the tokens that the loss is the mean of: of all micro-batches.
    table = run.data.byte_table
    for (_, bpb), loss, step in zip(curve("train/bpb"), losses, (2, 4, 6), strict=True):
        batches = watch.steps[step]["batches"]
        assert len(batches) == 4
        counted = torch.cat([table.target_bytes(b[:, :-1], b[:, 1:]) for b in batches])
        bytes_per_token = counted.double().mean().item()
        assert bpb == pytest.approx(loss / math.log(2) / bytes_per_token, rel=1e-5)
    # The same against training seconds and against tokens.
    assert curve("by_seconds/train/loss") == [
        (seconds, value)
        for seconds, (_, value) in zip((6, 12, 18), curve("train/loss"), strict=True)
    ]
    assert [step for step, _ in curve("by_ktokens/train/loss")] == [2000, 4000, 6000]
    assert [value for _, value in curve("budget/elapsed_seconds")] == [6, 12, 18]
    # Lightning counts the step it validates after from zero.
    assert [step for step, _ in curve("val/bpb")] == [3, 5]
    assert [step for step, _ in curve("by_seconds/val/bpb")] == [12, 18]
    assert [step for step, _ in curve("by_ktokens/val/bpb")] == [4000, 6000]
    assert [value for _, value in curve("budget/mtokens")] == [2, 4, 6]
    # A validation of 50 seconds between steps 4 and 6 is no part of the speed.
    speed = pytest.approx(2e6 / 6)
    assert curve("speed/tokens_per_second") == [(4, speed), (6, speed)]
    finals = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    assert "final/bpb_quantised_sliding" in finals

    # Only steps that log read from the device.
    assert set(waits) <= {0, 1, 2, 3, 4, 5, 6}
    assert waits.get(1, 0) == waits.get(3, 0) == waits.get(5, 0) == 0
    assert waits[2] > 0
    clipped = [s["grad_norm"] > s["clip"] for s in watch.steps.values()]
    assert run.callback(TrainingMetrics).clipped_steps == sum(clipped)


def fake_step(norm, clip=0.3):
    optimizer = SimpleNamespace(grad_clip_norm=clip, grad_norm=torch.tensor(norm))
    return SimpleNamespace(optimizers=lambda use_pl_optimizer: optimizer)


def test_clipped_steps_are_counted_once_a_step_and_saved():
    metrics = TrainingMetrics()
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=1, log_every_n_steps=1000)
    for index, norm in enumerate([0.1, 0.5, 9.0, 0.3, 9.0, 0.31]):
        metrics.on_train_batch_end(trainer, fake_step(norm), None, None, index)
    assert metrics.clipped_steps == 2  # after micro-batches 1 and 5; 0.3 is not above 0.3
    resumed = TrainingMetrics()
    resumed.load_state_dict(metrics.state_dict())
    resumed.on_train_batch_end(trainer, fake_step(0.4), None, None, 7)
    assert resumed.clipped_steps == 3


def test_nothing_is_counted_without_clipping():
    metrics = TrainingMetrics()
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=1, log_every_n_steps=1000)
    metrics.on_train_batch_end(trainer, fake_step(9.0, clip=None), None, None, 0)
    assert metrics.clipped_steps == 0
