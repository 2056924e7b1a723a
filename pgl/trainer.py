"""Lightning's Trainer, with ``export``, and with saving that the budget does not pay for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from callbacks.divergence_guard import DivergenceGuard
from callbacks.find import find_callback, optional_callback
from callbacks.gptq_export import GPTQExport
from callbacks.rank_watch import RankWatch
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.artifact import is_artifact
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.average_config import smallest_count
from pgl.signals import take_over_signals


class GolfTrainer(pl.Trainer):
    """A Trainer that also exports, and reads artifacts wherever it reads checkpoints."""

    @override
    def fit(
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train, average, quantise, pack and score a model; resume with --ckpt_path.

        SIGTERM and Ctrl-C end the run after the current step, with a checkpoint.

        Args:
            model: The module to train.
            train_dataloaders: Not used: the data module has the loaders.
            val_dataloaders: Not used.
            datamodule: The data.
            ckpt_path: Checkpoint to resume from.
            weights_only: As in Lightning; checkpoints of pgl always hold plain values only.
        """
        if ckpt_path is not None and is_artifact(ckpt_path):
            raise ValueError(
                f"--ckpt_path {ckpt_path} is an artifact, which has no optimizer state to resume "
                "from: give the run's last.ckpt"
            )
        take_over_signals(self)
        ranks = optional_callback(self, RankWatch)
        if ranks is not None:
            ranks.limit_collectives(self.strategy)
        try:
            super().fit(
                model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only
            )
        except Exception as error:
            if ranks is None or ranks.error is None:
                raise
            for note in getattr(error, "__notes__", []):
                ranks.error.add_note(note)
            raise ranks.error from error

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str,
        out: str = "model.pgl",
    ) -> None:
        """Make an artifact from a checkpoint, without training, on one device.

        The artifact's metadata say how long the checkpoint was trained, and what calibrated GPTQ.
        No training clock runs, so only samples may calibrate it in a record; anything else is
        warned of.

        Args:
            model: The module that the checkpoint belongs to.
            datamodule: Names the tokenizer, and calibrates GPTQ.
            ckpt_path: The checkpoint. ``averaging.source`` says which of the weights that it keeps
                are exported.
            out: The artifact to write.

        Raises:
            ValueError: If the Trainer has several devices, or ``ckpt_path`` is an artifact, no
                checkpoint of pgl, of another tokenizer than the data's, or without the average
                that was asked for.
        """
        if self.world_size > 1:
            raise ValueError("pgl export runs on one device: set trainer.devices to 1")
        if is_artifact(ckpt_path):
            raise ValueError(f"--ckpt_path {ckpt_path} is an artifact already: give a checkpoint")
        checkpoint = GolfCheckpointIO().load_checkpoint(ckpt_path, map_location="cpu")
        budget = find_callback(self, WallClockBudget)
        if budget.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                f"--ckpt_path {ckpt_path} is not a checkpoint of a pgl run: give its last.ckpt"
            )
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
        budget.load_state_dict(checkpoint["callbacks"][budget.state_key])
        budget.elapsed = budget.phases.seconds("train")
        self.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])  # has the global step
        model.to(self.strategy.root_device)
        self._data_connector.attach_data(model, datamodule=datamodule)
        datamodule.prepare_data()
        datamodule.setup("fit")
        data_class = type(datamodule).__qualname__
        if data_class not in checkpoint:
            raise ValueError(
                f"--ckpt_path {ckpt_path} was not trained with {data_class}: give the data module "
                "of its run"
            )
        datamodule.load_state_dict(checkpoint[data_class])
        weights = self._averaged_weights(model, checkpoint, ckpt_path)
        exporter = find_callback(self, GPTQExport)
        exporter.exported = exporter.export(self, model, weights, Path(out), in_budget=False)
        print(exporter.summary())

    def _averaged_weights(
        self, model: pl.LightningModule, checkpoint: dict[str, Any], ckpt_path: str
    ) -> Mapping[str, Tensor]:
        """Return the weights of ``averaging.source`` as the checkpoint keeps them."""
        averaging = find_callback(self, WeightAveraging)
        averaging.setup(self, model, "fit")
        saved = checkpoint["callbacks"].get(averaging.state_key, {"averages": {}})["averages"]
        usable = [
            name
            for name, config in averaging.configs.items()
            if name in saved and saved[name]["count"] >= smallest_count(config)
        ]
        if averaging.source != "raw" and averaging.source not in usable:
            raise ValueError(
                f"--ckpt_path {ckpt_path} keeps no {averaging.source} average: set "
                f"--averaging.source to {' or '.join(['raw', *usable])}"
            )
        if averaging.source != "raw":
            source = averaging.averages[averaging.source]
            source.load_state_dict(saved[averaging.source])
        return averaging.source_weights(model)

    @override
    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any = None,
    ) -> None:
        """Save a checkpoint of finite weights while the training clock stands still."""
        budget = find_callback(self, WallClockBudget)
        guard = optional_callback(self, DivergenceGuard)
        if guard is not None:
            guard.settle(self, self.lightning_module)
        paused = budget.running
        if paused:
            budget.pause("checkpoint", self.lightning_module)
        super().save_checkpoint(filepath, weights_only, storage_options)
        if paused:
            budget.resume("checkpoint", self.lightning_module)
