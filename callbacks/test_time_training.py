"""Learn from the validation text: legally from what has been scored, or as PR #388 did."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.gptq_export import GPTQExport
from callbacks.progress import print_lines, track
from callbacks.scores import Score, make_score, running_text, windows_name
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.compiled import compiled_copy
from pgl.evaluate import (
    BitsPerByte,
    ChunkRecord,
    FullTTTConfig,
    RunningBPB,
    ScoreMap,
    TTTConfig,
    WindowLoader,
    evaluate_windows,
    restored_weights,
    score_first_ttt,
    sequence_loss,
    train_on_all,
)
from pgl.evaluate.adapt import check_fills_sequence

Method = Literal["off", "score_first", "full"]

LABELS = {"score_first": "TTT score-first", "full": "TTT before scoring: not legal"}
KEYS = {"score_first": "bpb_ttt_score_first", "full": "bpb_ttt_full_not_legal"}


@dataclass
class TTTEvidence:
    """What test-time training did, for the report."""

    method: str
    trained_targets: int = 0
    """Targets of the validation text that were trained on."""
    chunks: int = 0
    """Stretches that were scored, each with one state of the weights."""
    scored_first: bool = True
    """Whether each target was scored before it was trained on, and no weight changed meanwhile."""


class TestTimeTraining(Callback):
    """Scores the exported weights once more while they are trained on the validation text.

    ``score_first`` (PR #549) scores a chunk, then trains on it, then goes on: legal, as no weight
    has heard of a target when it is scored. ``full`` (PR #388) trains on all of the text before any
    of it is scored: against the rules, so it needs ``allow_illegal`` and its score is marked
    "not legal" wherever it appears.

    Runs at the end of ``pgl fit`` on the quantised weights, and after ``pgl validate`` and ``pgl
    test`` on those of ``ckpt_path``, with the windows of :class:`callbacks.SlidingWindowBPB`. Work
    is shared out over the processes. The weights are put back afterwards, and no file is touched.

    Note:
        Measured in PR #549: -0.0025 bits per byte on weights quantised by percentile search, and
        nothing on those of GPTQ (PR #593). What ``full`` gained was not measured.

    Example::

        Trainer(callbacks=[..., SlidingWindowBPB(), TestTimeTraining("score_first"), RunReport()])

    Args:
        method: off, score_first or full.
        allow_illegal: Must be true for ``full``.
        score_first: How ``score_first`` trains.
        full: How ``full`` trains.

    Raises:
        ValueError: If ``full`` is chosen without ``allow_illegal``.
    """

    __test__ = False  # pytest takes a class of this name for tests

    def __init__(
        self,
        method: Method = "off",
        allow_illegal: bool = False,
        score_first: TTTConfig = TTTConfig(),
        full: FullTTTConfig = FullTTTConfig(),
    ) -> None:
        if method == "full" and not allow_illegal:
            raise ValueError(
                "ttt.method full trains on the validation text before scoring it, which breaks "
                "the challenge's rules: set ttt.allow_illegal to true to get such a score, marked "
                "as not legal, or use score_first"
            )
        self.method: Method = method
        self.allow_illegal = allow_illegal
        self.score_first = score_first
        self.full = full
        self.evidence: TTTEvidence | None = None
        """What was done; None if nothing was."""
        self._loss = sequence_loss

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: compile the training step where the module is compiled."""
        if self.method != "off":
            self._check_frozen_blocks(pl_module.gpt_config.num_layers)
            if stage != "predict":
                self._check_lengths(trainer)
        if self.method == "full":
            rank_zero_warn("ttt.method full: the score that it gives is not legal")
        if self.method != "off" and pl_module.compile_model and self._loss is sequence_loss:
            self._loss = compiled_copy(sequence_loss)

    def _check_frozen_blocks(self, num_layers: int) -> None:
        config = self.full if self.method == "full" else self.score_first
        if config.freeze_blocks > num_layers:
            raise ValueError(
                f"ttt.{self.method}.freeze_blocks is {config.freeze_blocks} but the model has "
                f"{num_layers} blocks: lower it"
            )

    def _check_lengths(self, trainer: pl.Trainer) -> None:
        data = trainer.datamodule
        seq_len = find_callback(trainer, SlidingWindowBPB).seq_len or data.seq_len
        if self.method == "full":
            check_fills_sequence(len(data.val_tokens) - 1, seq_len)
        else:
            self.score_first.check_sequence(seq_len)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends, after everything was scored as it is."""
        if self.method == "off":
            return
        exported = find_callback(trainer, GPTQExport).exported
        if exported is not None:
            name, weights = "quantised", exported.state_dict
        else:
            averaging = find_callback(trainer, WeightAveraging)
            name, weights = averaging.source, averaging.source_weights(pl_module)
        with pl_module.with_weights(weights):
            score = self._run(trainer, pl_module, name)
        find_callback(trainer, SlidingWindowBPB).add(trainer, score)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when ``pgl validate`` has scored the weights as they are."""
        self._after_evaluation(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when ``pgl test`` has scored the weights as they are."""
        self._after_evaluation(trainer, pl_module, "test")

    def report(self) -> dict[str, Any]:
        """Return what was done, as plain values; empty if nothing was."""
        return {} if self.evidence is None else dict(vars(self.evidence))

    def _after_evaluation(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str
    ) -> None:
        if self.method == "off" or trainer.state.fn == TrainerFn.FITTING:
            return
        # Sums made under inference_mode, where a Trainer may be, could not be added to in training.
        with torch.inference_mode(False):
            score = self._run(trainer, pl_module, "given")
        # Every rank has the sum of all ranks: the mean is the value itself.
        bpb = torch.tensor(score.bpb, dtype=torch.float64, device=pl_module.device)
        pl_module.log(f"{split}/{KEYS[self.method]}", bpb, sync_dist=True)
        print_lines(trainer, f"{score.windows}: {score.bpb:.6f} bits/byte")

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Score:
        validation = find_callback(trainer, SlidingWindowBPB)
        loader = validation.sliding_loader(trainer)
        score_map = ScoreMap(loader.num_targets, loader.seq_len, pl_module.device)
        label = f"{windows_name(loader)}, {LABELS[self.method]}"
        self.evidence = TTTEvidence(self.method)
        with (
            find_callback(trainer, WallClockBudget).phases.measure(f"score {name} {label}"),
            restored_weights(pl_module.gpt),
        ):
            # A metric of its own: the module's is about to report the score without training.
            metric = BitsPerByte(trainer.datamodule.byte_table).to(pl_module.device)
            if self.method == "score_first":
                result = self._score_first(trainer, pl_module, loader, metric, score_map)
            else:
                result = self._train_first(trainer, pl_module, loader, metric, score_map)
            score_map.sum_over_ranks()
        return make_score(name, label, loader, result, score_map, legal=self.evidence.scored_first)

    def _score_first(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: WindowLoader,
        metric: BitsPerByte,
        score_map: ScoreMap,
    ) -> Mapping[str, Tensor]:
        evidence = self.evidence
        assert evidence is not None
        validation = find_callback(trainer, SlidingWindowBPB)
        running = RunningBPB(metric)
        num_chunks = -(-loader.num_targets // self.score_first.chunk_tokens)
        with track(trainer, "test-time training", num_chunks) as advance:

            def keep(record: ChunkRecord) -> None:
                evidence.chunks += 1
                evidence.trained_targets += record.trained_targets
                evidence.scored_first &= record.scored_first
                advance(text=running_text(running.read()))

            return score_first_ttt(
                pl_module.gpt,
                loader.tokens_N,
                metric,
                self.score_first,
                seq_len=loader.seq_len,
                stride=loader.stride,
                tail=validation.tail,
                batch_windows=loader.batch_windows,
                device=pl_module.device,
                autocast_dtype=_autocast_dtype(trainer, pl_module),
                on_chunk=keep,
                on_scores=score_map.add,
                score=pl_module.score_batch,
                loss=self._loss,
            )

    def _train_first(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: WindowLoader,
        metric: BitsPerByte,
        score_map: ScoreMap,
    ) -> Mapping[str, Tensor]:
        num_seqs = loader.num_targets // loader.seq_len
        steps = self.full.epochs * -(-num_seqs // self.full.batch_seqs)
        with track(trainer, "train on the validation text", steps) as advance:
            train_on_all(
                pl_module.gpt,
                loader.tokens_N,
                self.full,
                seq_len=loader.seq_len,
                allow_illegal=self.allow_illegal,
                autocast_dtype=_autocast_dtype(trainer, pl_module),
                loss=self._loss,
                on_step=advance,
            )
        assert self.evidence is not None
        self.evidence.trained_targets = num_seqs * loader.seq_len
        self.evidence.chunks = 1
        self.evidence.scored_first = False
        with track(trainer, "score, not legal", len(loader)) as advance:
            return evaluate_windows(
                pl_module.gpt,
                loader,
                metric,
                device=pl_module.device,
                autocast_dtype=_autocast_dtype(trainer, pl_module),
                on_batch=lambda bpb: advance(text=running_text(bpb)),
                on_scores=score_map.add,
                score=pl_module.score_batch,
            )


def _autocast_dtype(trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.dtype | None:
    """Return what the Trainer's precision autocasts to; None without autocast.

    The Trainer's own context must not span several steps: autocast would go on with the casts that
    it cached of weights which have changed since.
    """
    device_type = pl_module.device.type
    with trainer.precision_plugin.val_step_context():
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return None
