"""Averages of the weights over the run: exponential, stochastic (SWA) and of the last snapshots."""

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback, require_behind
from callbacks.wall_clock_budget import WallClockBudget
from pgl.average_config import (
    Average,
    EMAConfig,
    SnapshotConfig,
    ema_decay,
    make_average,
    smallest_count,
)
from pgl.averaging import ExponentialAverage
from pgl.evaluate import BitsPerByte, evaluate_windows
from pgl.optim import Progress, intervals_done, swa_due

AverageName = Literal["ema", "swa", "last"]
Source = Literal["raw", "ema", "swa", "last"]

NAMES: tuple[AverageName, ...] = get_args(AverageName)
INITIAL_SHARE_WARNED_OF = 0.05
EARLY_FRACTION = 0.1
"""Share of the run in which an EMA's first weights count as those that training began with."""


class WeightAveraging(Callback):
    """Keeps averages of the weights in float32, and says which weights are exported.

    Averages are updated after each optimizer step, beside each other. Training goes on with the raw
    weights. In a checkpoint ``state_dict`` holds the weights of ``source`` (the raw ones until it
    is usable) and ``current_model_state`` the raw ones, as with Lightning's own
    ``WeightAveraging``, so ``validate --ckpt_path`` scores the average.

    Note:
        An average that was asked for and never updated is reported and warned about; the raw
        weights are exported then, never the initial ones. So it is with a mean of one snapshot
        (PRs #236 and #388), unless ``keep`` is 1. An EMA that still holds more than 5 % of the
        initial weights when training ends is warned about as well.

    Note:
        It belongs behind the budget, whose progress it follows.

    Note:
        Numbers of steps and the EMA's decay are those of the full recipe; ``budget.step_scale``
        fits them to a shorter run.

    Example::

        WeightAveraging(ema=EMAConfig(decay=0.997), source="ema", score=["ema"])

    Args:
        ema: Exponential moving average. None: off.
        swa: Mean of snapshots taken late in the run. None: off.
        last: Mean of the most recent ``keep`` snapshots, a second such average. None: off.
        source: The weights that are exported and saved as the model.
        score: Averages that each validation during training scores too, on the windows of the raw
            weights and while the clock stands still: all of them (true), or those named.
        device: Where averages are kept: with the weights, or in the host's memory.

    Raises:
        ValueError: If the source or a scored average is off, ``last`` has no ``keep``, or the
            budget comes later among the Trainer's callbacks.
    """

    def __init__(
        self,
        ema: EMAConfig | None = EMAConfig(),
        swa: SnapshotConfig | None = None,
        last: SnapshotConfig | None = None,
        source: Source = "ema",
        score: bool | list[AverageName] = False,
        device: Literal["weights", "cpu"] = "weights",
    ) -> None:
        configs = {"ema": ema, "swa": swa, "last": last}
        if source != "raw" and configs[source] is None:
            raise ValueError(
                f"averaging.source is {source} but averaging.{source} is off: switch it on, or set "
                "averaging.source to raw"
            )
        for name in score if isinstance(score, list) else ():
            if configs[name] is None:
                raise ValueError(
                    f"averaging.score names {name} but averaging.{name} is off: switch it on"
                )
        if last is not None and last.keep is None:
            raise ValueError("averaging.last.keep must say how many snapshots to average")
        self.ema = ema
        self.swa = swa
        self.last = last
        self.source = source
        self.score = score
        self.device = device
        self.configs: dict[str, EMAConfig | SnapshotConfig] = {}
        """The averages that are on, as this run keeps them: fitted to the budget's step_scale."""
        self.averages: dict[str, Average] = {}
        self.first_update_step: dict[str, int] = {}
        self._intervals: dict[str, int] = {}
        self._steps_seen = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when fit begins: make the averages, empty."""
        if stage != "fit":
            return
        require_behind(trainer, self, WallClockBudget)
        step_scale = find_callback(trainer, WallClockBudget).step_scale
        device = "cpu" if self.device == "cpu" else None
        for name in NAMES:
            config = getattr(self, name)
            if config is not None:
                self.configs[name] = config.scaled(step_scale)
                self.averages.setdefault(name, make_average(self.configs[name], device))

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
        for name, config in self.configs.items():
            if isinstance(config, EMAConfig):
                if progress.fraction >= config.start_fraction:
                    decay = ema_decay(progress, config)
                    self._update(name, progress.step, pl_module, decay=decay)
            elif self._snapshot_due(name, config, progress, pl_module.lr_scale):
                self._update(name, progress.step, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when validation has scored the raw weights: score averages on the same windows."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for name in NAMES if self.score is True else self.score or ():
            if self.is_usable(name):
                bpb = self._score(trainer, pl_module, name)
                # Every rank has the sum of all ranks: the mean is the value itself.
                pl_module.log(f"val/bpb_{name}", bpb, sync_dist=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: warn of an average that did not do what it is for."""
        for name, average in self.averages.items():
            if average.count == 0:
                rank_zero_warn(
                    f"averaging.{name} was never updated: the run ended before its start condition "
                    "was met, so the raw weights stand in for it"
                )
            elif not self.is_usable(name):
                rank_zero_warn(
                    f"averaging.{name} took a single snapshot, which averages nothing, so the raw "
                    f"weights stand in for it: set averaging.{name} to a smaller distance of "
                    "snapshots or a larger start_scale"
                )
        share = self._initial_share(trainer)
        if share > INITIAL_SHARE_WARNED_OF:
            rank_zero_warn(
                f"averaging.ema still holds {share:.0%} of the weights that training began with: "
                "set budget.step_scale, an averaging.ema.horizon_fraction of at most 0.3, or a "
                "smaller averaging.ema.decay"
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
            "intervals": dict(self._intervals),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages that are still switched on, and warn of those that are not."""
        for name, state in state_dict["averages"].items():
            if name in self.averages:
                self.averages[name].load_state_dict(state)
            elif getattr(self, name) is None:
                rank_zero_warn(
                    f"the checkpoint's {name} average of {state['count']} updates is dropped "
                    f"because averaging.{name} is off: switch it on to go on with it"
                )
        self.first_update_step = {
            name: step
            for name, step in state_dict["first_update_step"].items()
            if name in self.averages
        }
        self._intervals = dict(state_dict.get("intervals", {}))

    def weights(self, pl_module: pl.LightningModule, source: Source) -> Mapping[str, Tensor]:
        """Return the GPT's weights by name: those of an average, or the raw ones.

        Averages come in each parameter's own dtype. An average that is not usable gives the raw
        weights.
        """
        raw = dict(pl_module.gpt.named_parameters())
        if not self.is_usable(source):
            return {name: weight.detach() for name, weight in raw.items()}
        return {
            name: weight.to(raw[name].device, raw[name].dtype)
            for name, weight in self.averages[source].average().items()
        }

    def is_usable(self, name: str) -> bool:
        """Return whether an average is kept and has enough updates to stand for the model."""
        average = self.averages.get(name)
        return average is not None and average.count >= smallest_count(self.configs[name])

    def source_weights(self, pl_module: pl.LightningModule) -> Mapping[str, Tensor]:
        """Return the weights that are exported."""
        return self.weights(pl_module, self.source)

    def report(self) -> dict[str, Any]:
        """Return the averages as they were kept, whether they acted, and from which step on."""
        return {
            "source": self.source,
            **{
                name: {
                    "setting": str(self.configs[name]),
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

    def _snapshot_due(
        self, name: str, config: SnapshotConfig, progress: Progress, scale: float
    ) -> bool:
        if config.every_steps is not None:
            return swa_due(
                progress.step - 1, scale, config.start_scale, config.every_steps, config.count_from
            )
        assert config.every_fraction is not None
        before = self._intervals.get(name, 0)
        self._intervals[name] = intervals_done(progress, config.every_fraction)
        return self._intervals[name] > before and scale < config.start_scale

    def _score(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: AverageName
    ) -> Tensor:
        data = trainer.datamodule
        (num_batches,) = trainer.num_val_batches  # trainer.limit_val_batches cuts it short
        batches = islice(data.val_dataloader(), int(num_batches))
        with (
            pl_module.with_weights(self.weights(pl_module, name)),
            trainer.precision_plugin.val_step_context(),
        ):
            result = evaluate_windows(
                pl_module.gpt,
                batches,
                BitsPerByte(data.byte_table),  # the module's own is about to report the raw weights
                device=pl_module.device,
                score=pl_module.score_batch,
            )
        return result["bpb"]

    def _initial_share(self, trainer: pl.Trainer) -> float:
        """Return how much of the EMA is still the weights that training began with."""
        config, started = self.configs.get("ema"), self.first_update_step.get("ema")
        if not isinstance(config, EMAConfig) or started is None:
            return 0.0
        progress = find_callback(trainer, WallClockBudget).progress
        if started > max(1, EARLY_FRACTION * progress.step):
            return 0.0
        return ema_decay(progress, config) ** (self.averages["ema"].count - 1)
