"""Test-time training: learn from validation text, legally only from what has been scored.

Shapes: W windows, N tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from pgl.evaluate.adapt import (
    ChunkTrainer,
    FullTTTConfig,
    SequenceLoss,
    Trainable,
    TTTConfig,
    check_fills_sequence,
    sequence_loss,
    training_run,
    world,
)
from pgl.evaluate.bits_per_byte import BitsPerByte
from pgl.evaluate.loader import (
    Tokens,
    WindowBatch,
    WindowLoader,
    count_targets,
    default_batch_windows,
    tokens_on,
)
from pgl.evaluate.score import BatchScores, Scorer, autocast, move, score_batch
from pgl.evaluate.windows import Tail, sliding_windows


@dataclass
class ChunkRecord:
    """What was done with one chunk. The sums are this process's share; losses and norms are global.

    Tensors are 0-d and stay on the device, so that keeping a record waits for nothing.
    """

    chunk: int
    lr: float
    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    first_scored: int
    """First target that was scored."""

    trained_before: int
    """Targets, from the start of the text, in the chunks that had been trained on by then."""

    versions: tuple[int, int]
    """Version counters of the weights, added up, before and after the chunk was scored."""

    trained_targets: int = 0
    """Targets of this chunk that the weights were trained on: those of whole sequences."""

    step_losses: list[Tensor] = field(default_factory=list)
    """Mean nats per target of each SGD step."""

    grad_norms: list[Tensor] = field(default_factory=list)
    """Gradient norm of each SGD step, before clipping."""

    @property
    def scored_first(self) -> bool:
        """Whether no target was trained on before it was scored, nor the weights meanwhile."""
        return self.first_scored >= self.trained_before and self.versions[0] == self.versions[1]


def score_first_ttt(
    gpt: nn.Module,
    tokens: Tokens,
    metric: BitsPerByte,
    config: TTTConfig,
    *,
    seq_len: int,
    stride: int,
    tail: Tail = "exact",
    num_targets: int | None = None,
    batch_windows: int | None = 32,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    trainable: Trainable | None = None,
    on_chunk: Callable[[ChunkRecord], None] | None = None,
    on_scores: Callable[[WindowBatch, BatchScores], None] | None = None,
    score: Scorer = score_batch,
    loss: SequenceLoss = sequence_loss,
) -> dict[str, Tensor]:
    """Score chunk after chunk, training on each only once all of it has been scored (PR #549).

    A window belongs to the chunk of its first scored target. The last chunk is not trained on.
    Windows and sequences are shared out over the processes of ``torch.distributed``; all take part
    in each reduction, and hold the same weights if they started with the same. The weights are left
    trained: see :func:`restored_weights`. May be called under ``inference_mode``.

    Measured (PR #549, three seeds): -0.0025 bits per byte on a model quantised by percentile
    search, nothing on one quantised by GPTQ. SGD on bfloat16 embeddings loses most of these small
    steps to rounding: cast them to float32 first.

    Args:
        gpt: Model with ``token_losses``, on ``device``.
        tokens: Validation tokens: see :func:`pgl.evaluate.tokens_on`.
        metric: Reset, then given every score.
        config: How to train.
        seq_len: Tokens the model reads at once, in scoring and training.
        stride: Targets that a window adds.
        tail: See :func:`pgl.evaluate.windows.sliding_windows`.
        num_targets: Use only this many targets from the start; None uses all.
        batch_windows: Windows scored at once by a process; no more than it has in a chunk.
        device: Where the model lies.
        autocast_dtype: Run the model under autocast with this dtype; None: as it is.
        trainable: Says by its name whether a parameter is trained; None: ``freeze_blocks`` decides.
        on_chunk: Called with the record of each chunk.
        on_scores: Called with each batch and its scores.
        score: Scores a batch, such as :class:`pgl.evaluate.CompiledScorer`.
        loss: What training differentiates, such as a compiled :func:`sequence_loss`.

    Returns:
        ``metric.compute()``: bpb, loss, tokens, bytes.

    Raises:
        ValueError: ``chunk_tokens`` is below ``seq_len``, or the model cannot be trained.
    """
    device = torch.device(device)
    tokens_N = tokens_on(device, tokens)
    num_targets = count_targets(tokens_N, num_targets)
    windows_W3 = sliding_windows(num_targets, seq_len, stride, tail)
    chunks = _chunks(tokens_N, windows_W3, num_targets, config, seq_len, stride, batch_windows)
    metric.to(device).reset()
    scorer = _ChunkScorer(gpt, metric, device, autocast_dtype, score, on_scores)
    with training_run(gpt, config, trainable) as optimizer:
        trainer = ChunkTrainer(gpt, optimizer, tokens_N, config, seq_len, autocast_dtype, loss)
        for record in _score_then_train(chunks, scorer, trainer, config):
            if on_chunk is not None:
                on_chunk(record)
    return metric.compute()


def _score_then_train(
    chunks: list[tuple[np.ndarray, WindowLoader]],
    scorer: "_ChunkScorer",
    trainer: ChunkTrainer,
    config: TTTConfig,
) -> Iterator[ChunkRecord]:
    trained = 0
    for chunk, (windows_C3, loader) in enumerate(chunks):
        # The rule of the challenge, and the reason for everything else here.
        assert (windows_C3[:, 2] >= trained).all()
        lr = chunk_lr(config, chunk, len(chunks))
        record = scorer.score(chunk, windows_C3, loader, trained, lr)
        if chunk < len(chunks) - 1:
            start = chunk * config.chunk_tokens
            trained = start + config.chunk_tokens
            record.trained_targets = config.chunk_tokens // trainer.seq_len * trainer.seq_len
            for loss, norm in trainer.train(start, trained, lr):
                record.step_losses.append(loss)
                record.grad_norms.append(norm)
        yield record


def train_on_all(
    gpt: nn.Module,
    tokens: Tokens,
    config: FullTTTConfig,
    *,
    seq_len: int,
    allow_illegal: bool = False,
    num_targets: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    trainable: Trainable | None = None,
    loss: SequenceLoss = sequence_loss,
    on_step: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Train on the whole validation text before any of it is scored: PR #388, against the rules.

    Every target has been trained on ``epochs`` times when it is scored, so the score is a leak and
    compares with no other. It is here to show what #388 did; :class:`pgl.evaluate.FullTTTConfig`
    has its settings, and says which sequences a step takes here and there. Its gain was never
    measured by itself.

    Args:
        gpt: Model with ``token_losses``, on the device where it is to train.
        tokens: See :func:`score_first_ttt`.
        config: How to train; ``lr`` stays constant.
        seq_len: Tokens in a training sequence.
        allow_illegal: Must be True, so that nobody gets such a score without asking for it.
        num_targets: See :func:`score_first_ttt`.
        autocast_dtype: See :func:`score_first_ttt`.
        trainable: See :func:`score_first_ttt`.
        loss: See :func:`score_first_ttt`.
        on_step: Called after each SGD step (progress).

    Returns:
        Mean loss of each epoch in nats per target, 0-d tensors.

    Raises:
        ValueError: ``allow_illegal`` is not set, or there is less text than one sequence.
    """
    if not allow_illegal:
        raise ValueError(
            "training on validation text before it is scored breaks the challenge's rules; set "
            "allow_illegal to reproduce PR #388, or use score-first test-time training"
        )
    tokens_N = tokens_on(next(gpt.parameters()).device, tokens)
    num_targets = count_targets(tokens_N, num_targets)
    check_fills_sequence(num_targets, seq_len)
    num_seqs = num_targets // seq_len
    seqs_of_step = [
        min(config.batch_seqs, num_seqs - first) for first in range(0, num_seqs, config.batch_seqs)
    ]
    losses: list[Tensor] = []
    with training_run(gpt, config, trainable) as optimizer:
        trainer = ChunkTrainer(gpt, optimizer, tokens_N, config, seq_len, autocast_dtype, loss)
        for step_loss, _ in trainer.train(0, num_targets, config.lr):
            losses.append(step_loss)
            if on_step is not None:
                on_step()
        losses_ES = torch.stack(losses).view(config.epochs, -1)
        weights_S = torch.tensor(seqs_of_step, dtype=losses_ES.dtype, device=losses_ES.device)
        return list((losses_ES * weights_S).sum(1) / num_seqs)


def assign_chunks(windows_W3: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """The chunk of each window: the one that holds its first scored target."""
    return windows_W3[:, 2] // chunk_tokens


def chunk_lr(config: TTTConfig, chunk: int, num_chunks: int) -> float:
    """Learning rate of a chunk: half a cosine from ``lr`` at the first to 0 at the last."""
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))


@contextmanager
def restored_weights(gpt: nn.Module) -> Iterator[None]:
    """Put every parameter and buffer back, bit for bit, at the end of the block."""
    saved = {name: tensor.detach().clone() for name, tensor in gpt.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in gpt.state_dict().items():
                tensor.copy_(saved[name])


def _chunks(
    tokens_N: Tensor,
    windows_W3: np.ndarray,
    num_targets: int,
    config: TTTConfig,
    seq_len: int,
    stride: int,
    batch_windows: int | None,
) -> list[tuple[np.ndarray, WindowLoader]]:
    """The windows of each chunk, and this process's share of them in batches of one shape."""
    config.check_sequence(seq_len)
    rank, world_size = world()
    # Chunk numbers never decrease along the windows, so a chunk's windows are a slice.
    chunk_W = assign_chunks(windows_W3, config.chunk_tokens)
    num_chunks = -(-num_targets // config.chunk_tokens)
    bounds = np.searchsorted(chunk_W, np.arange(num_chunks + 1))
    if batch_windows is None:
        batch_windows = default_batch_windows(tokens_N.device, seq_len)
    in_chunk = int(np.diff(bounds).max())
    return [
        (
            windows_W3[first:stop],
            WindowLoader(
                tokens_N,
                seq_len=seq_len,
                stride=stride,
                batch_windows=min(batch_windows, -(-in_chunk // world_size)),
                windows_W3=windows_W3[first:stop],
                rank=rank,
                world_size=world_size,
                device=tokens_N.device,
            ),
        )
        for first, stop in pairwise(bounds)
    ]


@dataclass
class _ChunkScorer:
    """Scores chunks with the weights as they are."""

    gpt: nn.Module
    metric: BitsPerByte
    device: torch.device
    autocast_dtype: torch.dtype | None
    score_batch: Scorer
    on_scores: Callable[[WindowBatch, BatchScores], None] | None

    def score(
        self, chunk: int, windows_C3: np.ndarray, loader: WindowLoader, trained: int, lr: float
    ) -> ChunkRecord:
        metric, before = self.metric, self._version()
        nats, tokens, num_bytes = metric.nats, metric.num_tokens, metric.num_bytes
        with torch.no_grad():
            for batch in loader:
                batch = move(batch, self.device)
                with autocast(self.device, self.autocast_dtype):
                    scores = self.score_batch(self.gpt, batch)
                metric.update(*scores)
                if self.on_scores is not None:
                    self.on_scores(batch, scores)
        return ChunkRecord(
            chunk=chunk,
            lr=lr,
            nats=metric.nats - nats,
            tokens=metric.num_tokens - tokens,
            bytes=metric.num_bytes - num_bytes,
            first_scored=int(windows_C3[:, 2].min(initial=np.iinfo(np.int64).max)),
            trained_before=trained,
            versions=(before, self._version()),
        )

    def _version(self) -> int:
        return sum(parameter._version for parameter in self.gpt.parameters())
