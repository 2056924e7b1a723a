"""Fixtures that every test may use: golden vectors, a tiny model, a tiny dataset, clean state."""

import inspect
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before Lightning imports Triton, which decides then that kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import (
    BudgetProgress,
    DivergenceGuard,
    EMAConfig,
    GPTQExport,
    QuantizationAwareTraining,
    RandomState,
    RunCheckpoint,
    RunReport,
    SlidingWindowBPB,
    TestTimeTraining,
    TrainingMetrics,
    WallClockBudget,
    WeightAveraging,
)
from callbacks.find import find_callback
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.cli import TRAINER_DEFAULTS
from pgl.data import Shards, Text, TokenDataModule
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.trainer import GolfTrainer

C = TypeVar("C", bound=Callback)

# The models are so small that handing work to a second thread costs more than it saves.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("PGL_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
TINY_VOCAB = 320


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Load one file of golden vectors, e.g. ``golden("xsa")``; skip where it is absent."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden vectors not found: {path} (set PGL_GOLDEN to their directory)")
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture
def tiny_gpt() -> GPTConfig:
    """A model of two layers that trains in milliseconds."""
    return GPTConfig(
        vocab_size=TINY_VOCAB,
        num_layers=2,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        mlp_hidden=48,
        smear_gate=True,
        bigram_buckets=64,
        bigram_dim=8,
    )


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two hundred made-up documents in the challenge's layout, as a source."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    words = random.Random(0).choices(
        ["the", "model", "reads", "a", "byte", "and", "writes", "token", "small", "file"], k=40_000
    )
    for index in range(200):
        text = " ".join(words[index * 200 : (index + 1) * 200])
        (folder / f"{index:03d}.txt").write_text(f"{text.capitalize()}.")
    source = Text(
        [str(folder)], str(folder / "cache"), TINY_VOCAB, val_fraction=0.1, shard_tokens=20_000
    )
    source.prepare()
    corpus = source.corpus()
    return Shards(str(corpus.train_shards[0].parent), str(corpus.tokenizer_path))


@pytest.fixture
def tiny_data(tiny_corpus: Shards) -> TokenDataModule:
    """The tiny corpus as a data module: 4 micro-batches of 2 sequences of 32 tokens a step."""
    return TokenDataModule(
        tiny_corpus,
        seq_len=32,
        batch_tokens=256,
        micro_batch_tokens=64,
        spans_per_batch=4,
        val_batch_windows=8,
        max_val_tokens=400,
    )


@pytest.fixture(autouse=True)
def clean_process_state() -> Iterator[None]:
    """Leave no process group, default dtype, environment variable or compiled graph behind."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)


@dataclass
class Run:
    """A finished run, with the callbacks by their class."""

    trainer: GolfTrainer
    module: GolfModule
    data: TokenDataModule
    folder: Path

    def callback(self, kind: type[C]) -> C:
        return find_callback(self.trainer, kind)


@pytest.fixture
def golf_run(tmp_path: Path, tiny_gpt: GPTConfig, tiny_data: TokenDataModule) -> Callable[..., Run]:
    """Make (and fit, unless ``fit=False``) a tiny run with all callbacks, in steps, on the CPU.

    Keyword arguments replace callbacks by their key on the command line, or go to the Trainer.
    """

    def run(
        folder: str = "run",
        ckpt_path: str | Path | None = None,
        fit: bool = True,
        module: GolfModule | None = None,
        data: TokenDataModule | None = None,
        extra: tuple[Callback, ...] = (),
        **overrides: Any,
    ) -> Run:
        torch.manual_seed(0)
        data = data or TokenDataModule(**vars_of(tiny_data))
        module = module or GolfModule(tiny_gpt)
        keys = {
            "budget": WallClockBudget(seconds=None, steps=6, warmup_steps=0),
            "qat": QuantizationAwareTraining(),
            "averaging": WeightAveraging(EMAConfig(decay=0.5)),
            "metrics": TrainingMetrics(),
            "divergence": DivergenceGuard(),
            "artifact": GPTQExport(),
            "validation": SlidingWindowBPB(stride_tokens=8),
            "ttt": TestTimeTraining(),
            "report": RunReport(),
            "checkpoint": RunCheckpoint(),
            "random_state": RandomState(),
            "progress": BudgetProgress(),
        }
        chosen = [overrides.pop(key, callback) for key, callback in keys.items()]
        settings = {
            **TRAINER_DEFAULTS,
            "logger": TensorBoardLogger(tmp_path / folder, name="", version=""),
            "log_every_n_steps": 2,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "devices": 1,
            **overrides,
        }
        trainer = GolfTrainer(callbacks=[*chosen, *extra], plugins=[GolfCheckpointIO()], **settings)
        if fit:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return Run(trainer, module, data, tmp_path / folder)

    return run


def vars_of(data: TokenDataModule) -> dict[str, Any]:
    """Return the constructor arguments of a data module, to make a fresh one."""
    names = inspect.signature(TokenDataModule.__init__).parameters
    return {name: getattr(data, name) for name in names if name != "self"}
