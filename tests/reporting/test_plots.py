import builtins

import pytest
from torch.utils.tensorboard import SummaryWriter

from pgl.reporting import group_runs, read_runs
from pgl.reporting.plots import _curve, _scalars, without_replays, write_plots


def log_curves(folder):
    with SummaryWriter(folder) as writer:
        for step in (2, 4, 6):
            writer.add_scalar("train/loss", 7 - step, step)
            writer.add_scalar("by_seconds/train/loss", 7 - step, step // 2)
        writer.add_scalar("val/bpb", 1.5, 6)


def test_every_curve_that_was_logged_becomes_a_picture(make_run, tmp_path):
    for folder in (make_run("a", 1), make_run("a", 2), make_run("b", 1, finished=False)):
        log_curves(folder)
    runs = read_runs([tmp_path])
    written = write_plots(group_runs(runs), runs[-1:], tmp_path / "plots")
    # val/bpb by seconds was not logged.
    names = ["loss_by_steps", "loss_by_seconds", "loss_by_tokens", "bpb_by_steps", "bpb_by_tokens"]
    assert [path.stem for path in written] == names
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_axes_are_steps_seconds_and_tokens(make_run):
    folder = make_run("a", 1)
    log_curves(folder)
    (run,) = read_runs([folder])
    scalars = _scalars(run)
    assert _curve(run, scalars, "train/loss", "steps").x == [2, 4, 6]
    assert _curve(run, scalars, "train/loss", "steps").y == [5, 3, 1]
    assert _curve(run, scalars, "train/loss", "seconds").x == [1, 2, 3]
    tokens = _curve(run, scalars, "train/loss", "tokens").x
    assert tokens == pytest.approx([2 * 256e-6, 4 * 256e-6, 6 * 256e-6])


def test_what_a_resumed_run_repeats_is_drawn_once():
    points = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0), (3, 5.0), (3, 4.0), (4, 3.0)]
    assert without_replays(points) == [(1, 9.0), (2, 6.0), (3, 4.0), (4, 3.0)]


def test_runs_without_events_are_refused(make_run, tmp_path):
    make_run("a", 1)
    with pytest.raises(ValueError, match="no run has TensorBoard events"):
        write_plots(group_runs(read_runs([tmp_path])), [], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_without_matplotlib_the_command_to_install_it_is_named(make_run, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    make_run("a", 1)
    with pytest.raises(ValueError, match="--plots needs matplotlib: pip install"):
        write_plots(group_runs(read_runs([tmp_path])), [], tmp_path / "plots")
