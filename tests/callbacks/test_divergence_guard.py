"""A loss that is not a number stops the run, is skipped, or rolled back; and resumes exactly."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import DivergenceGuard, RunCheckpoint, WallClockBudget, WeightAveraging
from callbacks.divergence_guard import _Seen
from pgl.errors import DivergenceError
from pgl.objective import LossConfig, training_loss


class BadLoss(Callback):
    """Makes the loss of some optimizer steps (counted from 1) something else than a number."""

    def __init__(self, *steps: int, factor: float = math.nan) -> None:
        self.steps = steps
        self.factor = factor
        self.weights: list[torch.Tensor] = []

    def on_fit_start(self, trainer, pl_module):
        original = pl_module._training_loss

        def loss(*args):
            bad = trainer.global_step + 1 in self.steps
            return original(*args) * (self.factor if bad else 1.0)

        pl_module._training_loss = loss

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.weights.append(flat(pl_module))


class Crashed(Exception):
    pass


class CrashAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Crashed


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.gpt.parameters()])


def steps(count: int) -> WallClockBudget:
    return WallClockBudget(seconds=None, steps=count, warmup_steps=0)


def state(run):
    optimizer = run.trainer.optimizers[0].state_dict()["state"]
    averages = run.callback(WeightAveraging).averages["ema"].average()
    return [
        flat(run.module),
        *[t for i in sorted(optimizer) for t in optimizer[i].values()],
        *averages.values(),
    ]


def assert_same(run, other):
    for ours, theirs in zip(state(run), state(other), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_stop_names_step_tokens_and_checkpoint(golf_run, factor):
    run = golf_run(
        fit=False, checkpoint=RunCheckpoint(every_steps=2), extra=(BadLoss(4, factor=factor),)
    )
    with pytest.raises(DivergenceError) as caught:
        run.trainer.fit(run.module, datamodule=run.data)
    message = str(caught.value)
    assert "optimizer step 4 has loss" in message
    # A step reads its 256 tokens and one for each of 4 spans.
    assert "260 tokens from token offset 780 of epoch 0" in message
    [note] = caught.value.__notes__
    assert f"of step 2: resume with --ckpt_path {run.folder / 'last.ckpt'}" in note
    saved = torch.load(run.folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(t.isfinite().all() for t in saved["current_model_state"].values())


def test_no_checkpoint_is_written_of_weights_that_are_bad(golf_run):
    run = golf_run(fit=False, checkpoint=RunCheckpoint(every_steps=1), extra=(BadLoss(3),))
    with pytest.raises(DivergenceError):
        run.trainer.fit(run.module, datamodule=run.data)
    assert torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_before_the_first_checkpoint_it_says_that_there_is_none(golf_run):
    run = golf_run(fit=False, extra=(BadLoss(1),))
    with pytest.raises(DivergenceError) as caught:
        run.trainer.fit(run.module, datamodule=run.data)
    assert caught.value.__notes__ == ["No checkpoint was written yet."]


def test_a_skipped_step_leaves_weights_and_state(golf_run):
    bad = BadLoss(3)
    with pytest.warns(UserWarning, match="optimizer step 3 .*the step was skipped"):
        run = golf_run(divergence=DivergenceGuard("skip"), extra=(bad,))
    assert torch.equal(bad.weights[2], bad.weights[1])
    assert not torch.equal(bad.weights[3], bad.weights[2])
    assert all(t.isfinite().all() for t in state(run))
    assert run.callback(DivergenceGuard).report()["bad_steps"] == [3]
    assert run.trainer.optimizers[0].state_dict()["state"][0]["step"] == 5


def test_skipping_changes_nothing_in_a_good_run(golf_run):
    assert_same(golf_run("skip", divergence=DivergenceGuard("skip")), golf_run("stop"))


def test_a_roll_back_restores_the_snapshot_and_goes_on_with_the_next_tokens(golf_run):
    bad = BadLoss(4)
    guard = DivergenceGuard("roll_back", snapshot_every_steps=2)
    with pytest.warns(UserWarning, match="rolled back to the weights of step 2"):
        run = golf_run(divergence=guard, extra=(bad,))
    assert torch.equal(bad.weights[3], bad.weights[1])
    assert run.trainer.global_step == 6
    assert all(t.isfinite().all() for t in state(run))


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_it_resumes_exactly(golf_run, action):
    def settings():
        return {
            "divergence": DivergenceGuard(action, snapshot_every_steps=4),
            "checkpoint": RunCheckpoint(every_steps=3),
            "budget": steps(8),
        }

    whole = golf_run("whole", extra=(BadLoss(2, 4, 7),), **settings())
    part = golf_run("part", fit=False, extra=(BadLoss(2, 4, 7), CrashAfter(5)), **settings())
    with pytest.raises(Crashed):
        part.trainer.fit(part.module, datamodule=part.data)
    again = golf_run(
        "again", extra=(BadLoss(2, 4, 7),), ckpt_path=part.folder / "last.ckpt", **settings()
    )
    assert_same(again, whole)
    assert again.callback(DivergenceGuard).bad_steps == [2, 4, 7]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_it_gives_up_at_the_limit(golf_run, action):
    run = golf_run(
        fit=False, divergence=DivergenceGuard(action, limit=2), extra=(BadLoss(2, 3, 4),)
    )
    with pytest.raises(DivergenceError, match=r"step 4 .*divergence.limit=2 .*2, 3"):
        run.trainer.fit(run.module, datamodule=run.data)


def test_a_lower_limit_holds_for_a_resumed_run(golf_run):
    first = golf_run(divergence=DivergenceGuard("skip"), extra=(BadLoss(2, 3, 4),))
    again = golf_run(
        "again",
        fit=False,
        divergence=DivergenceGuard("skip", limit=1),
        budget=steps(8),
        extra=(BadLoss(7),),
    )
    with pytest.raises(DivergenceError, match=r"step 7 .*divergence.limit=1 .*2, 3, 4"):
        again.trainer.fit(again.module, datamodule=again.data, ckpt_path=first.folder / "last.ckpt")


class OneBehind(DivergenceGuard):
    """Judges a step at the end of the next one, as on a GPU."""

    def _judge(self, trainer, pl_module, in_flight):
        behind = in_flight == 0 and self.in_step
        super()._judge(trainer, pl_module, 1 if behind else in_flight)

    in_step = False

    def on_train_batch_end(self, *args):
        self.in_step = True
        super().on_train_batch_end(*args)
        self.in_step = False


@pytest.mark.parametrize("every", [2, 3])
def test_a_verdict_one_step_late_does_not_reach_the_checkpoint(golf_run, every):
    run = golf_run(
        fit=False,
        divergence=OneBehind(),
        checkpoint=RunCheckpoint(every_steps=every),
        extra=(BadLoss(4),),
    )
    with pytest.raises(DivergenceError, match="optimizer step 4"):
        run.trainer.fit(run.module, datamodule=run.data)
    saved = torch.load(run.folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == {2: 2, 3: 3}[every]


def test_a_late_roll_back_takes_the_step_in_flight_along(golf_run):
    bad = BadLoss(3)
    run = golf_run(divergence=OneBehind("roll_back", snapshot_every_steps=2), extra=(bad,))
    assert torch.equal(bad.weights[3], bad.weights[1])
    assert run.callback(OneBehind).bad_steps == [3]


def test_a_value_is_read_only_when_it_has_arrived():
    class Event:
        waited = False

        def synchronize(self):
            self.waited = True

    event = Event()
    assert _Seen(1, torch.tensor([1.0, 2.0]), event).read() == (1.0, 2.0)
    assert event.waited


class Steady(torch.nn.Module):
    """A model whose loss is infinite with a finite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.logits_V = torch.nn.Parameter(torch.tensor([0.0, -3e38, 3e38]))

    def forward(self, ids_BT):
        return self.logits_V.expand(*ids_BT.shape, 3)


def test_an_infinite_loss_has_no_finite_gradient():
    gpt, ids = Steady(), torch.zeros(1, 2, dtype=torch.long)
    plain = torch.nn.functional.cross_entropy(gpt(ids).flatten(0, 1), (ids + 1).flatten())
    plain.backward()
    assert plain.isinf()
    assert gpt.logits_V.grad.isfinite().all()
    gpt.zero_grad()
    training_loss(gpt, ids, ids + 1, LossConfig(), torch.zeros(())).backward()
    assert not gpt.logits_V.grad.norm().isfinite()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"action": "ignore"}, "action"),
        ({"limit": 0}, "limit"),
        ({"snapshot_every_steps": 0}, "snap"),
    ],
)
def test_settings_out_of_range_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"divergence.{name}"):
        DivergenceGuard(**settings)
