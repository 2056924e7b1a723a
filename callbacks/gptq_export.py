"""From trained weights to one file that fits the limit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.find import find_callback
from callbacks.progress import print_lines, track
from callbacks.run_folder import run_folder
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.artifact import SizeReport, load, save
from pgl.artifact.codecs import codec_for
from pgl.collectives import on_rank_zero
from pgl.quant import (
    QuantConfig,
    QuantizationError,
    average_over_ranks,
    collect_hessians,
    quantization_errors,
    quantize_state,
)

FILE_NAME = "model.pgl"


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    """The artifact."""
    size: SizeReport
    """Where its bytes go."""
    errors: dict[str, QuantizationError]
    """What quantisation lost, by tensor."""
    state_dict: dict[str, Tensor]
    """The GPT's weights as read back from the file, on the CPU."""


class GPTQExport(Callback):
    """Quantises the weights after training, packs them into one file and reads it back.

    Groups whose ``quant.<group>.method`` is ``gptq`` are calibrated on the first
    ``calibration_sequences`` training sequences, shared out over the ranks; keep time for that with
    :class:`callbacks.WallClockBudget`'s ``reserve_seconds``. Validation tokens are never used.

    Note:
        Rank 0 quantises and writes; the other ranks wait, and get the weights that it read back.

    Example::

        Trainer(callbacks=[WallClockBudget(), WeightAveraging(), GPTQExport()])

    Args:
        quant: Grid and method of each tensor group.
        codec: How the streams are compressed, a name in :data:`pgl.artifact.CODECS`.
        limit_bytes: Largest length of the file. None: no limit.
        calibration_sequences: Training sequences that calibrate GPTQ.
        file_name: Name of the artifact in the run's folder.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        quant: QuantConfig = QuantConfig(),
        codec: str = "zstd",
        limit_bytes: int | None = 16_000_000,
        calibration_sequences: int = 64,
        file_name: str = FILE_NAME,
    ) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise ValueError(f"artifact.limit_bytes must be positive or null, got {limit_bytes}")
        if calibration_sequences < 1:
            raise ValueError(
                f"artifact.calibration_sequences must be at least 1, got {calibration_sequences}"
            )
        codec_for(codec, is_codes=True)  # refused now, not after the training
        self.quant = quant
        self.codec = codec
        self.limit_bytes = limit_bytes
        self.calibration_sequences = calibration_sequences
        self.file_name = file_name
        self.exported: Exported | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: calibration needs a part of the budget."""
        if stage != "fit" or not self.quant.needs_hessians():
            return
        budget = find_callback(trainer, WallClockBudget)
        if budget.seconds is not None and budget.reserve_seconds == 0:
            rank_zero_warn(
                "GPTQ will read training tokens after the budget is spent, which the challenge "
                "does not allow: set budget.reserve_seconds to what calibration takes"
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: export the weights that the averaging callback chose."""
        weights = find_callback(trainer, WeightAveraging).source_weights(pl_module)
        self.exported = self.export(
            trainer, pl_module, weights, run_folder(trainer) / self.file_name
        )
        size = self.exported.size
        print_lines(trainer, f"\n{size.table()}")
        if trainer.logger is not None:
            scalars = {"final/artifact_bytes": size.total_bytes}
            trainer.logger.log_metrics(scalars, step=trainer.global_step)

    def export(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        path: Path,
    ) -> Exported:
        """Quantise, pack, write and read back. All ranks call it, all get the result.

        Args:
            trainer: Its data module names the tokenizer and calibrates.
            pl_module: The module whose GPT is exported.
            weights: The GPT's weights by name.
            path: Where the artifact goes.

        Raises:
            ArtifactTooLarge: If the file would exceed the limit.
        """
        phases = find_callback(trainer, WallClockBudget).phases
        hessians = None
        if self.quant.needs_hessians():
            with phases.measure("calibrate", counts=True):
                hessians = self._calibrate(trainer, pl_module, weights)
                if pl_module.device.type == "cuda":
                    torch.cuda.synchronize(pl_module.device)

        def quantize_and_pack() -> Exported:
            with track(trainer, "quantise", 1) as advance, phases.measure("quantise"):
                stored = quantize_state(weights, self.quant, hessians, device=pl_module.device)
                errors = quantization_errors(weights, stored, hessians)
                advance()
            with track(trainer, "pack", 1) as advance, phases.measure("pack"):
                size = save(
                    path,
                    pl_module.gpt_config,
                    stored,
                    metadata=self._metadata(trainer),
                    codec=self.codec,
                    limit_bytes=self.limit_bytes,
                    on_progress=advance,
                )
            with phases.measure("read back"):
                return Exported(path, size, errors, load(path).state_dict)

        return on_rank_zero(trainer.strategy, quantize_and_pack)

    def report(self) -> dict[str, Any]:
        """Return where the artifact is and what its parts take."""
        if self.exported is None:
            return {}
        size = self.exported.size
        return {
            "file": self.exported.path.name,
            "codec": self.codec,
            "total_bytes": size.total_bytes,
            "limit_bytes": size.limit_bytes,
            "headroom_bytes": size.headroom_bytes,
            "code_bytes": size.code_bytes,
            "container_bytes": size.overhead_bytes,
            "groups": [
                {
                    "name": group.name,
                    "parameters": group.parameters,
                    "packed_bytes": group.packed_bytes,
                    "bits_per_weight": round(group.bits_per_weight, 4),
                }
                for group in size.groups
            ],
            "relative_error": {
                name: round(error.relative, 6) for name, error in self.exported.errors.items()
            },
        }

    def _calibrate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        data = trainer.datamodule
        layout = data.calibration_layout(self.calibration_sequences)
        batches = (
            torch.from_numpy(layout.read_micro_batch(data.stream, 0, index)[:, :-1].astype("int32"))
            for index in range(layout.accumulate)
        )
        with (
            track(trainer, "calibrate", layout.accumulate) as advance,
            pl_module.with_weights(weights),
            trainer.precision_plugin.val_step_context(),
        ):
            hessians = collect_hessians(
                pl_module.gpt,
                _counted(batches, advance),
                device=pl_module.device,
                forward=pl_module.gpt.features,
            )
        if trainer.world_size > 1:
            average_over_ranks(hessians)
        return hessians

    def _metadata(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            "tokenizer_sha256": trainer.datamodule.tokenizer_sha256,
            "training_steps": trainer.global_step,
            "training_seconds": round(find_callback(trainer, WallClockBudget).elapsed, 3),
        }


def _counted(batches: Iterable[Tensor], advance: Callable[[], None]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        advance()
