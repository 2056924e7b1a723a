"""SGD on stretches of text, shared out over processes: what test-time training trains with.

Shapes: B sequences, S sequence length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pgl.evaluate.score import TokenLosses, autocast, evaluation_mode
from pgl.evaluate.windows import shard_range

Trainable = Callable[[str], bool]
"""Says by its name whether a parameter is trained."""


@dataclass
class SGDConfig:
    """Plain SGD on sequences of text."""

    lr: float = 0.002
    """Learning rate."""

    epochs: int = 3
    """Passes over the text."""

    momentum: float = 0.9
    """SGD momentum."""

    grad_clip_norm: float = 1.0
    """Largest norm of the gradient over all parameters."""

    batch_seqs: int = 32
    """Sequences in one SGD step, over all processes."""

    micro_batch_seqs: int = 32
    """Sequences that one process runs at once; lower it if memory runs out."""

    freeze_blocks: int = 0
    """Leave the parameters of this many first blocks as they are."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_seqs", "micro_batch_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ttt.<method>.{name} is {getattr(self, name)}; it must be at least 1"
                )
        for name in ("lr", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"ttt.<method>.{name} is {getattr(self, name)}; it must be above 0"
                )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"ttt.<method>.momentum is {self.momentum}; it must be at least 0 and below 1"
            )
        if self.freeze_blocks < 0:
            raise ValueError(
                f"ttt.<method>.freeze_blocks is {self.freeze_blocks}; it must not be negative"
            )


@dataclass
class TTTConfig(SGDConfig):
    """Score-first test-time training. The defaults are those of PR #549."""

    lr: float = 0.002
    """Learning rate of the first chunk; falls to 0 at the last along half a cosine."""

    epochs: int = 3
    """Passes over each chunk."""

    momentum: float = 0.9
    """SGD momentum, carried over from chunk to chunk."""

    chunk_tokens: int = 32768
    """Targets scored before the weights are trained on them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_tokens < 1:
            raise ValueError(
                f"ttt.score_first.chunk_tokens is {self.chunk_tokens}; it must be at least 1"
            )

    def check_sequence(self, seq_len: int) -> None:
        """Refuse chunks that do not hold a training sequence.

        Raises:
            ValueError: ``chunk_tokens`` is below ``seq_len``.
        """
        if self.chunk_tokens < seq_len:
            raise ValueError(
                f"ttt.score_first.chunk_tokens is {self.chunk_tokens} but a training sequence has "
                f"{seq_len} tokens; raise it or lower validation.seq_len"
            )


@dataclass
class FullTTTConfig(SGDConfig):
    """Training on all of the validation text before it is scored.

    The numbers are PR #388's, the order is not: there each of 8 processes went through an eighth of
    the text, so a step had 32 sequences from each of 8 distant places; here a step has 256
    sequences in a row, whatever the number of processes.
    """

    lr: float = 0.008
    """Learning rate, the same in every step."""

    epochs: int = 25
    """Passes over the validation text."""

    batch_seqs: int = 256
    """Sequences in one SGD step, over all processes (PR #388: 32 on each of 8)."""


def check_fills_sequence(num_targets: int, seq_len: int) -> None:
    """Refuse a text that does not fill one training sequence.

    Raises:
        ValueError: ``num_targets`` is below ``seq_len``.
    """
    if num_targets < seq_len:
        raise ValueError(
            f"ttt.method full: {num_targets} targets do not fill a training sequence of {seq_len}; "
            "give more text or lower validation.seq_len"
        )


SequenceLoss = Callable[[TokenLosses, Tensor, Tensor], Tensor]


def sequence_loss(gpt: TokenLosses, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of the nats of all targets, 0-d float32; what a training step differentiates."""
    return gpt.token_losses(ids_BS, targets_BS).sum()


@dataclass
class ChunkTrainer:
    """SGD on stretches of the text, shared out over the processes."""

    gpt: nn.Module
    optimizer: torch.optim.SGD
    tokens_N: Tensor
    config: SGDConfig
    seq_len: int
    autocast_dtype: torch.dtype | None = None
    loss: SequenceLoss = sequence_loss
    """Such as a compiled :func:`sequence_loss`."""

    def train(self, start: int, stop: int, lr: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Train on the whole sequences of targets ``start .. stop - 1``.

        Yields the loss and gradient norm of each step.
        """
        self.optimizer.param_groups[0]["lr"] = lr
        num_seqs = (stop - start) // self.seq_len
        for _ in range(self.config.epochs):
            for first in range(0, num_seqs, self.config.batch_seqs):
                count = min(self.config.batch_seqs, num_seqs - first)
                yield self._step(start + first * self.seq_len, count)

    def _step(self, start: int, num_seqs: int) -> tuple[Tensor, Tensor]:
        params: list[Tensor] = self.optimizer.param_groups[0]["params"]
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=params[0].device)
        first, stop = shard_range(num_seqs, *world())
        for i in range(first, stop, self.config.micro_batch_seqs):
            j = min(i + self.config.micro_batch_seqs, stop)
            loss += self._backward(start + i * self.seq_len, j - i, num_seqs * self.seq_len)
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        if world()[1] > 1:
            loss = _sum_over_processes(loss, params)
        norm = nn.utils.clip_grad_norm_(params, self.config.grad_clip_norm)
        self.optimizer.step()
        return loss, norm

    def _backward(self, start: int, num_seqs: int, targets_of_step: int) -> Tensor:
        """Add a micro-batch's share of the step's mean loss to the gradients, and return it."""
        # Clones: the text may have been made under inference_mode, and a view of it is not saved
        # for backward.
        ids = self.tokens_N[start : start + num_seqs * self.seq_len + 1].clone()
        ids_BS = ids[:-1].view(num_seqs, -1)
        targets_BS = ids[1:].clone().view(num_seqs, -1)
        with autocast(ids.device, self.autocast_dtype):
            loss = self.loss(self.gpt, ids_BS, targets_BS) / targets_of_step
        loss.backward()
        return loss.detach()


def _sum_over_processes(loss: Tensor, params: list[Tensor]) -> Tensor:
    """Replace each gradient by its sum over the processes; return the sum of ``loss``.

    The shares carry the weight of their targets already, so the sums are those of one process with
    the whole batch. One reduction, by every process: one that had no sequence adds zeros.
    """
    flat = torch.cat([loss.view(1)] + [param.grad.float().flatten() for param in params])
    dist.all_reduce(flat)
    parts = flat[1:].split([param.numel() for param in params])
    for param, part in zip(params, parts, strict=True):
        param.grad.copy_(part.view_as(param))
    return flat[0].clone()


@contextmanager
def training_run(
    gpt: nn.Module, config: SGDConfig, trainable: Trainable | None
) -> Iterator[torch.optim.SGD]:
    """Gradients on for the trained parameters only; flags and modes are put back afterwards."""
    if trainable is None:
        frozen = tuple(f"blocks.{i}." for i in range(config.freeze_blocks))

        def trainable(name: str) -> bool:
            return not name.startswith(frozen)

    flags = [(param, param.requires_grad) for param in gpt.parameters()]
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(gpt):
        _leave_inference(gpt)
        try:
            for name, param in gpt.named_parameters():
                param.requires_grad_(trainable(name))
            trained = [param for param in gpt.parameters() if param.requires_grad]
            if not trained:
                raise ValueError(
                    "ttt.<method>.freeze_blocks leaves no parameter to train; lower it"
                )
            yield torch.optim.SGD(trained, lr=config.lr, momentum=config.momentum)
        finally:
            for param, flag in flags:
                param.requires_grad_(flag)
                param.grad = None


def _leave_inference(gpt: nn.Module) -> None:
    for name, param in gpt.named_parameters():
        if param.is_inference():
            raise ValueError(
                f"parameter {name} was made under torch.inference_mode and cannot be trained; load "
                "the weights outside it (Trainer: inference_mode: false)"
            )
    # A table cached while scoring under inference_mode may not be saved for backward; a copy may.
    for module in gpt.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
