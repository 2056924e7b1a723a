"""Averages of the weights over the run: exponential, stochastic (SWA) and of the last snapshots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.wall_clock_budget import WallClockBudget
from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage
from pgl.optim import Progress, swa_due

Source = Literal["raw", "ema", "swa"]
Average = ExponentialAverage | UniformAverage | LastAverage


@dataclass(frozen=True)
class EMAConfig:
    """An exponential moving average (PR #703: decay 0.997, worth about 0.001 BPB)."""

    decay: float = 0.997
    """Share of the old average that a new step keeps."""
    horizon_fraction: float | None = None
    """Averaging horizon 1 / (1 - decay) as a fraction of the run, in place of decay: a short run is
    then not averaged with its own initialisation."""
    start_fraction: float = 0.0
    """Share of the budget after which averaging starts."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"averaging.ema.decay must be in [0, 1), got {self.decay}")
        if self.horizon_fraction is not None and not 0 < self.horizon_fraction <= 1:
            raise ValueError(
                f"averaging.ema.horizon_fraction must be in (0, 1], got {self.horizon_fraction}"
            )
        if not 0 <= self.start_fraction < 1:
            raise ValueError(
                f"averaging.ema.start_fraction must be in [0, 1), got {self.start_fraction}"
            )


@dataclass(frozen=True)
class SnapshotConfig:
    """Snapshots at regular steps once the learning rate has fallen far enough."""

    every_steps: int = 50
    """Optimizer steps between snapshots (PR #236: 200, #324: 25, #388: 50)."""
    start_scale: float = 0.2
    """Snapshots are taken while the learning-rate scale is below this (#236: 0.5, #324: 0.35);
    above 1 the whole run is covered."""
    count_from: Literal["zero", "one"] = "one"
    """Number of the first step when counting every_steps (#236: zero)."""
    keep: int | None = None
    """Average only the most recent so many snapshots. None: all of them."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"averaging: every_steps must be at least 1, got {self.every_steps}")
        if self.start_scale <= 0:
            raise ValueError(f"averaging: start_scale must be positive, got {self.start_scale}")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"averaging: keep must be at least 1 or null, got {self.keep}")


class WeightAveraging(Callback):
    """Keeps averages of the weights in float32, and says which weights are exported.

    Averages are updated after each optimizer step, beside each other. Training goes on with the raw
    weights. In a checkpoint ``state_dict`` holds the weights of ``source`` (the raw ones until its
    first update) and ``current_model_state`` the raw ones, as with Lightning's own
    ``WeightAveraging``, so ``validate --ckpt_path`` scores the average.

    Note:
        An average that was asked for and never updated is reported and warned about; the raw
        weights are exported then, never the initial ones.

    Example::

        WeightAveraging(ema=EMAConfig(decay=0.997), source="ema")

    Args:
        ema: Exponential moving average. None: off.
        swa: Mean of snapshots taken late in the run. None: off.
        source: The weights that are exported and saved as the model.
        device: Where averages are kept: with the weights, or in the host's memory.

    Raises:
        ValueError: If the source is an average that is off.
    """

    def __init__(
        self,
        ema: EMAConfig | None = EMAConfig(),
        swa: SnapshotConfig | None = None,
        source: Source = "ema",
        device: Literal["weights", "cpu"] = "weights",
    ) -> None:
        if source != "raw" and {"ema": ema, "swa": swa}[source] is None:
            raise ValueError(
                f"averaging.source is {source} but averaging.{source} is off: switch it on, or set "
                "averaging.source to raw"
            )
        self.ema = ema
        self.swa = swa
        self.source = source
        self.device = device
        self.averages: dict[str, Average] = {}
        self.first_update_step: dict[str, int] = {}
        self._steps_seen = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit begins: make the averages, empty."""
        if stage != "fit":
            return
        device = "cpu" if self.device == "cpu" else None
        if self.ema is not None:
            self.averages.setdefault("ema", ExponentialAverage(self.ema.decay, device=device))
        if self.swa is not None:
            keep = self.swa.keep
            swa = LastAverage(keep, device=device) if keep else UniformAverage(device=device)
            self.averages.setdefault("swa", swa)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: an EMA over the whole run starts from the first weights."""
        self._steps_seen = trainer.global_step
        if self.ema is not None and self.ema.start_fraction == 0 and trainer.global_step == 0:
            self._update("ema", 0, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Called after a micro-batch: update whatever is due once a step is complete."""
        if trainer.global_step == self._steps_seen:
            return
        self._steps_seen = trainer.global_step
        progress = find_callback(trainer, WallClockBudget).progress
        if self.ema is not None and progress.fraction >= self.ema.start_fraction:
            decay = ema_decay(progress, self.ema)
            self._update("ema", trainer.global_step, pl_module, decay=decay)
        if self.swa is not None and swa_due(
            trainer.global_step - 1,
            pl_module.lr_scale,
            self.swa.start_scale,
            self.swa.every_steps,
            self.swa.count_from,
        ):
            self._update("swa", trainer.global_step, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: say so if an average never acted."""
        for name, average in self.averages.items():
            if average.count == 0:
                rank_zero_warn(
                    f"averaging.{name} was never updated: the run ended before its start condition "
                    "was met, so the raw weights stand in for it"
                )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called before a checkpoint is written: the source's weights become the model's."""
        weights = self.source_weights(pl_module)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])
        for name, weight in weights.items():
            checkpoint["state_dict"][f"gpt.{name}"] = weight

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called before a checkpoint is restored for training: go on with the raw weights."""
        if trainer.state.fn == TrainerFn.FITTING and "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return every average and when it was first updated."""
        return {
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "first_update_step": dict(self.first_update_step),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages that are still switched on, and warn of those that are not."""
        for name, state in state_dict["averages"].items():
            if name in self.averages:
                self.averages[name].load_state_dict(state)
            elif {"ema": self.ema, "swa": self.swa}[name] is None:
                rank_zero_warn(
                    f"the checkpoint's {name} average of {state['count']} updates is dropped "
                    f"because averaging.{name} is off: switch it on to go on with it"
                )
        self.first_update_step = {
            name: step
            for name, step in state_dict["first_update_step"].items()
            if name in self.averages
        }

    def weights(self, pl_module: pl.LightningModule, source: Source) -> Mapping[str, Tensor]:
        """Return the GPT's weights by name: those of an average, or the raw ones.

        Averages come in each parameter's own dtype. An average without updates gives the raw
        weights.
        """
        raw = dict(pl_module.gpt.named_parameters())
        average = self.averages.get(source)
        if average is None or average.count == 0:
            return {name: weight.detach() for name, weight in raw.items()}
        return {
            name: weight.to(raw[name].device, raw[name].dtype)
            for name, weight in average.average().items()
        }

    def source_weights(self, pl_module: pl.LightningModule) -> Mapping[str, Tensor]:
        """Return the weights that are exported."""
        return self.weights(pl_module, self.source)

    def report(self) -> dict[str, Any]:
        """Return which averages acted, and from which step on."""
        return {
            "source": self.source,
            **{
                name: {
                    "updates": average.count,
                    "first_update_step": self.first_update_step.get(name),
                }
                for name, average in self.averages.items()
            },
        }

    def _update(
        self, name: str, step: int, pl_module: pl.LightningModule, decay: float | None = None
    ) -> None:
        self.first_update_step.setdefault(name, step)
        average, weights = self.averages[name], dict(pl_module.gpt.named_parameters())
        if isinstance(average, ExponentialAverage):
            average.update(weights, decay=decay)
        else:
            average.update(weights)


def ema_decay(progress: Progress, config: EMAConfig) -> float:
    """Return the decay of one EMA update.

    With ``horizon_fraction`` the horizon 1 / (1 - decay) is that share of the run's expected number
    of steps, taken from the pace so far.
    """
    if config.horizon_fraction is None:
        return config.decay
    expected_steps = progress.step / max(progress.fraction, 1e-6)
    return 1.0 - 1.0 / max(config.horizon_fraction * expected_steps, 1.0)
