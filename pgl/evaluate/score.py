"""From a batch of windows to nats per target, and the plain evaluation loop.

Shapes: B windows, S window length, L trailing positions whose head is computed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pgl.evaluate.bits_per_byte import BitsPerByte
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


def score_batch(gpt: TokenLosses, batch: WindowBatch) -> BatchScores:
    """Score the windows of a batch, computing the output head only where a target is scored.

    Args:
        gpt: The model, on the device of the batch.
        batch: From a :class:`pgl.evaluate.WindowLoader`.

    Returns:
        Nats (float32), token before each target, targets and the mask of scored positions, all
        (B, ``batch.last``).
    """
    ids_BS = batch.tokens_BS1[:, :-1].contiguous()
    targets_BS = batch.tokens_BS1[:, 1:].contiguous()
    nats_BL = gpt.token_losses(ids_BS, targets_BS, batch.last)
    seq_len = ids_BS.shape[1]
    position_L = torch.arange(seq_len - batch.last, seq_len, device=ids_BS.device)
    mask_BL = (position_L >= batch.first_scored_B[:, None]) & (
        position_L < batch.stop_scored_B[:, None]
    )
    return BatchScores(
        nats_BL, ids_BS[:, seq_len - batch.last :], targets_BS[:, seq_len - batch.last :], mask_BL
    )


def evaluate_windows(
    gpt: nn.Module,
    loader: Iterable[WindowBatch],
    metric: BitsPerByte,
    *,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
    score: Callable[[TokenLosses, WindowBatch], BatchScores] = score_batch,
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
        on_batch: Called with the index of each batch once it is queued (progress, time limits).
        score: Scores a batch, such as a compiled :func:`score_batch`.

    Returns:
        ``metric.compute()``: bpb, loss, tokens, bytes.
    """
    device = torch.device(device)
    metric.to(device).reset()
    with evaluation_mode(gpt), torch.no_grad():
        for index, batch in enumerate(loader):
            with autocast(device, autocast_dtype):
                scores = score(gpt, move(batch, device))
            metric.update(*scores)
            if on_batch is not None:
                on_batch(index)
    return metric.compute()


def move(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The batch on ``device``; the copy does not block where the memory is pinned."""
    tensors = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
    return WindowBatch(*tensors, last=batch.last)


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
