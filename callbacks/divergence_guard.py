"""Notice a loss or gradient that is not a number before it costs the run."""

import copy
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import optional_callback
from callbacks.weight_averaging import WeightAveraging
from pgl.errors import DivergenceError
from pgl.optim import MuonAdamW

Action = Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True)
class _Seen:
    """What one optimizer step came to, on its way to the host."""

    step: int
    loss_and_norm: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.loss_and_norm.tolist()
        return loss, norm


class DivergenceGuard(Callback):
    """Acts on a loss or gradient norm that is NaN or infinite, on all ranks at the same step.

    - "stop" ends the run with the step, the position of its tokens and the last checkpoint.
    - "skip" leaves weights, momentum and moments as they were before the step, on the device.
    - "roll_back" puts weights, optimizer and averages back to a copy in memory, made every
      ``snapshot_every_steps`` steps and at each checkpoint. Clock, step count and data go on, so
      the bad batch is not read again.

    No checkpoint is written before the steps up to it are known to be finite.

    Note:
        The gradient norm is the same on all ranks, and a loss that is not finite on any of them
        makes it so (:func:`pgl.objective.training_loss`), so the ranks agree without a message. On
        a GPU it is copied behind the step and read one step later, when
        :class:`callbacks.WallClockBudget` has waited for that step anyway: no step waits for it.

    Note:
        On a GPU "stop" and "roll_back" let one more step pass with the bad weights, which then
        counts as lost. "skip" takes a copy of weights and state in every step, "roll_back" keeps
        one.

    Example::

        Trainer(callbacks=[WallClockBudget(), DivergenceGuard(action="skip")])

    Args:
        action: What to do.
        limit: Steps that are skipped, or roll-backs, before the run stops all the same.
        snapshot_every_steps: Optimizer steps between copies to roll back to.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, action: Action = "stop", limit: int = 3, snapshot_every_steps: int = 100
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(
                f"divergence.action must be one of {', '.join(get_args(Action))}, got {action!r}"
            )
        if limit < 1:
            raise ValueError(f"divergence.limit must be at least 1, got {limit}")
        if snapshot_every_steps < 1:
            raise ValueError(
                f"divergence.snapshot_every_steps must be at least 1, got {snapshot_every_steps}"
            )
        self.action = action
        self.limit = limit
        self.snapshot_every_steps = snapshot_every_steps
        self.bad_steps: list[int] = []
        """Optimizer steps that were skipped or rolled back, counted from 1."""
        self._pending: deque[_Seen] = deque()
        self._snapshot: dict[str, Any] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the optimizer exists: tell it whether it has to mask bad steps."""
        _optimizer(pl_module).skip_nonfinite = self.action == "skip"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins or goes on: there is something to roll back to."""
        self._pending.clear()
        self._take_snapshot(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: the last of each step is noted, the step before is judged."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._pending.append(_seen(trainer.global_step, pl_module))
        on_gpu = self._pending[-1].arrived is not None
        self._judge(trainer, pl_module, in_flight=1 if on_gpu else 0)
        if trainer.global_step % self.snapshot_every_steps == 0 and self.action == "roll_back":
            self.settle(trainer, pl_module)
            self._take_snapshot(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation begins: nothing is scored that is going to be rolled back."""
        self.settle(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is made: a resumed run rolls back to it, so this one does too.

        :meth:`pgl.trainer.GolfTrainer.save_checkpoint` has settled the steps before it.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._take_snapshot(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: the copy is not needed any more."""
        self.settle(trainer, pl_module)
        self._snapshot = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the steps that were bad."""
        return {"bad_steps": list(self.bad_steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.bad_steps = list(state_dict["bad_steps"])

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge all steps so far, those in flight as well. All ranks call it at the same step."""
        self._judge(trainer, pl_module, in_flight=0)

    def report(self) -> dict[str, Any]:
        """Return the setting and the steps on which it acted."""
        return {"action": self.action, "limit": self.limit, "bad_steps": self.bad_steps}

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, in_flight: int) -> None:
        while len(self._pending) > in_flight:
            seen = self._pending.popleft()
            loss, norm = seen.read()
            if not math.isfinite(norm):
                self._act(trainer, pl_module, seen.step, loss, norm)

    def _act(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        step: int,
        loss: float,
        norm: float,
    ) -> None:
        what = (
            f"training diverged: optimizer step {step:,} has loss {loss:g} (on this rank) and "
            f"gradient norm {norm:g}; it read {_position(trainer, step)}"
        )
        if self.action == "stop":
            raise DivergenceError(
                f"{what}; set divergence.action to skip or roll_back to go on without it"
            )
        if len(self.bad_steps) >= self.limit:  # above it where a resumed run has a lower limit
            raise DivergenceError(
                f"{what}; divergence.limit={self.limit} steps were bad before it: "
                f"{', '.join(map(str, self.bad_steps))}"
            )
        self.bad_steps.append(step)
        if self.action == "skip":
            rank_zero_warn(f"{what}; the step was skipped")
            return
        self._roll_back(trainer, pl_module)
        self._pending.clear()  # steps from the bad weights, which are gone
        rank_zero_warn(f"{what}; rolled back to the weights of step {self._snapshot['step']:,}")

    def _take_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.action != "roll_back":
            return
        averaging = optional_callback(trainer, WeightAveraging)
        self._snapshot = copy.deepcopy(
            {
                "step": trainer.global_step,
                "weights": {n: p.detach() for n, p in pl_module.gpt.named_parameters()},
                "optimizer": _optimizer(pl_module).state_dict(),
                "averages": None if averaging is None else averaging.state_dict(),
            }
        )

    @torch.no_grad()
    def _roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.gpt.named_parameters():
            parameter.copy_(self._snapshot["weights"][name])
        _optimizer(pl_module).load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))
        averaging = optional_callback(trainer, WeightAveraging)
        if averaging is not None:
            averaging.load_state_dict(self._snapshot["averages"])


def _seen(step: int, pl_module: pl.LightningModule) -> _Seen:
    loss = torch.stack(pl_module.step_losses).mean()
    values = torch.stack([loss, _optimizer(pl_module).global_norm])
    if values.device.type != "cuda":
        return _Seen(step, values, None)
    host = torch.empty(2, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Seen(step, host, arrived)


def _position(trainer: pl.Trainer, step: int) -> str:
    """Say which tokens an optimizer step, counted from 1, has read."""
    data = trainer.datamodule
    count, total = data.layout.tokens_read_per_step, data.stream.total_tokens
    epoch, offset = divmod((step - 1) * count, total)
    return f"{count:,} tokens from token offset {offset:,} of epoch {epoch} of the training data"


def _optimizer(pl_module: pl.LightningModule) -> MuonAdamW:
    optimizer = pl_module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, MuonAdamW)
    return optimizer
