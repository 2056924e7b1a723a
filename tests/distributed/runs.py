"""Tiny fits that several processes can make, with everything of a run worth comparing."""

import hashlib
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

import callbacks
from pgl.artifact import Packed
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.cli import TRAINER_DEFAULTS
from pgl.data import Shards, TokenDataModule
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

VOCAB = 320
TARGETS = 399
TIME_LIMIT_SECONDS = 120

rank_environment: dict[str, str] = {}
"""What tells a rank its place; Lightning deletes part of it after each fit."""


class Recorder(Callback):
    """Notes what each optimizer step saw: its rows of tokens, loss, learning rates and clock.

    And how often a step made its device wait for a broadcast, Lightning's or DDP's.
    """

    BROADCASTS = ("broadcast", "_broadcast_coalesced")

    def __init__(self) -> None:
        self.broadcasts = 0
        self.rows: list[list[list[int]]] = []
        self.losses: list[float] = []
        self.steering: list[list[float]] = []
        self._originals: dict[str, Callable[..., Any]] = {}
        self._rows: list[list[int]] = []

    def on_train_start(self, trainer, pl_module):
        self._originals = {name: getattr(dist, name) for name in self.BROADCASTS}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(original))

    def on_train_epoch_end(self, trainer, pl_module):
        self._restore()

    def on_exception(self, trainer, pl_module, exception):
        self._restore()

    def _restore(self) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.broadcasts += 1
            return original(*args, **kwargs)

        return counted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._rows += batch.tolist()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.rows.append(self._rows)
        self._rows = []
        loss = torch.stack(pl_module.step_losses).mean()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        budget = trainer.callbacks[0]
        assert isinstance(budget, callbacks.WallClockBudget)
        self.steering.append([*rates, budget.elapsed, budget.fraction])


@dataclass
class Fit:
    """One fit: its Trainer and what was noted."""

    folder: Path
    trainer: GolfTrainer
    module: GolfModule
    data: TokenDataModule
    recorder: Recorder = field(default_factory=Recorder)
    artifacts_written: int = 0
    error: BaseException | None = None

    def callback(self, kind: type) -> Any:
        return next(c for c in self.trainer.callbacks if isinstance(c, kind))

    def state(self) -> dict[str, Any]:
        """Return weights, optimizer state and averages, as nested containers of tensors.

        All ranks must call it: each keeps a part of the optimizer's state.
        """
        self.trainer.optimizers[0].consolidate_state_dict()
        return {
            "weights": self.module.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "averages": self.callback(callbacks.WeightAveraging).state_dict(),
        }

    def times_scored(self) -> dict[str, np.ndarray]:
        """Return how often this rank scores each target, by kind of windows."""
        validation = self.callback(callbacks.SlidingWindowBPB)
        loaders = {
            "chunked": self.data.chunk_loader(),
            "sliding": validation.sliding_loader(self.trainer),
        }
        counts = {}
        for name, loader in loaders.items():
            counts[name] = np.zeros(TARGETS, dtype=int)
            for _, end, first in [*loader.single_windows_W3, *loader.bulk_windows_W3]:
                counts[name][first:end] += 1
        return counts

    def summary(self) -> dict[str, Any]:
        """Return all of it as plain values and tensors."""
        exported = self.callback(callbacks.GPTQExport).exported
        report = self.folder / "report.json"
        return {
            "error": self.error and f"{type(self.error).__name__}: {self.error}",
            "step": self.trainer.global_step,
            "state": self.state(),
            "digest": digest(self.state()),
            "rows": self.recorder.rows,
            "broadcasts": self.recorder.broadcasts,
            "losses": self.recorder.losses,
            "steering": self.recorder.steering,
            "elapsed": self.callback(callbacks.WallClockBudget).elapsed,
            "scores": self.callback(callbacks.SlidingWindowBPB).report(),
            "times_scored": {k: torch.from_numpy(v) for k, v in self.times_scored().items()},
            "artifacts_written": self.artifacts_written,
            "read_back": exported and digest(exported.state_dict),
            "report": json.loads(report.read_text()) if report.is_file() else None,
        }


def tiny_model_and_data(
    source: tuple[str, str], batch_tokens: int
) -> tuple[GolfModule, TokenDataModule]:
    gpt = GPTConfig(
        vocab_size=VOCAB,
        num_layers=2,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        mlp_hidden=48,
        smear_gate=True,
        bigram_buckets=64,
        bigram_dim=8,
    )
    data = TokenDataModule(
        Shards(*source),
        seq_len=32,
        batch_tokens=batch_tokens,
        micro_batch_tokens=64,
        spans_per_batch=4,
        val_batch_windows=8,
        max_val_tokens=TARGETS + 1,
    )
    return GolfModule(gpt), data


def fit(
    folder: Path,
    source: tuple[str, str],
    ckpt_path: Path | None = None,
    extra: tuple[Callback, ...] = (),
    batch_tokens: int = 256,
    strategy: str = "ddp",
    expected: tuple[type[BaseException], ...] = (),
    **overrides: Any,
) -> Fit:
    """Fit the tiny GPT in as many processes as were started.

    ``overrides`` replace callbacks by their key; ``expected`` errors are kept, others are raised.
    """
    torch.manual_seed(0)
    module, data = tiny_model_and_data(source, batch_tokens)
    recorder = Recorder()
    keys = {
        "budget": callbacks.WallClockBudget(seconds=None, steps=6, warmup_steps=0),
        "ranks": callbacks.RankWatch(timeout_seconds=60),
        "qat": callbacks.QuantizationAwareTraining(),
        "averaging": callbacks.WeightAveraging(callbacks.EMAConfig(decay=0.5)),
        "metrics": callbacks.TrainingMetrics(),
        "divergence": callbacks.DivergenceGuard(),
        "artifact": callbacks.GPTQExport(),
        "validation": callbacks.SlidingWindowBPB(stride_tokens=8),
        "ttt": callbacks.TestTimeTraining(),
        "report": callbacks.RunReport(),
        "checkpoint": callbacks.RunCheckpoint(),
        "random_state": callbacks.RandomState(),
        "progress": callbacks.BudgetProgress(),
    }
    chosen = [overrides.pop(key, callback) for key, callback in keys.items()]
    assert not overrides, overrides
    os.environ.update(rank_environment)
    devices = int(rank_environment.get("WORLD_SIZE", 1))
    settings = {
        **TRAINER_DEFAULTS,
        "logger": TensorBoardLogger(folder.parent, name=folder.name, version=""),
        "log_every_n_steps": 2,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy if devices > 1 else "auto",
    }
    trainer = GolfTrainer(
        callbacks=[*chosen, recorder, *extra], plugins=[GolfCheckpointIO()], **settings
    )
    run = Fit(folder, trainer, module, data, recorder)
    with counted_artifacts(run):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except expected as error:
            run.error = error
    return run


class counted_artifacts:
    """Count in a fit how many artifacts this process writes."""

    def __init__(self, run: Fit) -> None:
        self.run = run

    def __enter__(self) -> None:
        self._write = Packed.write

        def write(*args: Any, **kwargs: Any) -> Any:
            self.run.artifacts_written += 1
            return self._write(*args, **kwargs)

        Packed.write = write

    def __exit__(self, *error: object) -> None:
        Packed.write = self._write


def digest(tree: Any) -> str:
    """Return the SHA-256 of nested containers of tensors and numbers, bit for bit."""
    hasher = hashlib.sha256()
    for path, leaf in leaves(tree):
        hasher.update(path.encode())
        if isinstance(leaf, torch.Tensor):
            hasher.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            hasher.update(repr(leaf).encode())
    return hasher.hexdigest()


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of everything that is no container."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, tree


def start(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """Start a process that has pgl imported already, forked off a server that did nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgl.cli"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def exit_codes(processes: list[multiprocessing.Process]) -> list[int | None]:
    """Wait for processes, at most the time limit, and end those that hang (None)."""
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def in_ranks(world_size: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """Run ``target(*args)`` as so many ranks of one job; return their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(_rank, rank, world_size, port, target, args) for rank in range(world_size)]
    return exit_codes(processes)


def _rank(
    rank: int, world_size: int, port: int, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    rank_environment.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world_size),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    target(*args)
