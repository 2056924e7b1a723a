"""When ``last.ckpt`` is written, and that a failed write leaves the one before."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import RunCheckpoint, WallClockBudget
from pgl.phases import PhaseTimer


class Saves(Callback):
    """One second a step; notes when checkpoints are made."""

    def __init__(self) -> None:
        self.time = 0.0
        self.steps: list[int] = []

    def __call__(self) -> float:
        return self.time

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.time += 0.25

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [5]),
        ({"every_steps": 2}, [2, 4, 5]),
        ({"every_seconds": 1.5}, [2, 4, 5]),
        ({"every_seconds": 100.0}, [5]),
    ],
)
def test_it_saves_at_its_interval_and_at_the_end(golf_run, settings, steps):
    saves = Saves()
    budget = WallClockBudget(seconds=None, steps=5, warmup_steps=0)
    budget.phases = PhaseTimer(saves)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = golf_run(budget=budget, checkpoint=RunCheckpoint(**settings), extra=(saves,))
    assert saves.steps == steps
    assert [path.name for path in run.folder.glob("*.ckpt")] == ["last.ckpt"]


def test_a_failed_write_leaves_the_checkpoint_before(golf_run, monkeypatch):
    run = golf_run(budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0))
    path = run.folder / "last.ckpt"
    before, names = path.read_bytes(), set(run.folder.iterdir())

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert set(run.folder.iterdir()) == names


def test_resuming_in_another_folder_with_another_interval_does_not_warn(golf_run):
    first = golf_run("first", budget=WallClockBudget(seconds=None, steps=2, warmup_steps=0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The dirpath has changed")
        again = golf_run(
            "again",
            budget=WallClockBudget(seconds=None, steps=4, warmup_steps=0),
            checkpoint=RunCheckpoint(every_steps=1),
            ckpt_path=first.folder / "last.ckpt",
        )
    assert (again.folder / "last.ckpt").is_file()
    assert torch.load(again.folder / "last.ckpt", weights_only=True)["global_step"] == 4


class Deferring(Callback):
    """Notes whether a signal would wait for the end of a step."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen["step"] = trainer._signal_connector.deferred

    def on_train_end(self, trainer, pl_module):
        self.seen["end"] = trainer._signal_connector.deferred


def test_signals_act_at_once_when_a_finished_run_is_resumed(golf_run):
    first, again = Deferring(), Deferring()
    run = golf_run("first", budget=one_step(), extra=(first,))
    golf_run("again", budget=one_step(), extra=(again,), ckpt_path=run.folder / "last.ckpt")
    assert first.seen == {"step": True, "end": False}
    assert again.seen == {"end": False}


def one_step():
    return WallClockBudget(seconds=None, steps=1, warmup_steps=0)


def test_two_intervals_are_refused():
    with pytest.raises(ValueError, match=r"every_steps and checkpoint\.every_seconds are both set"):
        RunCheckpoint(every_steps=1, every_seconds=1.0)


@pytest.mark.parametrize("name", ["every_steps", "every_seconds"])
def test_intervals_must_be_positive(name):
    with pytest.raises(ValueError, match=f"checkpoint.{name} must be positive"):
        RunCheckpoint(**{name: 0})
