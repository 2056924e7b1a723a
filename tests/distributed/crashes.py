"""Runs of the command line that die, or get a signal, at a chosen moment."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from runs import digest, rank_environment

import callbacks
import pgl.io
from callbacks import gptq_export, sliding_window_bpb
from pgl.artifact import load
from pgl.cli import main
from pgl.trainer import GolfTrainer

STEPS = 8

PHASES: dict[str, tuple[Any, str]] = {
    "training": (callbacks.WallClockBudget, "on_train_batch_start"),
    "validation": (callbacks.WallClockBudget, "on_validation_start"),
    "checkpointing": (GolfTrainer, "save_checkpoint"),
    "calibration": (gptq_export, "calibrate"),
    "packing": (gptq_export, "pack_model"),
}
"""What is called when a phase begins: its owner and name."""


def write_config(
    path: Path, source: tuple[str, str], steps: int = STEPS, every: int = 2, **more: Any
) -> Path:
    """Write the configuration of a tiny run that keeps its files beside the configuration.

    ``more`` replaces whole sections.
    """
    config = {
        "model": {
            "gpt": {
                "vocab_size": 320,
                "num_layers": 2,
                "model_dim": 32,
                "num_heads": 2,
                "num_kv_heads": 1,
                "mlp_hidden": 48,
            }
        },
        "data": {
            "source": {
                "class_path": "pgl.data.Shards",
                "init_args": {"directory": source[0], "tokenizer_path": source[1]},
            },
            "seq_len": 32,
            "batch_tokens": 256,
            "micro_batch_tokens": 64,
            "spans_per_batch": 4,
            "val_batch_windows": 8,
            "max_val_tokens": 400,
        },
        "budget": {"seconds": None, "steps": steps, "warmup_steps": 0},
        "averaging": {"ema": {"decay": 0.5}},
        "checkpoint": {"every_steps": every},
        "validation": {"stride_tokens": 8},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {
                    "save_dir": str(path.parent / path.stem),
                    "name": "",
                    "version": "",
                    "default_hp_metric": False,
                },
            },
        },
    }
    path.write_text(yaml.safe_dump({**config, **more}))
    return path


def arguments(config: Path) -> list[str]:
    """Return the command line that starts the run, or continues it where there is a checkpoint."""
    checkpoint = config.parent / config.stem / "last.ckpt"
    resume = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
    return ["fit", "--config", str(config), *resume]


def run(config: Path, moment: str | None = None, *details: Any) -> None:
    """Run the command line; ``moment`` names a function of this module that prepares the end."""
    torch.set_num_threads(1)
    if moment is not None:
        globals()[moment](*details)
    main(arguments(config))


def run_rank(command: list[str], signals: dict[int, tuple[int, int]]) -> None:
    """Run a command line as one rank of a job.

    Args:
        command: The command line.
        signals: By rank, the step within which it gets a signal, and which.
    """
    torch.set_num_threads(1)
    os.environ.update(rank_environment)
    rank = int(rank_environment["LOCAL_RANK"])
    if rank in signals:
        in_step(*signals[rank])
    main(command)


def run_killed(config: Path, rank: int | None, phase: str, entry: int, seconds: float) -> None:
    """Run the command line as one rank of a job, of which ``rank`` dies within a phase.

    It dies so many seconds after the phase, a key of :data:`PHASES`, is entered for the
    ``entry``-th time. None: nobody dies.
    """
    torch.set_num_threads(1)
    os.environ.update(rank_environment)
    if rank == int(rank_environment.get("LOCAL_RANK", 0)):
        owner, name = PHASES[phase]
        _at_call(owner, name, entry, lambda *args: after(seconds))
    main(arguments(config))


def outcome(config: Path) -> dict[str, Any]:
    """Return what a run must have come to, however often it was interrupted."""
    folder = config.parent / config.stem
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    parts = {
        "step": checkpoint["global_step"],
        "raw": digest(checkpoint["current_model_state"]),
        "model": digest(checkpoint["state_dict"]),
        "optimizer": digest(checkpoint["optimizer_states"]),
        "averages": digest(checkpoint["callbacks"]["WeightAveraging"]),
        "counters": digest(_counters(checkpoint)),
        "random": digest(checkpoint["callbacks"]["RandomState"]),
    }
    if (folder / "report.json").exists():
        report = yaml.safe_load((folder / "report.json").read_text())
        # Targets are not counted where Lightning has just scored the same weights.
        counted = ("repeated", "missed")
        parts["scores"] = [
            {key: value for key, value in score.items() if key not in counted}
            for score in report["scores"]
        ]
        parts["artifact"] = digest(load(folder / "model.pgl").state_dict)
    return parts


def _counters(checkpoint: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many micro-batches were begun and processed.

    Not how many were completed: by one less if last.ckpt was written behind the last step and the
    run died before it was written again at the end, as a run without steps left does not.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return {
        counts: {event: progress[counts][event] for event in ("ready", "started", "processed")}
        for counts in ("total", "current")
    }


def in_step(step: int, *signals: int) -> None:
    """Get signals within an optimizer step, after one of its micro-batches."""

    def act(self: Any, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        if divmod(index, trainer.accumulate_grad_batches) == (step, 0):
            for signum in signals:
                os.kill(os.getpid(), signum)

    _before(callbacks.WallClockBudget, "on_train_batch_end", act)


def before_rename(count: int) -> None:
    """Die when so many files are complete but for their name."""
    _at_call(pgl.io.os, "replace", count, _die)


def at_phase(phase: str, entry: int) -> None:
    """Die where a phase, a key of :data:`PHASES`, is entered for the ``entry``-th time."""
    _at_call(*PHASES[phase], entry, _die)


def in_write(count: int) -> None:
    """Die when half of the checkpoint number ``count`` is on disk."""

    def act(checkpoint: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half a checkpoint")
        file.flush()
        _die()

    _at_call(torch, "save", count, act)


def in_quantising() -> None:
    """Die when the weights are about to be quantised."""
    _at_call(gptq_export, "StateQuantizer", 1, _die)


def before_reading_back() -> None:
    """Die when the artifact is written but not read back."""
    _at_call(gptq_export, "load", 1, _die)


def in_scoring(signum: int = signal.SIGKILL) -> None:
    """Get a signal when the second set of weights is scored, in place of the module's own."""
    _at_call(
        sliding_window_bpb,
        "evaluate_windows",
        2,
        lambda *args, **kwargs: os.kill(os.getpid(), signum),
    )


def after(seconds: float) -> None:
    """Die so many seconds from now, whatever is going on then."""
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _at_call(owner: Any, name: str, count: int, act: Callable[..., None]) -> None:
    calls = []

    def act_then(*args: Any) -> None:
        calls.append(None)
        if len(calls) == count:
            act(*args)

    _before(owner, name, act_then)
