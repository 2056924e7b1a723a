"""From trained weights to one file that fits the limit."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from callbacks.calibration import (
    CalibrationSource,
    calibrate,
    counts_as_training,
    record_legal,
    sampling_tokens,
)
from callbacks.exported import Exported
from callbacks.find import find_callback
from callbacks.progress import print_lines, track
from callbacks.run_folder import run_folder
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.artifact import Packed, fit_to_limit, load, pack_model
from pgl.artifact.codecs import check_codec
from pgl.artifact.fit import Fit
from pgl.challenge import ARTIFACT_LIMIT_BYTES
from pgl.collectives import led_by_rank_zero, on_rank_zero
from pgl.phases import PhaseTimer
from pgl.quant import Calibration, QuantConfig, StateQuantizer, StoredTensor, quantization_losses

FILE_NAME = "model.pgl"
SAMPLED_SEQUENCES = 64  # more of them are warned of: their cost, not their use, was measured


class GPTQExport(Callback):
    """Quantises the weights after training, packs them into one file and reads it back.

    Groups whose ``quant.<group>.method`` is ``gptq`` are calibrated; validation tokens are never
    used for that. The ranks share out the calibration sequences and the matrices.

    The file fits: if the plan is over the limit, all steps are made coarser until it is not, and
    the run says so. ``search="step"`` makes them finer too where the plan leaves bytes unused.

    Note:
        Rank 0 packs and writes; the other ranks get the weights that it read back. A search packs
        about three times, which codec "rans" does in seconds and the others in half a minute each.

    Example::

        Trainer(callbacks=[WallClockBudget(), WeightAveraging(), GPTQExport()])

    Args:
        quant: Grid and method of each tensor group.
        codec: How the streams are compressed, a name in :data:`pgl.artifact.CODECS`.
        limit_bytes: Largest length of the file. None: no limit.
        search: Whether steps stay the plan's unless it does not fit, or are searched for the size.
        calibration: What GPTQ is calibrated on. "training": the first training sequences, in the
            part of the budget that :class:`callbacks.WallClockBudget`'s ``reserve_seconds`` keeps.
            "samples": sequences that the model writes. "training_after_budget": training sequences
            on no budget, as PR #703 did, which the challenge does not allow.
        calibration_sequences: Sequences of ``data.seq_len`` tokens that calibrate GPTQ. Samples of
            length T cost T / 2 tokens of forward pass for each of their tokens.
        file_name: Name of the artifact in the run's folder.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        quant: QuantConfig = QuantConfig(),
        codec: str = "zstd",
        limit_bytes: int | None = ARTIFACT_LIMIT_BYTES,
        search: Literal["off", "step"] = "off",
        calibration: CalibrationSource = "training",
        calibration_sequences: int = 64,
        file_name: str = FILE_NAME,
    ) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise ValueError(f"artifact.limit_bytes must be positive or null, got {limit_bytes}")
        if search == "step" and limit_bytes is None:
            raise ValueError(
                "artifact.search is step, which needs a size to search for: set "
                "artifact.limit_bytes, or artifact.search to off"
            )
        if not 1 <= calibration_sequences <= 65_536:
            raise ValueError(
                "artifact.calibration_sequences must be from 1 to 65536, got "
                f"{calibration_sequences}"
            )
        if Path(file_name).name != file_name or not file_name:
            raise ValueError(
                f'artifact.file_name must be a name in the run\'s folder, got "{file_name}"'
            )
        check_codec(codec)  # refused now, not after the training
        self.quant = quant
        self.codec = codec
        self.limit_bytes = limit_bytes
        self.search = search
        self.calibration = calibration
        self.calibration_sequences = calibration_sequences
        self.file_name = file_name
        self.exported: Exported | None = None
        self.calibrated: dict[str, Any] | None = None
        """What the last calibration read, and whether the clock counted it; None if there was none.
        """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run begins: calibration needs a part of the budget, and even shares."""
        if stage != "fit" or not self.quant.needs_hessians():
            return
        trainer.datamodule.calibration_layout(self.calibration_sequences)  # refused now, not later
        budget = find_callback(trainer, WallClockBudget)
        unreserved = budget.seconds is not None and budget.reserve_seconds == 0
        if not record_legal(self.calibration) or (self.calibration == "training" and unreserved):
            rank_zero_warn(
                "GPTQ will read training tokens after the budget is spent, which the challenge "
                "does not allow: set artifact.calibration to samples, or to training with "
                "budget.reserve_seconds set to what calibration takes"
            )
        if self.calibration == "samples" and self.calibration_sequences > SAMPLED_SEQUENCES:
            tokens = sampling_tokens(self.calibration_sequences, trainer.datamodule.seq_len)
            rank_zero_warn(
                f"writing {self.calibration_sequences:,} calibration samples takes {tokens:,} "
                "tokens of forward pass, as sampling has no cache: set "
                f"artifact.calibration_sequences to {SAMPLED_SEQUENCES}"
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: export the weights that the averaging callback chose."""
        weights = find_callback(trainer, WeightAveraging).source_weights(pl_module)
        self.exported = self.export(
            trainer, pl_module, weights, run_folder(trainer) / self.file_name
        )
        print_lines(trainer, f"\n{self.summary()}")
        if trainer.logger is not None:
            scalars = {"final/artifact_bytes": self.exported.size.total_bytes}
            trainer.logger.log_metrics(scalars, step=trainer.global_step)

    def export(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        path: Path,
        in_budget: bool = True,
    ) -> Exported:
        """Calibrate, quantise, pack, write and read back. All ranks call it, all get the result.

        Args:
            trainer: Its data module names the tokenizer and calibrates.
            pl_module: The module whose GPT is exported.
            weights: The GPT's weights by name.
            path: Where the artifact goes.
            in_budget: Whether a training clock runs that can count the calibration.

        Raises:
            ArtifactTooLarge: If the file would exceed the limit with every code zero.
        """
        calibration = self._calibrate(trainer, pl_module, weights, in_budget)
        fitted = self._quantise_to_fit(trainer, pl_module, weights, calibration)

        def write() -> Exported:
            assert fitted is not None
            phases = find_callback(trainer, WallClockBudget).phases
            return _write(path, *fitted, weights, calibration, phases)

        exported = on_rank_zero(trainer.strategy, write)
        self._say_what_the_limit_did(trainer, exported)
        return exported

    def summary(self) -> str:
        """Return the table of sizes and errors by tensor group."""
        assert self.exported is not None, "nothing was exported"
        return self.exported.size.table(self.exported.group_losses())

    def report(self) -> dict[str, Any]:
        """Return where the artifact is, what its parts take, and what they lost."""
        if self.exported is None:
            return {}
        exported, size = self.exported, self.exported.size
        return {
            "file": exported.path.name,
            "codec": self.codec,
            "total_bytes": size.total_bytes,
            "limit_bytes": size.limit_bytes,
            "headroom_bytes": size.headroom_bytes,
            "code_bytes": size.code_bytes,
            "container_bytes": size.overhead_bytes,
            "search": self.search,
            "step_factor": exported.step_factor,
            "output_error": exported.output_error(),
            "attempts": [asdict(attempt) for attempt in exported.attempts],
            "calibration": self._calibration_report(),
            "groups": exported.group_rows(),
            "relative_error": {
                name: round(loss.relative, 6) for name, loss in exported.losses.items()
            },
        }

    def _calibrate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        in_budget: bool,
    ) -> Calibration | None:
        """Return what GPTQ needs, the same on all ranks; None if it quantises no group."""
        self.calibrated = None
        if not self.quant.needs_hessians():
            return None
        if not in_budget and self.calibration != "samples":
            rank_zero_warn(
                "GPTQ reads training tokens while no training budget runs, which the challenge "
                "does not allow: set artifact.calibration to samples"
            )
        counted = in_budget and counts_as_training(self.calibration)
        phases = find_callback(trainer, WallClockBudget).phases
        with phases.measure("calibrate" if in_budget else "calibrate on no clock", counts=counted):
            calibration, text = calibrate(
                trainer,
                pl_module,
                weights,
                self.calibration,
                self.calibration_sequences,
                self.quant.needs_energies(),
            )
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
        self.calibrated = {
            "read": text.read,
            "tokens_read_on_rank_0": text.tokens_BT1.numel(),
            "counted": counted,
        }
        return calibration

    def _quantise_to_fit(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Mapping[str, Tensor],
        calibration: Calibration | None,
    ) -> tuple[Fit, Packed] | None:
        """Quantise and pack until the file fits; return the fit and its file, None off rank 0."""
        phases = find_callback(trainer, WallClockBudget).phases
        with phases.measure("quantise"):
            quantizer = StateQuantizer(weights, self.quant, calibration, pl_module.device)

        def quantise(step_factor: float) -> Mapping[str, StoredTensor]:
            with track(trainer, "quantise", 1) as advance, phases.measure("quantise"):
                stored = quantizer(step_factor)
                advance()
            return stored

        def search(
            quantise_on_all: Callable[[float], Mapping[str, StoredTensor]],
        ) -> tuple[Fit, Packed]:
            packs: list[Packed] = []

            def pack(stored: Mapping[str, StoredTensor]) -> int:
                with phases.measure("pack"):
                    packs.append(self._pack(trainer, pl_module, stored))
                return packs[-1].size.total_bytes

            refine = self.search == "step"
            fit = fit_to_limit(quantise_on_all, pack, self.limit_bytes, refine)
            return fit, packs[fit.chosen]

        return led_by_rank_zero(trainer.strategy, quantise, search)

    def _pack(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stored: Mapping[str, StoredTensor],
    ) -> Packed:
        with track(trainer, "pack", 1) as advance:
            return pack_model(
                pl_module.gpt_config,
                stored,
                metadata=self._metadata(trainer),
                codec=self.codec,
                limit_bytes=self.limit_bytes,
                on_progress=advance,
            )

    def _metadata(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            "tokenizer_sha256": trainer.datamodule.tokenizer_sha256,
            "training_steps": trainer.global_step,
            "training_seconds": round(find_callback(trainer, WallClockBudget).elapsed, 3),
            "calibration": self._calibration_report(),
        }

    def _calibration_report(self) -> dict[str, Any] | None:
        if not self.quant.needs_hessians():
            return None
        return {
            "source": self.calibration,
            "sequences": self.calibration_sequences,
            "record_legal": record_legal(self.calibration)
            if self.calibrated is None
            else self.calibrated["counted"] or self.calibrated["read"] == "samples",
            **(self.calibrated or {}),
        }

    def _say_what_the_limit_did(self, trainer: pl.Trainer, exported: Exported) -> None:
        planned = exported.attempts[0].total_bytes
        if self.limit_bytes is not None and planned > self.limit_bytes:
            print_lines(
                trainer,
                f"the planned artifact of {planned:,} bytes is over the limit of "
                f"{self.limit_bytes:,}: its steps are {exported.step_factor:.4f} times the plan's",
            )


def _write(
    path: Path,
    fit: Fit,
    packed: Packed,
    weights: Mapping[str, Tensor],
    calibration: Calibration | None,
    phases: PhaseTimer,
) -> Exported:
    """Write the file, measure what it lost, and read it back."""
    size = packed.write(path)
    with phases.measure("measure errors"):
        hessians = None if calibration is None else calibration.hessians
        losses = quantization_losses(weights, fit.stored, hessians)
    with phases.measure("read back"):
        state_dict = load(path).state_dict
    groups = {name: tensor.group for name, tensor in fit.stored.items()}
    return Exported(path, size, losses, groups, state_dict, fit.attempts, fit.step_factor)
