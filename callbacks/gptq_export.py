"""From trained weights to one file that fits the limit."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from callbacks.find import find_callback
from callbacks.progress import print_lines, track
from callbacks.run_folder import run_folder
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.artifact import GroupSize, Packed, SizeReport, fit_to_limit, load, pack_model
from pgl.artifact.codecs import check_codec
from pgl.artifact.fit import Attempt, Fit
from pgl.collectives import led_by_rank_zero, on_rank_zero
from pgl.quant import (
    QuantConfig,
    QuantizationError,
    StateQuantizer,
    StoredTensor,
    errors_by_group,
    quantization_errors,
)
from pgl.quant.errors import sum_errors

FILE_NAME = "model.pgl"
SAMPLED_SEQUENCES = 64  # more of them are warned of: their cost, not their use, was measured


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    path: Path
    """The artifact."""
    size: SizeReport
    """Where its bytes go."""
    errors: dict[str, QuantizationError]
    """What quantisation lost, by tensor."""
    groups: dict[str, str]
    """The group of each tensor."""
    state_dict: dict[str, Tensor]
    """The GPT's weights as read back from the file, on the CPU."""
    attempts: list[Attempt]
    """Files packed in search of the size, the planned one first."""
    step_factor: float
    """What the plan's steps were multiplied by."""

    def group_errors(self) -> dict[str, QuantizationError]:
        """Return what quantisation lost, by group."""
        return errors_by_group(self.errors, self.groups)


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
        limit_bytes: int | None = 16_000_000,
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
        """Called when a run begins: calibration needs a part of the budget."""
        if stage != "fit" or not self.quant.needs_hessians():
            return
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
        phases = find_callback(trainer, WallClockBudget).phases
        calibration = self.calibrated = None
        if self.quant.needs_hessians():
            if not in_budget and self.calibration != "samples":
                rank_zero_warn(
                    "GPTQ reads training tokens while no training budget runs, which the challenge "
                    "does not allow: set artifact.calibration to samples"
                )
            counted = in_budget and counts_as_training(self.calibration)
            phase = "calibrate" if in_budget else "calibrate on no clock"
            with phases.measure(phase, counts=counted):
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
        packs: list[Packed] = []  # rank 0's alone

        def quantise(step_factor: float) -> Mapping[str, StoredTensor]:
            with track(trainer, "quantise", 1) as advance, phases.measure("quantise"):
                stored = quantizer(step_factor)
                advance()
            return stored

        def pack(stored: Mapping[str, StoredTensor]) -> int:
            with phases.measure("pack"):
                return self._pack(trainer, pl_module, stored, packs)

        def search(quantise: Callable[[float], Mapping[str, StoredTensor]]) -> Fit:
            return fit_to_limit(quantise, pack, self.limit_bytes, refine=self.search == "step")

        with phases.measure("quantise"):
            quantizer = StateQuantizer(weights, self.quant, calibration, pl_module.device)
        fit = led_by_rank_zero(trainer.strategy, quantise, search)

        def write() -> Exported:
            assert fit is not None
            size = packs[fit.chosen].write(path)
            with phases.measure("measure errors"):
                hessians = calibration.hessians if calibration is not None else None
                errors = quantization_errors(weights, fit.stored, hessians)
            groups = {name: tensor.group for name, tensor in fit.stored.items()}
            with phases.measure("read back"):
                state_dict = load(path).state_dict
            return Exported(path, size, errors, groups, state_dict, fit.attempts, fit.step_factor)

        exported = on_rank_zero(trainer.strategy, write)
        self._say_what_the_limit_did(trainer, exported)
        return exported

    def summary(self) -> str:
        """Return the table of sizes and errors by tensor group."""
        assert self.exported is not None, "nothing was exported"
        return self.exported.size.table(self.exported.group_errors())

    def report(self) -> dict[str, Any]:
        """Return where the artifact is, what its parts take, and what they lost."""
        if self.exported is None:
            return {}
        exported, size = self.exported, self.exported.size
        group_errors = exported.group_errors()
        output_error = sum_errors(list(exported.errors.values())).output_relative
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
            # Weighted with the inputs' Hessians, over all matrices that have one.
            "output_error": None if output_error is None else round(output_error, 6),
            "attempts": [asdict(attempt) for attempt in exported.attempts],
            "calibration": self._calibration_report(),
            "groups": [_group_row(group, group_errors.get(group.name)) for group in size.groups],
            "relative_error": {
                name: round(error.relative, 6) for name, error in exported.errors.items()
            },
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

    def _pack(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stored: Mapping[str, StoredTensor],
        packs: list[Packed],
    ) -> int:
        with track(trainer, "pack", 1) as advance:
            packed = pack_model(
                pl_module.gpt_config,
                stored,
                metadata=self._metadata(trainer),
                codec=self.codec,
                limit_bytes=self.limit_bytes,
                on_progress=advance,
            )
        packs.append(packed)
        return packed.size.total_bytes

    def _say_what_the_limit_did(self, trainer: pl.Trainer, exported: Exported) -> None:
        planned = exported.attempts[0].total_bytes
        if self.limit_bytes is not None and planned > self.limit_bytes:
            print_lines(
                trainer,
                f"the planned artifact of {planned:,} bytes is over the limit of "
                f"{self.limit_bytes:,}: its steps are {exported.step_factor:.4f} times the plan's",
            )

    def _metadata(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            "tokenizer_sha256": trainer.datamodule.tokenizer_sha256,
            "training_steps": trainer.global_step,
            "training_seconds": round(find_callback(trainer, WallClockBudget).elapsed, 3),
            "calibration": self._calibration_report(),
        }


def _group_row(group: GroupSize, error: QuantizationError | None) -> dict[str, Any]:
    outputs = None if error is None else error.output_relative
    return {
        "name": group.name,
        "parameters": group.parameters,
        "packed_bytes": group.packed_bytes,
        "bits_per_weight": round(group.bits_per_weight, 4),
        "order0_bits_per_weight": round(group.order0_bits_per_weight, 4),
        "kinds": list(group.kinds),
        "codecs": list(group.codecs),
        "relative_error": None if error is None else round(error.relative, 6),
        "output_error": None if outputs is None else round(outputs, 6),
    }
