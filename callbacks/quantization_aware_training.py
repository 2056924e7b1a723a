"""Fake quantisation during training, from the first step or late, in the compiled graph too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from callbacks.find import find_callback, optional_callback, require_behind
from callbacks.gptq_export import GPTQExport
from callbacks.wall_clock_budget import WallClockBudget
from pgl.model.linear import set_fake_quantization
from pgl.optim import lr_scale
from pgl.quant import FakeQuantConfig
from pgl.quant.groups import Group

ROUNDED_GROUPS: tuple[Group, ...] = ("attention", "mlp", "bigram", "value_embedding")


class QuantizationAwareTraining(Callback):
    """Rounds weights in the forward pass of training, so that they get used to their export grid.

    The gradient passes straight through (:func:`pgl.quant.fake_quantize`). Validation, calibration
    and scoring use the plain weights. Once on it stays on, over a resume too.

    In the reference runs the late switch was a flag that torch.compile had folded into the graph,
    so it never acted. Here it is an attribute of each layer that the compiler guards: the step has
    two variants, and :class:`callbacks.WallClockBudget` compiles both before the clock starts.

    Note:
        It belongs right behind the budget, whose learning-rate scale it follows.

    Example::

        Trainer(callbacks=[WallClockBudget(), QuantizationAwareTraining(start="late"), ...])

    Args:
        start: Off, on from the first step (PR #324), or on from the step whose learning-rate scale
            is below ``start_scale`` (PR #549).
        start_scale: Threshold of the late start.
        layers: How many bits each group of layers gets.

    Raises:
        ValueError: If the threshold is out of range, no group has bits, or the budget comes later
            among the Trainer's callbacks.
    """

    def __init__(
        self,
        start: Literal["never", "first_step", "late"] = "never",
        start_scale: float = 0.15,
        layers: FakeQuantConfig = FakeQuantConfig(),
    ) -> None:
        if not 0 < start_scale <= 1:
            raise ValueError(f"qat.start_scale must be above 0 and at most 1, got {start_scale}")
        if start != "never" and all(layers.bits(group) is None for group in ROUNDED_GROUPS):
            raise ValueError(
                f"qat.start is {start} but qat.layers gives no group any bits: set those of the "
                "groups to round, or qat.start to never"
            )
        self.start = start
        self.start_scale = start_scale
        self.layers = layers
        self.is_on = False
        self.first_step: int | None = None
        """First optimizer step with rounded weights."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit begins: refuse a threshold out of reach, compare with the export."""
        if stage != "fit" or self.start == "never":
            return
        require_behind(trainer, self, WallClockBudget)
        if self.start == "late":
            self._check_within_reach(trainer, pl_module)
        exporter = optional_callback(trainer, GPTQExport)
        if exporter is not None:
            self._compare_with(exporter)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a checkpoint's callbacks are restored: take up its state, announce both."""
        if self.start == "first_step":
            self.is_on = True
        self._apply(pl_module)
        if self.start == "late" and not self.is_on:
            budget = find_callback(trainer, WallClockBudget)
            budget.variants.append(lambda: self._switched_on(pl_module))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: note where, if it is on already."""
        if self.is_on and self.first_step is None:
            self.first_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before a micro-batch: switch on before the first of a step that is late enough."""
        if self.start != "late" or self.is_on or batch_idx % trainer.accumulate_grad_batches:
            return
        if pl_module.lr_scale < self.start_scale:
            self.is_on, self.first_step = True, trainer.global_step
            self._apply(pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: log the switch's position with the other curves."""
        step_is_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = step_is_complete and trainer.global_step % trainer.log_every_n_steps == 0
        if due and self.start != "never" and trainer.logger is not None:
            position = {"schedule/fake_quantization": float(self.is_on)}
            trainer.logger.log_metrics(position, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: whatever trains the model from here on sees plain weights."""
        set_fake_quantization(pl_module.gpt, None)
        if self.start == "late" and not self.is_on:
            rank_zero_warn(
                "qat.start is late, but the run ended before the learning-rate scale fell below "
                f"qat.start_scale={self.start_scale} (it was {pl_module.lr_scale:.3f}): "
                "no step was fake-quantised"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return whether it is on, and since when."""
        return {"is_on": self.is_on, "first_step": self.first_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the same position, unless it is off now."""
        if self.start == "never":
            if state_dict["is_on"]:
                rank_zero_warn(
                    "the checkpoint was trained with fake quantisation, which goes off now because "
                    "qat.start is never"
                )
            return
        self.is_on, self.first_step = state_dict["is_on"], state_dict["first_step"]

    def report(self) -> dict[str, Any]:
        """Return the setting, and the step from which it acted."""
        start = f"late, below scale {self.start_scale:g}" if self.start == "late" else self.start
        return {"start": start, "layers": str(self.layers), "first_step": self.first_step}

    def _apply(self, pl_module: pl.LightningModule) -> None:
        set_fake_quantization(pl_module.gpt, self.layers if self.is_on else None)

    @contextmanager
    def _switched_on(self, pl_module: pl.LightningModule) -> Iterator[None]:
        set_fake_quantization(pl_module.gpt, self.layers)
        try:
            yield
        finally:
            self._apply(pl_module)

    def _check_within_reach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        budget = find_callback(trainer, WallClockBudget)
        schedule, progress = pl_module.schedule, budget.progress
        # On a time budget the last step starts just before its end; in steps it is known.
        if progress.budget_seconds is not None:
            last = replace(progress, elapsed_seconds=progress.budget_seconds)
        else:
            last = replace(progress, step=progress.max_steps - 1)
        lowest = lr_scale(last, schedule)
        if lowest >= self.start_scale:
            raise ValueError(
                f"qat.start is late, but the learning-rate scale of the last step is {lowest:.3g} "
                f"and never falls below qat.start_scale={self.start_scale}: lengthen "
                "model.schedule's warm-down, raise qat.start_scale, or set qat.start to first_step"
            )

    def _compare_with(self, exporter: GPTQExport) -> None:
        # The projections of the other groups are small, and mostly stored in floating point.
        rules = {"attention": exporter.quant.attention, "mlp": exporter.quant.mlp}
        for group, rule in rules.items():
            bits = getattr(self.layers, group)
            if bits is not None and rule.store == "codes" and rule.grid.bits != bits:
                rank_zero_warn(
                    f"qat.layers.{group} rounds to {bits} bits in training, but "
                    f"artifact.quant.{group} stores {rule.grid.bits}"
                )
