"""From a trained state dict to what is stored."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pgl.quant.calibrated import CalibratedMatrices, Calibration
from pgl.quant.config import QuantConfig, TensorRule
from pgl.quant.groups import tensor_group
from pgl.quant.prune import prune_by_magnitude
from pgl.quant.rows import RowCodes, quantize_rows
from pgl.quant.stored import DTYPES, StoredTensor

MIN_BITS = 5
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def storage_kind(name: str, shape: torch.Size, config: QuantConfig) -> str:
    """Return what a tensor is stored as: "int5" .. "int8", "float16", "bfloat16" or "float32"."""
    rule = config.rule(tensor_group(name, len(shape)))
    if rule is None:
        return config.control_dtype
    if shape.numel() <= config.passthrough_max_numel:
        return config.small_dtype
    return f"int{rule.grid.bits}" if rule.store == "codes" else rule.store


class StateQuantizer:
    """Quantises one state dict, as often as asked with steps multiplied by another factor.

    Pruning and factorising the Hessians are done once. With several processes each one codes its
    share of the matrices that GPTQ calibrates, and all get all; they have to call it together.

    Args:
        state_dict: Weights by name, floating point.
        config: The plan.
        calibration: For groups quantised by GPTQ, what was collected for each of their matrices.
        device: Where the work is done; None does it where each tensor is.

    Raises:
        ValueError: A tensor is not floating point, not finite or too large for its storage dtype,
            or lacks what GPTQ needs.
    """

    @torch.no_grad()
    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        config: QuantConfig,
        calibration: Calibration | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self._fixed: dict[str, StoredTensor] = {}
        self._rounded: dict[str, Tensor] = {}
        self._order = list(state_dict)
        self._templates: dict[str, StoredTensor] = {}
        calibrated: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            _check_tensor(name, tensor)
            group = tensor_group(name, tensor.ndim)
            kind = storage_kind(name, tensor.shape, config)
            prepared = _prune(tensor.detach().to(device), config)
            empty = torch.empty(0)
            template = StoredTensor(group, "float32", _DTYPE_NAMES[tensor.dtype], empty)
            rule = config.rule(group)
            if not kind.startswith("int"):
                data = _cast(name, prepared, kind).cpu()
                self._fixed[name] = replace(template, kind=kind, data=data)
            elif rule is not None and rule.method == "gptq":
                calibrated[name] = prepared.float()
            else:
                self._rounded[name] = prepared.float()
            self._templates[name] = template
        grids = {name: self._rule(name).grid for name in calibrated}
        self._gptq = CalibratedMatrices(calibrated, grids, calibration, config.gptq)

    @torch.no_grad()
    def __call__(self, step_factor: float = 1.0) -> dict[str, StoredTensor]:
        """Return stored tensors on the CPU, in the order of the state dict."""
        coded = self._gptq.code(step_factor)
        for name, weight in self._rounded.items():
            grid = self._rule(name).grid
            coded[name] = _to_cpu(quantize_rows(weight, grid.scaled(step_factor)))
        kinds = self._kinds(coded, step_factor)
        stored = dict(self._fixed)
        for name, rows in coded.items():
            template = self._templates[name]
            stored[name] = replace(
                template,
                kind=kinds[name],
                data=rows.codes_RC,
                scale_R=rows.scale_R,
            )
        return {name: stored[name] for name in self._order}

    def _rule(self, name: str) -> TensorRule:
        rule = self.config.rule(self._templates[name].group)
        assert rule is not None
        return rule

    def _is_balanced(self, name: str) -> bool:
        return self.config.gptq.steps == "balanced" and self._rule(name).method == "gptq"

    def _kinds(self, coded: Mapping[str, RowCodes], step_factor: float) -> dict[str, str]:
        """Return the plan's kinds, or where steps are others the narrowest that hold each group."""
        bits: dict[str, int] = {}
        for name, rows in coded.items():
            group = self._templates[name].group
            grid = self._rule(name).grid.scaled(step_factor)
            if grid.step_factor == 1 and not self._is_balanced(name):
                bits[group] = grid.bits
            else:
                bits[group] = max(bits.get(group, MIN_BITS), bits_of(rows.codes_RC))
        return {name: f"int{bits[self._templates[name].group]}" for name in coded}


def quantize_state(
    state_dict: Mapping[str, Tensor],
    config: QuantConfig,
    calibration: Calibration | None = None,
    device: torch.device | str | None = None,
) -> dict[str, StoredTensor]:
    """Prune, quantise and round a state dict as the plan says; see :class:`StateQuantizer`."""
    return StateQuantizer(state_dict, config, calibration, device)()


def bits_of(codes: Tensor) -> int:
    """Return the narrowest kind of codes, 5 to 8 bits, that holds all of these."""
    if not codes.numel():
        return MIN_BITS
    low, high = (int(end) for end in codes.aminmax())
    return max(MIN_BITS, 1 + max(high, -low - 1, 0).bit_length())


def _prune(tensor: Tensor, config: QuantConfig) -> Tensor:
    if config.prune_fraction and tensor.ndim == 2 and tensor.numel() >= config.prune_min_numel:
        return prune_by_magnitude(tensor, config.prune_fraction)
    return tensor


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"{name} is {tensor.dtype}: only float32, bfloat16 and float16 tensors can be stored"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: the weights have diverged")


def _cast(name: str, tensor: Tensor, kind: str) -> Tensor:
    cast = tensor.to(DTYPES[kind])
    if not bool(cast.isfinite().all()):
        raise ValueError(
            f"{name} has a weight of {tensor.abs().max().item():g}, beyond {kind}: set "
            "artifact.quant.small_dtype, control_dtype or its group's store to float32"
        )
    return cast


def _to_cpu(rows: RowCodes) -> RowCodes:
    return RowCodes(rows.codes_RC.cpu(), rows.scale_R.cpu())
