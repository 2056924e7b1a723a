"""The score: bits per byte of the validation text, with long context for every token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.gptq_export import GPTQExport
from callbacks.progress import track
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.evaluate import WindowLoader, evaluate_windows
from pgl.evaluate.windows import Tail


@dataclass(frozen=True)
class Score:
    """One score of one set of weights."""

    weights: str
    """Which weights: raw, ema, swa or quantised."""
    windows: str
    """How they were scored: chunked or sliding."""
    bpb: float
    """Bits per byte."""
    loss: float
    """Nats per token."""
    tokens: int
    """Targets scored, each once."""
    bytes: int
    """Bytes of those targets."""


class SlidingWindowBPB(Callback):
    """Scores raw, averaged and quantised weights when training ends, and sets validation's windows.

    A window of ``seq_len`` tokens moves by ``stride_tokens``; only the targets it adds are scored,
    so each has at least ``seq_len - stride_tokens`` tokens of context (worth about 0.023 BPB on
    FineWeb in PR #236). Every target is scored once, on whatever number of devices.

    During training, validation is chunked: ``seq_len`` of the data module, no overlap. When
    training ends the raw and averaged weights are scored chunked, the quantised ones chunked and
    sliding. ``pgl validate`` scores with sliding windows.

    Example::

        Trainer(callbacks=[..., SlidingWindowBPB(stride_tokens=64, every_n_steps=1000)])

    Args:
        stride_tokens: Tokens between windows; equal to ``seq_len`` for chunks.
        seq_len: Window length. None: the data module's ``seq_len``.
        batch_windows: Windows of one forward pass. None: the data module's ``val_batch_windows``.
        tail: How the end of the text is scored: every target once, or as a PR did.
        every_n_steps: Optimizer steps between validations during training. None: only at the end.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        stride_tokens: int = 64,
        seq_len: int | None = None,
        batch_windows: int | None = None,
        tail: Tail = "exact",
        every_n_steps: int | None = None,
    ) -> None:
        for name, value in (
            ("stride_tokens", stride_tokens),
            ("seq_len", seq_len),
            ("batch_windows", batch_windows),
            ("every_n_steps", every_n_steps),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"validation.{name} must be positive, got {value}")
        if seq_len is not None and stride_tokens > seq_len:
            raise ValueError(
                f"validation.stride_tokens={stride_tokens} must not exceed "
                f"validation.seq_len={seq_len}"
            )
        self.stride_tokens = stride_tokens
        self.seq_len = seq_len
        self.batch_windows = batch_windows
        self.tail: Tail = tail
        self.every_n_steps = every_n_steps
        self.scores: list[Score] = []
        self._validated_at_step: int | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: choose the windows, and when to validate."""
        data = trainer.datamodule
        if self.stride_tokens > (self.seq_len or data.seq_len):
            raise ValueError(
                f"validation.stride_tokens={self.stride_tokens} must not exceed the window of "
                f"{self.seq_len or data.seq_len} tokens"
            )
        if stage in ("validate", "test"):
            data.val_windows = lambda: self.sliding_loader(trainer)
        elif stage == "fit":
            data.val_windows = None
            trainer.check_val_every_n_epoch = None
            trainer.val_check_interval = (
                data.layout.accumulate * self.every_n_steps
                if self.every_n_steps
                else len(data.train_dataloader())
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation ends: remember which weights its score belongs to."""
        self._validated_at_step = trainer.global_step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends, after the export: score what there is."""
        data = trainer.datamodule
        averaging = find_callback(trainer, WeightAveraging)
        chunks = data.chunk_loader()
        whole = len(data.val_tokens) - 1
        validated = self._validated_at_step == trainer.global_step
        if validated and pl_module.last_score["tokens"] == whole:
            # Lightning has just validated these very weights, in chunks.
            self._keep(trainer, "raw", "chunked", pl_module.last_score)
        else:
            self._score(trainer, pl_module, averaging.weights(pl_module, "raw"), "raw", chunks)
        for name, average in averaging.averages.items():
            if average.count > 0:
                weights = averaging.weights(pl_module, name)
                self._score(trainer, pl_module, weights, name, chunks)
        exported = find_callback(trainer, GPTQExport).exported
        if exported is not None:
            weights = exported.state_dict
            self._score(trainer, pl_module, weights, "quantised", chunks)
            if self.stride_tokens < (self.seq_len or data.seq_len):
                sliding = self.sliding_loader(trainer)
                self._score(trainer, pl_module, weights, "quantised", sliding, sliding=True)

    def sliding_loader(self, trainer: pl.Trainer) -> WindowLoader:
        """Return this rank's share of the sliding windows."""
        data = trainer.datamodule
        return data.window_loader(
            self.seq_len or data.seq_len, self.stride_tokens, self.batch_windows, self.tail
        )

    def report(self) -> list[dict[str, Any]]:
        """Return the scores as plain values."""
        return [score.__dict__ for score in self.scores]

    def _score(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        name: str,
        loader: WindowLoader,
        sliding: bool = False,
    ) -> None:
        windows = "sliding" if sliding else "chunked"
        phases = find_callback(trainer, WallClockBudget).phases
        with (
            phases.measure(f"score {name} {windows}"),
            track(trainer, f"score {name} {windows}", len(loader)) as advance,
            pl_module.with_weights(weights),
            trainer.precision_plugin.val_step_context(),
        ):
            result = evaluate_windows(
                pl_module.gpt,
                loader,
                pl_module.bits_per_byte,
                device=pl_module.device,
                on_batch=lambda _: advance(),
                score=pl_module.score_batch,
            )
            pl_module.bits_per_byte.reset()
        self._keep(trainer, name, windows, result)

    def _keep(
        self, trainer: pl.Trainer, name: str, windows: str, result: Mapping[str, Tensor]
    ) -> None:
        score = Score(
            name,
            windows,
            bpb=float(result["bpb"]),
            loss=float(result["loss"]),
            tokens=int(result["tokens"]),
            bytes=int(result["bytes"]),
        )
        self.scores.append(score)
        if trainer.logger is not None:
            key = f"final/bpb_{name}_{windows}"
            trainer.logger.log_metrics({key: score.bpb}, step=trainer.global_step)
