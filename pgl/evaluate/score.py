"""From a batch of windows to nats per target, and the evaluation loop.

Shapes: B windows, S window length, L trailing positions whose head is computed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pgl.compiled import compiled_copy
from pgl.evaluate.bits_per_byte import BitsPerByte, RunningBPB
from pgl.evaluate.loader import WindowBatch


class TokenLosses(Protocol):
    """What scoring needs of a model; :class:`pgl.model.GPT` has it."""

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, last: int | None = None) -> Tensor:
        """Float32 nats (B, ``last``) of the last ``last`` targets, of all where it is None."""
        ...


class BatchScores(NamedTuple):
    """The arguments of :meth:`BitsPerByte.update`, in order."""

    nats_BL: Tensor
    previous_BL: Tensor
    target_BL: Tensor
    mask_BL: Tensor


Losses = Callable[[TokenLosses, Tensor, Tensor, int | None], Tensor]


def token_losses(gpt: TokenLosses, ids_BT: Tensor, targets_BT: Tensor, last: int | None) -> Tensor:
    """What a score computes of the model: its ``token_losses``, as a function to compile."""
    return gpt.token_losses(ids_BT, targets_BT, last)


def score_batch(gpt: TokenLosses, batch: WindowBatch, losses: Losses = token_losses) -> BatchScores:
    """Score the windows of a batch, computing the output head only where a target is scored.

    Args:
        gpt: The model, on the device of the batch.
        batch: From a :class:`pgl.evaluate.WindowLoader`.
        losses: :func:`token_losses`, or that compiled.

    Returns:
        Nats (float32), token before each target, targets and the mask of scored positions, all
        (B, ``batch.last``).
    """
    ids_BS = batch.tokens_BS1[:, :-1].contiguous()
    targets_BS = batch.tokens_BS1[:, 1:].contiguous()
    nats_BL = losses(gpt, ids_BS, targets_BS, batch.last)
    seq_len = ids_BS.shape[1]
    position_L = torch.arange(seq_len - batch.last, seq_len, device=ids_BS.device)
    mask_BL = (position_L >= batch.first_scored_B[:, None]) & (
        position_L < batch.stop_scored_B[:, None]
    )
    return BatchScores(
        nats_BL, ids_BS[:, seq_len - batch.last :], targets_BS[:, seq_len - batch.last :], mask_BL
    )


Scorer = Callable[[TokenLosses, WindowBatch], BatchScores]


class CompiledScorer:
    """:func:`score_batch` with the model through torch.compile, but for windows that come alone.

    Those are few, and compiling their shape would take longer than scoring them.
    """

    def __init__(self) -> None:
        self.losses: Losses = compiled_copy(token_losses)
        """The compiled :func:`token_losses`: a graph for each shape of batch."""

    def __call__(self, gpt: TokenLosses, batch: WindowBatch) -> BatchScores:
        """Score a batch."""
        return score_batch(gpt, batch, token_losses if batch.alone else self.losses)


def evaluate_windows(
    gpt: nn.Module,
    loader: Iterable[WindowBatch],
    metric: BitsPerByte,
    *,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    on_batch: Callable[[float], None] | None = None,
    on_scores: Callable[[WindowBatch, BatchScores], None] | None = None,
    score: Scorer = score_batch,
) -> dict[str, Tensor]:
    """Score every window of ``loader``, without a Trainer.

    The metric is moved to ``device`` and reset first; the model must lie there already. It is put
    into evaluation mode, and every submodule is given back its own mode at the end. Runs under
    ``no_grad`` rather than ``inference_mode``, so that tables which the model caches stay usable
    in training.

    Args:
        gpt: Model with ``token_losses`` (see :class:`TokenLosses`).
        loader: This rank's share of the windows.
        metric: Adds the ranks up if ``torch.distributed`` is initialised.
        device: Where the model lies.
        autocast_dtype: Run the model under autocast with this dtype; None: as the caller runs it.
        on_batch: Called after each batch with this rank's bits per byte up to the batch before
            (progress, time limits); it keeps the host one batch ahead of the device.
        on_scores: Called with each batch and its scores, still on the device.
        score: Scores a batch, such as :class:`CompiledScorer`.

    Returns:
        ``metric.compute()``: bpb, loss, tokens, bytes.
    """
    device = torch.device(device)
    metric.to(device).reset()
    running = RunningBPB(metric)
    with evaluation_mode(gpt), torch.no_grad():
        for batch in loader:
            batch = move(batch, device)
            with autocast(device, autocast_dtype):
                scores = score(gpt, batch)
            metric.update(*scores)
            if on_scores is not None:
                on_scores(batch, scores)
            if on_batch is not None:
                on_batch(running.read())
    return metric.compute()


def move(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The batch on ``device``, where a :class:`pgl.evaluate.WindowLoader` can make it at once."""
    moved = {
        name: value.to(device) for name, value in batch._asdict().items() if torch.is_tensor(value)
    }
    return batch._replace(**moved)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to ``dtype``; where it is None, whatever the caller has chosen."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each submodule has the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
