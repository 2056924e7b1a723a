"""The score: bits per byte of held-out text, summed exactly over batches and ranks."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from pgl.evaluate.byte_table import ByteTable, target_bytes


class BitsPerByte(Metric):
    """Bits per byte over every target scored since the last reset.

    Three sums are kept and added up over ranks: nats (float64), bytes and targets (int64). Ranks
    may hold unequal shares, or none. The sums keep their dtype whatever the module around the
    metric is cast to.

    ``compute()`` returns ``{"bpb", "loss", "tokens", "bytes"}``, all 0-d tensors: loss in nats per
    target and ``bpb = loss / ln 2 * tokens / bytes`` (float64), the number of targets and of bytes
    (int64). A dict, so that the four come from one synchronisation and agree with each other.

    Example::

        metric = BitsPerByte(ByteTable.from_tokenizer("fineweb_1024_bpe.model", vocab_size=1024))
        metric.update(nats, previous_ids, target_ids)
        print(metric.compute()["bpb"])

    Args:
        table: The byte counts of the data's tokenizer.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    plot_options: ClassVar[dict[str, float]] = {}

    nats: Tensor
    num_bytes: Tensor
    num_tokens: Tensor

    def __init__(self, table: ByteTable) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # Not persistent: a checkpoint holds weights, the table belongs to the data.
        self.register_buffer("base_bytes_V", table.base_bytes_V.clone(), persistent=False)
        self.register_buffer(
            "has_leading_space_V", table.has_leading_space_V.clone(), persistent=False
        )
        self.register_buffer("is_boundary_V", table.is_boundary_V.clone(), persistent=False)

    def update(
        self, nats: Tensor, previous_ids: Tensor, target_ids: Tensor, mask: Tensor | None = None
    ) -> None:
        """Add the targets of one batch; nothing is read back from the device.

        Args:
            nats: Loss of each target in nats, any float dtype and shape.
            previous_ids: The token before each target, same shape.
            target_ids: The targets, same shape.
            mask: True where a target is to be counted, same shape; None counts all.
        """
        nats = nats.detach().double()
        bytes_of_targets = target_bytes(
            self.base_bytes_V,
            self.has_leading_space_V,
            self.is_boundary_V,
            previous_ids,
            target_ids,
        )
        if mask is None:
            num_tokens: Tensor | int = nats.numel()
        else:
            # where, not a product: what lies under the mask may be infinite.
            nats = torch.where(mask, nats, 0.0)
            bytes_of_targets = torch.where(mask, bytes_of_targets, 0)
            num_tokens = mask.sum()
        # Out of place: a sum made under inference_mode may not be changed in place outside it.
        self.nats = self.nats + nats.sum()
        self.num_bytes = self.num_bytes + bytes_of_targets.sum(dtype=torch.int64)
        self.num_tokens = self.num_tokens + num_tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the score over all ranks.

        Raises:
            ValueError: No target, or no byte of text, has been scored.
        """
        if self.num_tokens == 0 or self.num_bytes == 0:
            raise ValueError(
                f"nothing to score: {int(self.num_tokens)} targets of {int(self.num_bytes)} bytes "
                "were seen; give a validation set with at least two tokens of text"
            )
        loss = self.nats / self.num_tokens
        return {
            "bpb": loss / math.log(2.0) * self.num_tokens / self.num_bytes,
            "loss": loss,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Metric:
        # torchmetrics guards .half() and .float(), not .to(dtype), which is how a Trainer with
        # precision "bf16-true" casts; a float64 sum would lose 13 digits there.
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, exclude_state)


class RunningBPB:
    """Bits per byte of a metric so far, on this rank, read without making the device wait.

    Each :meth:`read` starts a copy of the sums to the host and returns what the copy before it
    brought: the device always has a batch in its queue, and the host is never further ahead.

    Args:
        metric: The metric to read.
    """

    def __init__(self, metric: BitsPerByte) -> None:
        self.metric = metric
        self._copied: tuple[Tensor, torch.cuda.Event | None] | None = None

    def read(self) -> float:
        """Return the value at the time of the last call; NaN at the first."""
        before = self._copied
        sums_2 = torch.stack([self.metric.nats, self.metric.num_bytes.double()])
        event = None
        sums_on_host_2 = sums_2.to("cpu", non_blocking=True)
        if sums_2.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._copied = (sums_on_host_2, event)
        if before is None:
            return math.nan
        if before[1] is not None:
            before[1].synchronize()
        nats, num_bytes = before[0].tolist()
        return nats / math.log(2.0) / num_bytes if num_bytes else math.nan
