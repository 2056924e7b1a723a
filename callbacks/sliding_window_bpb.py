"""The score: bits per byte of the validation text, with long context for every token."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.gptq_export import GPTQExport
from callbacks.progress import track
from callbacks.score_analysis import log_analysis
from callbacks.scores import Score, make_score, running_text, windows_name
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.data.datamodule import MAX_BATCH_WINDOWS, MAX_SEQ_LEN
from pgl.evaluate import (
    BatchScores,
    CompiledScorer,
    Probes,
    ScoreMap,
    WindowBatch,
    WindowLoader,
    evaluate_windows,
    probe,
    token_losses,
)
from pgl.evaluate.score import evaluation_mode
from pgl.evaluate.windows import Tail, sliding_windows
from pgl.optim import scaled_steps
from pgl.saved_weights import saved_weights


class SlidingWindowBPB(Callback):
    """Scores raw, averaged and quantised weights when training ends, and sets validation's windows.

    A window of ``seq_len`` tokens moves by ``stride_tokens``; only the targets it adds are scored,
    so each has at least ``seq_len - stride_tokens`` tokens of context (worth about 0.023 BPB on
    FineWeb in PR #236). Every target is scored once, on whatever number of devices.

    During training, validation is chunked: ``seq_len`` of the data module, no overlap. When
    training ends the raw and averaged weights are scored chunked, the quantised ones chunked and
    sliding. ``pgl validate`` scores with sliding windows: an artifact, or the weights of a
    checkpoint that ``weights`` names.

    Windows longer than ``model.gpt.rope_train_len`` are read with NTK-aware RoPE, so a model
    trained at 2,048 tokens may be scored at 4,096 (PR #324).

    Example::

        Trainer(callbacks=[..., SlidingWindowBPB(stride_tokens=64, every_n_steps=1000)])

    Args:
        stride_tokens: Tokens between windows; equal to ``seq_len`` for chunks.
        seq_len: Window length. None: the data module's ``seq_len``.
        batch_windows: Windows of one forward pass on one device. None: the data module's
            ``val_batch_windows``.
        tail: How the end of the text is scored: every target once, or as a PR did.
        every_n_steps: Optimizer steps between validations during training, of the full recipe: the
            budget's ``step_scale`` applies. None: only at the end.
        weights: Weights of the checkpoint that ``pgl validate`` scores: raw, ema, swa or last.
            None: those it was saved with, the averaging's ``source``.
        analysis: Write to TensorBoard where the loss falls: by position in the window, by document
            (a histogram), and the text of the worst documents.

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
        weights: str | None = None,
        analysis: bool = True,
    ) -> None:
        for name, value, most in (
            ("stride_tokens", stride_tokens, MAX_SEQ_LEN),
            ("seq_len", seq_len, MAX_SEQ_LEN),
            ("batch_windows", batch_windows, MAX_BATCH_WINDOWS),
            ("every_n_steps", every_n_steps, math.inf),
        ):
            if value is not None and not 0 < value <= most:
                raise ValueError(
                    f"validation.{name} must be positive and at most {most}, got {value}"
                )
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
        self.weights = weights
        self.analysis = analysis
        self.scores: list[Score] = []
        self.probes: Probes | None = None
        """What the final weights answered to the questions of :func:`pgl.evaluate.probe`."""
        self._map: ScoreMap | None = None
        self._weights_chosen = False
        self._validated_at_step: int | None = None
        self._interval: int | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: choose the windows, and when to validate."""
        data = trainer.datamodule
        seq_len = self.seq_len or data.seq_len
        if self.stride_tokens > seq_len:
            raise ValueError(
                f"validation.stride_tokens={self.stride_tokens} must not exceed the window of "
                f"{seq_len} tokens"
            )
        if stage != "predict":
            self._check_windows(len(data.val_tokens) - 1, seq_len)
        if stage in ("validate", "test"):
            data.val_windows = lambda: self.sliding_loader(trainer)
        elif stage == "fit":
            if self.weights is not None:
                raise ValueError(
                    "validation.weights chooses among a checkpoint's weights in pgl validate; "
                    "pgl fit scores all of them: leave it unset"
                )
            data.val_windows = None
            self._set_interval(trainer)

    def _check_windows(self, num_targets: int, seq_len: int) -> None:
        """Refuse a text that the reference forms of the tail leave out."""
        if not len(sliding_windows(num_targets, seq_len, self.stride_tokens, self.tail)):
            raise ValueError(
                f"validation.tail {self.tail} makes no window of {num_targets:,} targets: set it "
                f"to exact, or lower validation.seq_len (now {seq_len}) and "
                "validation.stride_tokens"
            )

    def _set_interval(self, trainer: pl.Trainer) -> None:
        """Let the Trainer validate when ``every_n_steps`` says."""
        # Lightning's default is a float, as 1 stands for every batch; a time lies elsewhere.
        given = getattr(trainer, "val_check_interval", "a time")
        if given != self._interval and not (isinstance(given, float) and given == 1.0):
            rank_zero_warn("trainer.val_check_interval is not used: set validation.every_n_steps")
        data, budget = trainer.datamodule, find_callback(trainer, WallClockBudget)
        self._interval = (
            data.layout.accumulate * scaled_steps(self.every_n_steps, budget.step_scale)
            if self.every_n_steps
            else len(data.train_dataloader())
        )
        trainer.val_check_interval = self._interval
        trainer._val_check_time_interval = None
        trainer.check_val_every_n_epoch = None

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint was restored: put the chosen weights into the model."""
        if self.weights is None or trainer.state.fn == TrainerFn.FITTING:
            return
        key = find_callback(trainer, WeightAveraging).state_key
        weights = saved_weights(checkpoint, key, self.weights)
        with torch.no_grad():
            for name, parameter in pl_module.gpt.named_parameters():
                parameter.copy_(weights[name])
        self._weights_chosen = True
        rank_zero_info(f"scoring the checkpoint's {self.weights} weights")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins: make room for its scores in ``pgl validate``."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        if self.weights is not None and not self._weights_chosen:
            raise ValueError(
                f"validation.weights is {self.weights} but an artifact holds one set of weights: "
                "give a checkpoint, or leave it unset"
            )
        if self.analysis:
            loader = self.sliding_loader(trainer)
            self._map = ScoreMap(loader.num_targets, loader.seq_len, pl_module.device)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: BatchScores,
        batch: WindowBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after each batch of windows."""
        if self._map is not None:
            self._map.add(batch, outputs)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation ends: remember which weights its score belongs to."""
        self._validated_at_step = trainer.global_step
        if self._map is not None:
            self._map.sum_over_ranks()
            log_analysis(trainer, self.weights or "saved", self._map)
            self._map = None

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

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
            self._keep(trainer, "raw", chunks, pl_module.last_score)
        else:
            self._score(trainer, pl_module, averaging.weights(pl_module, "raw"), "raw", chunks)
        for name in averaging.averages:
            if averaging.is_usable(name):
                weights = averaging.weights(pl_module, name)
                self._score(trainer, pl_module, weights, name, chunks)
        exported = find_callback(trainer, GPTQExport).exported
        if exported is not None:
            weights = exported.state_dict
            self._score(trainer, pl_module, weights, "quantised", chunks)
            sliding = self.sliding_loader(trainer)
            if (sliding.seq_len, sliding.stride) != (chunks.seq_len, chunks.stride):
                self._score(trainer, pl_module, weights, "quantised", sliding)

    def sliding_loader(self, trainer: pl.Trainer) -> WindowLoader:
        """Return this rank's share of the sliding windows."""
        data = trainer.datamodule
        return data.window_loader(
            self.seq_len or data.seq_len, self.stride_tokens, self.batch_windows, self.tail
        )

    def report(self) -> list[dict[str, Any]]:
        """Return the scores as plain values."""
        return [asdict(score) for score in self.scores]

    def final_score(self) -> Score | None:
        """Return the last score that is legal, the one that a run is known by."""
        return next((score for score in reversed(self.scores) if score.legal), None)

    def add(self, trainer: pl.Trainer, score: Score) -> None:
        """Keep a score, and log it; one that is not legal says so in its name."""
        self.scores.append(score)
        if trainer.logger is not None:
            windows = re.sub(r"\W+", "_", score.windows)
            key = f"final/bpb_{score.weights}_{windows}"
            trainer.logger.log_metrics({key: score.bpb}, step=trainer.global_step)

    def _score(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        name: str,
        loader: WindowLoader,
    ) -> None:
        description = f"score {name} {windows_name(loader)}"
        phases = find_callback(trainer, WallClockBudget).phases
        score_map = ScoreMap(loader.num_targets, loader.seq_len, pl_module.device)
        with (
            phases.measure(description),
            track(trainer, description, len(loader)) as advance,
            pl_module.with_weights(weights),
            trainer.precision_plugin.val_step_context(),
        ):
            result = evaluate_windows(
                pl_module.gpt,
                loader,
                pl_module.bits_per_byte,
                device=pl_module.device,
                on_batch=lambda bpb: advance(text=running_text(bpb)),
                on_scores=score_map.add,
                score=pl_module.score_batch,
            )
            pl_module.bits_per_byte.reset()
            score_map.sum_over_ranks()
            self.probes = _probe(pl_module, loader)
        if self.analysis:
            log_analysis(trainer, f"{name}_{windows_name(loader)}", score_map)
        self._keep(trainer, name, loader, result, score_map)

    def _keep(
        self,
        trainer: pl.Trainer,
        name: str,
        loader: WindowLoader,
        result: Mapping[str, Tensor],
        score_map: ScoreMap | None = None,
    ) -> None:
        self.add(trainer, make_score(name, windows_name(loader), loader, result, score_map))


def _probe(pl_module: pl.LightningModule, loader: WindowLoader) -> Probes | None:
    """Ask the model about the first window, and about batches of the shape that was scored.

    None where a window is one target: there is nothing before it.
    """
    window_targets = min(loader.seq_len, loader.num_targets)
    if window_targets < 2:
        return None
    scorer = pl_module.score_batch
    in_batches = loader.num_bulk_batches > 0 and loader.stride > 1
    with evaluation_mode(pl_module.gpt):
        return probe(
            pl_module.gpt,
            loader.tokens_N[: window_targets + 1],
            pl_module.gpt_config.vocab_size,
            losses=scorer.losses if isinstance(scorer, CompiledScorer) else token_losses,
            last=loader.stride if in_batches else None,
            batch_windows=loader.batch_windows,
        )
