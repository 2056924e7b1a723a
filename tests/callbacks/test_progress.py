"""What the progress bar says, in a terminal and in a log file."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from callbacks import BudgetProgress, TrainingMetrics, WallClockBudget
from callbacks.progress import track
from pgl.optim import Progress


def bar_on(terminal=False, **settings):
    bar = BudgetProgress(**settings)
    bar._console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    return bar


def shown(bar):
    return bar._console.file.getvalue()


def trainer_with(bar, seconds=100.0):
    budget, metrics = WallClockBudget(seconds=seconds, steps=40), TrainingMetrics()
    budget.elapsed = 30.0
    budget.progress = Progress(10, 30.0, seconds, 40)
    return SimpleNamespace(
        callbacks=[budget, metrics],
        accumulate_grad_batches=2,
        global_step=10,
        is_global_zero=True,
        progress_bar_callback=bar,
    )


def test_a_table_wider_than_the_console_keeps_its_rows_in_a_pipe():
    bar, row = bar_on(), f"{'mlp':<140}int6 rans"
    bar.print_lines(f"{row}\n{row}")
    assert shown(bar).splitlines() == [row, row]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_shows_time_left_step_and_loss(terminal):
    bar = bar_on(terminal, line_every_seconds=0.0)
    trainer = trainer_with(bar)
    trainer.callbacks[1].last_loss = 3.25
    bar.on_train_start(trainer, None)
    bar.on_train_batch_end(trainer, None, None, None, 0)
    bar.on_train_batch_end(trainer, None, None, None, 1)
    bar.on_train_end(trainer, None)
    text = shown(bar)
    assert "step 10  70 s left  loss 3.2500" in text
    assert "30%" in text
    assert terminal or text.count("\n") == 2  # "train ...", and one line for two micro-batches


def test_a_budget_of_steps_shows_no_seconds_and_no_loss_before_the_first_log():
    bar = bar_on(line_every_seconds=0.0)
    trainer = trainer_with(bar, seconds=None)
    bar.on_train_start(trainer, None)
    bar.on_train_batch_end(trainer, None, None, None, 1)
    assert shown(bar).rstrip().endswith("25%  step 10")


def test_lines_are_limited_in_time():
    bar = bar_on(line_every_seconds=1000.0)
    with bar.track("pack", 4) as advance:
        advance()
        bar._last_line = -1e9
        advance()
        advance()
    assert shown(bar).split() == ["pack", "...", "pack", "50%"]


def test_track_counts_units_and_shows_text():
    bar = bar_on(line_every_seconds=0.0)
    with track(SimpleNamespace(progress_bar_callback=bar), "score", 4) as advance:
        advance(3, text="ema")
    assert shown(bar).split() == ["score", "...", "score", "75%", "ema"]


def test_track_without_our_bar_is_silent():
    with track(SimpleNamespace(progress_bar_callback=None), "score", 4) as advance:
        advance(2, text="ema")


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal):
    bar = bar_on(terminal, line_every_seconds=0.0)
    trainer = trainer_with(bar)
    trainer.is_global_zero = False
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    bar.on_train_batch_end(trainer, None, None, None, 1)
    bar.print_lines("result")
    with bar.track("pack", 1) as advance:
        advance()
    assert shown(bar) == ""


def test_bars_are_gone_after_an_error():
    bar = bar_on(terminal=True)
    bar.on_train_start(trainer_with(bar), None)
    assert bar._live is not None
    bar.teardown(None, None, "fit")
    assert bar._live is None


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"progress\.line_every_seconds"):
        BudgetProgress(line_every_seconds=-1)
