"""TensorBoard curves of the training, without a wait for the device on steps that do not log."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.wall_clock_budget import WallClockBudget
from pgl.evaluate import target_bytes


class TrainingMetrics(Callback):
    """Logs loss, BPB, learning rates, momentum, gradient norm, speed and time.

    Every ``log_every_n_steps`` steps (a Trainer argument) one set of scalars is written against the
    optimizer step. Training and validation loss are also written against elapsed training seconds
    (``by_seconds/``) and against thousands of tokens (``by_ktokens/``), since runs on different
    hardware or batch sizes compare on those.

    Note:
        Loss and BPB are those of all micro-batches and ranks of the step that logs. MiLe's loss is
        weighted by entropy; its BPB is then not comparable with validation BPB.

    Note:
        ``speed/tokens_per_second`` divides by training time alone: validation and the writing of
        checkpoints are not part of it.

    Example::

        Trainer(log_every_n_steps=10, callbacks=[WallClockBudget(), TrainingMetrics()])
    """

    def __init__(self) -> None:
        self.last_loss: float | None = None
        self._since: tuple[float, int] | None = None
        self._clipped: Tensor | int = 0
        self._bytes_per_token: list[Tensor] = []

    @property
    def clipped_steps(self) -> int:
        """Steps whose gradient was clipped."""
        return int(self._clipped)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: log when a step is complete and due."""
        step_is_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if step_is_complete:
            self._count_clipping(pl_module)
        # Lightning has counted the step only behind its last micro-batch.
        step = trainer.global_step + (not step_is_complete)
        if step % trainer.log_every_n_steps:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._bytes_per_token.clear()
        self._bytes_per_token.append(_bytes_per_token(pl_module, batch))
        if not step_is_complete:
            return
        # Micro-batches have the same number of tokens on all ranks: means of means are exact.
        means = torch.stack(
            [torch.stack(pl_module.step_losses).mean(), torch.stack(self._bytes_per_token).mean()]
        )
        self.last_loss, bytes_per_token = trainer.strategy.reduce(means, reduce_op="mean").tolist()
        metrics = {"train/loss": self.last_loss, **self._steering(pl_module)}
        if bytes_per_token > 0:
            metrics["train/bpb"] = self.last_loss / math.log(2) / bytes_per_token
        metrics |= self._speed(trainer)
        _log(trainer, metrics, "train/loss")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation ends: repeat its score against seconds and tokens."""
        score = trainer.callback_metrics.get("val/bpb")
        if score is not None and trainer.state.fn == TrainerFn.FITTING:
            _log(trainer, {"val/bpb": score.item()}, "val/bpb", by_step=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what is counted over the whole run."""
        return {"clipped_steps": self.clipped_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._clipped = state_dict["clipped_steps"]

    def _count_clipping(self, pl_module: pl.LightningModule) -> None:
        optimizer = pl_module.optimizers(use_pl_optimizer=False)
        if optimizer.grad_clip_norm is not None:
            # A comparison on the device: nothing waits for it.
            self._clipped = self._clipped + (optimizer.grad_norm > optimizer.grad_clip_norm)

    def _steering(self, pl_module: pl.LightningModule) -> dict[str, float]:
        optimizer = pl_module.optimizers(use_pl_optimizer=False)
        metrics = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        for group in optimizer.param_groups:
            if group["kind"] == "muon":
                metrics["schedule/muon_momentum"] = group["momentum"]
        metrics["schedule/lr_scale"] = pl_module.lr_scale
        metrics["train/grad_norm"] = float(optimizer.grad_norm)
        if pl_module.loss_config.mile_gamma > 0:
            metrics["schedule/mile_gamma"] = float(pl_module.mile_gamma)
        return metrics

    def _speed(self, trainer: pl.Trainer) -> dict[str, float]:
        budget, tokens = find_callback(trainer, WallClockBudget), _tokens(trainer)
        seconds = budget.phases.seconds("train")
        metrics = {
            "budget/elapsed_seconds": budget.elapsed,
            "budget/mtokens": tokens / 1e6,
        }
        if self._since is not None:
            seconds_before, tokens_before = self._since
            passed = max(seconds - seconds_before, 1e-9)
            metrics["speed/tokens_per_second"] = (tokens - tokens_before) / passed
        self._since = (seconds, tokens)
        return metrics


def _tokens(trainer: pl.Trainer) -> int:
    return trainer.global_step * trainer.datamodule.batch_tokens


def _bytes_per_token(pl_module: pl.LightningModule, tokens_ST1: Tensor) -> Tensor:
    """Return the mean bytes of a micro-batch's targets, on its device; 0 without a byte table."""
    metric = pl_module.bits_per_byte
    if metric is None:
        return torch.zeros((), device=tokens_ST1.device)
    bytes_ST = target_bytes(
        metric.base_bytes_V,
        metric.has_leading_space_V,
        metric.is_boundary_V,
        tokens_ST1[:, :-1],
        tokens_ST1[:, 1:],
    )
    return bytes_ST.float().mean()


def _log(trainer: pl.Trainer, metrics: dict[str, float], curve: str, by_step: bool = True) -> None:
    if trainer.logger is None:
        return
    if by_step:
        trainer.logger.log_metrics(metrics, step=trainer.global_step)
    seconds = find_callback(trainer, WallClockBudget).elapsed
    trainer.logger.log_metrics({f"by_seconds/{curve}": metrics[curve]}, step=round(seconds))
    ktokens = _tokens(trainer) // 1000
    trainer.logger.log_metrics({f"by_ktokens/{curve}": metrics[curve]}, step=ktokens)
