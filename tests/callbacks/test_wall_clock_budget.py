"""The budget on a clock that the test moves: what counts, when training stops, what follows it."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import RunCheckpoint, SlidingWindowBPB, WallClockBudget, WeightAveraging
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.objective import LossConfig
from pgl.optim import Progress, ScheduleConfig
from pgl.phases import PhaseTimer

SCHEDULE = ScheduleConfig(
    warmdown_steps=None,
    warmdown_fraction=1.0,
    momentum_start=0.8,
    momentum_end=0.9,
    momentum_warmup_steps=None,
    momentum_warmup_fraction=0.5,
)


class Clock(Callback):
    """A step of four micro-batches takes one second; validating 100, saving 1000."""

    def __init__(self) -> None:
        self.time = 0.0
        self.seen: list[dict] = []

    def __call__(self) -> float:
        return self.time

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.time += 0.25

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % 4 == 0:
            optimizer = trainer.optimizers[0]
            self.seen.append(
                {
                    "scale": pl_module.lr_scale,
                    "lr": [g["lr"] / g["initial_lr"] for g in optimizer.param_groups],
                    "momentum": [
                        g["momentum"] for g in optimizer.param_groups if g["kind"] == "muon"
                    ],
                }
            )

    def on_validation_start(self, trainer, pl_module):
        self.time += 100.0

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.time += 1000.0


def budget_on(clock, **settings):
    budget = WallClockBudget(**settings)
    budget.phases = PhaseTimer(clock)
    return budget


def test_it_stops_by_seconds_and_schedules_follow(golf_run, tiny_gpt, monkeypatch):
    clock = Clock()

    def slow_warm_up(trainer, module, steps, variants):
        assert (steps, list(variants)) == (2, [])
        clock.time += 5000.0

    monkeypatch.setattr("callbacks.wall_clock_budget.warm_up", slow_warm_up)
    budget = budget_on(clock, seconds=6.0, reserve_seconds=2.5, warmup_steps=2)
    run = golf_run(
        budget=budget,
        module=GolfModule(tiny_gpt, schedule=SCHEDULE),
        validation=SlidingWindowBPB(stride_tokens=32, every_n_steps=2),
        checkpoint=RunCheckpoint(every_steps=1),
        extra=(clock,),
    )
    # The first step at or past 6 - 2.5 seconds; overshoot is less than a step.
    assert run.trainer.global_step == 4
    assert budget.elapsed == pytest.approx(4.0)
    assert 0 <= budget.elapsed - budget.training_seconds < 1.0
    phases = budget.report()["phases"]
    assert phases["train"] == {"seconds": 4.0, "counts": True}
    assert phases["compile and warm-up"] == {"seconds": 5000.0, "counts": False}
    assert phases["validation"] == {"seconds": 200.0, "counts": False}
    assert phases["checkpoint"]["seconds"] >= 4000.0
    assert not phases["checkpoint"]["counts"]
    # Step n starts with n seconds used: the learning rate falls over all 3.5 seconds.
    expected = [1 - step / 3.5 for step in range(4)]
    assert [seen["scale"] for seen in clock.seen] == pytest.approx(expected)
    for seen, scale in zip(clock.seen, expected, strict=True):
        assert seen["lr"] == pytest.approx([scale] * 3)
    momenta = [seen["momentum"] for seen in clock.seen]
    assert momenta == [[pytest.approx(0.8 + 0.1 * min(step / 1.75, 1.0))] for step in range(4)]
    assert budget.warmdown_start_step == 1


def test_it_stops_at_steps_whatever_the_clock_says(golf_run):
    run = golf_run(budget=WallClockBudget(seconds=1000.0, steps=2, warmup_steps=0))
    assert run.trainer.global_step == 2
    budget = run.callback(WallClockBudget)
    assert budget.report()["budget_steps"] == 2
    assert budget.warmdown_start_step is None or budget.warmdown_start_step < 2


def setup(budget, **trainer):
    trainer = {"max_steps": -1, "world_size": 1, "global_step": 0, **trainer}
    module = SimpleNamespace(schedule_config=SCHEDULE)
    budget.setup(SimpleNamespace(**trainer), module, "fit")
    return budget


def test_max_steps_of_the_trainer_is_the_budget_without_seconds():
    budget = setup(WallClockBudget(seconds=None), max_steps=40, global_step=10)
    assert budget.steps == 40
    assert budget.fraction == 0.25


def test_own_steps_win_over_max_steps():
    assert setup(WallClockBudget(seconds=None, steps=7), max_steps=40).steps == 7


@pytest.mark.parametrize(
    ("steps", "max_steps", "named"),
    [(7, -1, r"budget\.steps=7"), (None, 40, "trainer.max_steps=40")],
)
def test_seconds_and_steps_together_warn_that_schedules_follow_the_seconds(steps, max_steps, named):
    with pytest.warns(UserWarning, match=rf"budget\.seconds=9\.0 and {named} are both set"):
        setup(WallClockBudget(seconds=9.0, steps=steps), max_steps=max_steps)


@pytest.mark.parametrize("settings", [{"seconds": 9.0}, {"seconds": None, "steps": 7}])
def test_one_limit_does_not_warn(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup(WallClockBudget(**settings))


@pytest.mark.parametrize(
    ("seconds", "reserve", "calibration", "within"),
    [(6.0, 2.5, 3.0, True), (6.0, 2.5, 3.5, False), (6.0, 0.0, 0.0, True), (None, 0.0, 50.0, None)],
)
def test_the_report_says_whether_what_counts_fits(golf_run, seconds, reserve, calibration, within):
    # Steps take a second: with 3.5 seconds to train, the fourth step ends half a second late.
    clock = Clock()
    steps = None if seconds is not None else 4
    budget = budget_on(clock, seconds=seconds, steps=steps, reserve_seconds=reserve, warmup_steps=0)
    golf_run(budget=budget, extra=(clock,))
    with budget.phases.measure("calibrate", counts=True):
        clock.time += calibration
    with budget.phases.measure("pack"):
        clock.time += 500.0
    report = budget.report()
    trained = report["phases"]["train"]["seconds"]
    assert trained == (6.0 if reserve == 0 and seconds else 4.0)
    assert report["counted_seconds"] == pytest.approx(trained + calibration)
    assert report["within_budget"] is within


def test_a_finished_run_is_not_warmed_up_again(golf_run, monkeypatch):
    first = golf_run("first", budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0))

    def refuse(trainer, module, steps):
        raise AssertionError("warmed up with no step left")

    monkeypatch.setattr("callbacks.wall_clock_budget.warm_up", refuse)
    again = WallClockBudget(seconds=None, steps=1, warmup_steps=2)
    golf_run("again", budget=again, ckpt_path=first.folder / "last.ckpt")
    assert "compile and warm-up" not in again.report()["phases"]


def test_a_budget_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"budget\.steps"):
        setup(WallClockBudget(seconds=None))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"seconds": 0}, "budget.seconds"),
        ({"seconds": -1.0}, "budget.seconds"),
        ({"steps": 0}, "budget.steps"),
        ({"seconds": 10, "reserve_seconds": 10}, "budget.reserve_seconds"),
        ({"reserve_seconds": -1}, "budget.reserve_seconds"),
        ({"warmup_steps": -1}, "budget.warmup_steps"),
        ({"step_scale": 0.0}, "budget.step_scale"),
    ],
)
def test_bad_numbers_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        WallClockBudget(**settings)


def test_a_shorter_run_follows_a_shorter_schedule(golf_run, tiny_gpt):
    recipe = ScheduleConfig(warmdown_steps=30, momentum_warmup_steps=40)
    run = golf_run(
        module=GolfModule(tiny_gpt, schedule=recipe),
        budget=WallClockBudget(seconds=None, steps=6, warmup_steps=0, step_scale=0.1),
        validation=SlidingWindowBPB(stride_tokens=32, every_n_steps=20),
        averaging=WeightAveraging(None, source="raw"),
    )
    budget = run.callback(WallClockBudget)
    assert budget.warmdown_start_step == 4  # the last of the 3 steps at scale 1 is number 3
    assert run.trainer.val_check_interval == 2 * run.data.layout.accumulate
    assert budget.report()["step_scale"] == 0.1
    rows = json.loads((run.folder / "report.json").read_text())["techniques"]
    (row,) = [row for row in rows if row["technique"] == "shortened recipe"]
    assert row["acted"] == "warm-down 30 steps -> 3 steps; momentum warm-up 40 steps -> 4 steps"
    # What is saved is the recipe: a resumed run shortens it once, not twice.
    saved = torch.load(run.folder / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["schedule"]["warmdown_steps"] == 30
    again = golf_run("again", fit=False, budget=WallClockBudget(seconds=None, steps=6))
    assert again.module.schedule == again.module.schedule_config


class Device:
    """A device that takes two seconds for a step and the host a hundredth; events in its queue."""

    def __init__(self, clock) -> None:
        self.clock = clock
        self.free_at = 0.0
        self.waited = 0

    def step(self) -> None:
        self.clock.time += 0.01
        self.free_at = max(self.free_at, self.clock.time) + 2.0

    def event(self):
        device, done_at = self, []

        class Event:
            def record(self):
                done_at.append(device.free_at)

            def query(self):
                return device.clock.time >= done_at[0]

            def synchronize(self):
                device.waited += 1
                device.clock.time = max(device.clock.time, done_at[0])

        return Event()


def test_the_host_stays_one_step_ahead_and_ends_within_a_step_of_the_budget(monkeypatch):
    clock = Clock()
    device = Device(clock)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr("callbacks.wall_clock_budget.requested_signal", lambda trainer: 0)
    budget = setup(budget_on(clock, seconds=21.0))
    trainer = SimpleNamespace(
        global_step=0, should_stop=False, is_global_zero=True, accumulate_grad_batches=1
    )
    module = SimpleNamespace(device=torch.device("cuda"))
    budget.phases.start("train", counts=True)
    queued = []
    while not trainer.should_stop:
        device.step()
        trainer.global_step += 1
        budget.on_train_batch_end(trainer, module, None, None, trainer.global_step - 1)
        queued.append(device.free_at - clock.time)
    # From the second step on the queue holds a whole step when the host comes back.
    assert all(1.9 < seconds <= 2.01 for seconds in queued)
    assert device.waited == trainer.global_step - 1
    # 10 steps take 20 s, the 11th passes the budget; no 12th was queued behind it.
    assert trainer.global_step == 11
    assert 0 <= device.free_at - 21.0 < 2.0
    assert budget.elapsed == pytest.approx(device.free_at, abs=0.3)


def test_used_time_and_events_survive_a_checkpoint():
    clock = Clock()
    before = budget_on(clock, seconds=100.0)
    before.phases.start("train", counts=True)
    clock.time = 30.0
    before.warmdown_start_step, before.mile_end_step, before.graphs_compiled = 5, 9, 2
    after = budget_on(clock, seconds=100.0)
    after.load_state_dict(before.state_dict())
    after.phases.start("train", counts=True)
    clock.time = 32.0
    assert after.phases.seconds("train") == pytest.approx(32.0)
    assert (after.warmdown_start_step, after.mile_end_step) == (5, 9)
    assert after.report()["graphs_compiled"] == 2


def test_mile_reports_when_it_ended():
    budget = WallClockBudget(seconds=None, steps=10)
    module = SimpleNamespace(lr_scale=1.0, mile_has_ended=False, apply_progress=lambda _: None)
    budget.progress = None
    for step in range(10):
        module.mile_has_ended = step >= 7
        trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=step)
        budget.on_train_batch_start(trainer, module, None, step)
    assert budget.mile_end_step == 7


def test_warm_up_steps_really_run(golf_run, monkeypatch):
    seen = []
    step = GolfModule.training_step

    def counted(self, tokens, batch_idx):
        seen.append(tokens.shape)
        return step(self, tokens, batch_idx)

    monkeypatch.setattr(GolfModule, "training_step", counted)
    golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=3),
        averaging=WeightAveraging(None, source="raw"),
    )
    assert seen == [torch.Size([2, 33])] * (3 + 4)


def test_the_module_knows_when_mile_has_ended(monkeypatch):
    gpt = GPTConfig(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
    module = GolfModule(gpt, schedule=SCHEDULE, loss=LossConfig(mile_gamma=1.1))
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(module, "optimizers", lambda use_pl_optimizer: optimizer)
    module.apply_progress(Progress(50, 5.0, 10.0, None))
    assert not module.mile_has_ended
    assert float(module.mile_gamma) == pytest.approx(1.1 * (0.5 - 0.15) / 0.85)
    module.apply_progress(Progress(90, 9.0, 10.0, None))
    assert module.mile_has_ended
    assert float(module.mile_gamma) == 0.0
