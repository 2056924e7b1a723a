"""From a trained state dict to what is stored, and how much was lost on the way."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgl.quant.config import QuantConfig, TensorRule
from pgl.quant.gptq import gptq
from pgl.quant.groups import tensor_group
from pgl.quant.prune import prune_by_magnitude
from pgl.quant.rows import RowCodes, quantize_rows
from pgl.quant.stored import DTYPES, StoredTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def storage_kind(name: str, shape: torch.Size, config: QuantConfig) -> str:
    """Return what a tensor is stored as: "int5" .. "int8", "float16", "bfloat16" or "float32"."""
    rule = config.rule(tensor_group(name, len(shape)))
    if rule is None:
        return config.control_dtype
    if shape.numel() <= config.passthrough_max_numel:
        return config.small_dtype
    return f"int{rule.grid.bits}" if rule.store == "codes" else rule.store


@torch.no_grad()
def quantize_state(
    state_dict: Mapping[str, Tensor],
    config: QuantConfig,
    hessians: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, StoredTensor]:
    """Prune, quantise and round a state dict as the plan says.

    Args:
        state_dict: Weights by name, floating point.
        config: The plan.
        hessians: For groups quantised by GPTQ, the Hessian (C, C) of each of their matrices by
            parameter name, as :func:`pgl.quant.collect_hessians` returns them.
        device: Where the work is done; None does it where each tensor is.

    Returns:
        Stored tensors on the CPU, in the order of the state dict.

    Raises:
        ValueError: A tensor is not floating point, not finite or too large for its storage dtype,
            or a Hessian is missing.
    """
    stored: dict[str, StoredTensor] = {}
    calibrated: dict[tuple[torch.Size, str], list[str]] = {}
    for name, tensor in state_dict.items():
        _check_tensor(name, tensor)
        group = tensor_group(name, tensor.ndim)
        kind = storage_kind(name, tensor.shape, config)
        prepared = _prune(tensor.detach().to(device), config)
        template = StoredTensor(group, "float32", _DTYPE_NAMES[tensor.dtype], prepared.float())
        stored[name] = template
        if not kind.startswith("int"):
            stored[name] = replace(template, kind=kind, data=_cast(name, prepared, kind))
            continue
        rule = config.rule(group)
        assert rule is not None
        if rule.method == "gptq":
            calibrated.setdefault((tensor.shape, group), []).append(name)
        else:
            stored[name] = _with_codes(template, quantize_rows(prepared, rule.grid), rule)
    for (_, group), names in calibrated.items():
        rule = config.rule(group)
        assert rule is not None
        weights_KRC = torch.stack([stored[name].data for name in names])
        hessians_KCC = _stack_hessians(names, hessians, weights_KRC)
        rows = gptq(weights_KRC, hessians_KCC, rule.grid, config.gptq)
        for k, name in enumerate(names):
            one = RowCodes(rows.codes_RC[k], rows.scale_R[k])
            stored[name] = _with_codes(stored[name], one, rule)
    return {name: _to_cpu(tensor) for name, tensor in stored.items()}


@dataclass(frozen=True)
class QuantizationError:
    """What storing a tensor lost."""

    relative: float
    """Norm of the error over the norm of the weights."""

    output_relative: float | None
    """The same for the layer's outputs on the calibration data; None without a Hessian."""


@torch.no_grad()
def quantization_errors(
    state_dict: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    hessians: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizationError]:
    """Compare stored tensors with the weights they came from, tensor by tensor."""
    errors = {}
    for name, tensor in stored.items():
        weight = state_dict[name].detach().float().cpu()
        error = weight - tensor.weights().cpu()
        output = None
        if hessians is not None and name in hessians:
            hessian_CC = hessians[name].float().cpu()
            output = _ratio(_energy(error, hessian_CC), _energy(weight, hessian_CC)) ** 0.5
        relative = _ratio(error.norm().item(), weight.norm().item())
        errors[name] = QuantizationError(relative, output)
    return errors


def _energy(w_RC: Tensor, hessian_CC: Tensor) -> float:
    return max((w_RC @ hessian_CC * w_RC).sum().item(), 0.0)


def _ratio(error: float, size: float) -> float:
    return error / size if size > 0 else 0.0


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
            f"{name} has a weight of {tensor.abs().max().item():g}, beyond {kind}: store its group "
            "as float32"
        )
    return cast


def _with_codes(template: StoredTensor, rows: RowCodes, rule: TensorRule) -> StoredTensor:
    kind = f"int{rule.grid.bits}"
    return replace(template, kind=kind, data=rows.codes_RC, scale_R=rows.scale_R)


def _stack_hessians(
    names: list[str], hessians: Mapping[str, Tensor] | None, like: Tensor
) -> Tensor:
    for name in names:
        if hessians is None or name not in hessians:
            raise ValueError(
                f"{name} is to be quantised by GPTQ but has no calibration Hessian: collect "
                'Hessians first, or set its group\'s method to "round"'
            )
    assert hessians is not None
    return torch.stack([hessians[name].to(like) for name in names])


def _to_cpu(tensor: StoredTensor) -> StoredTensor:
    scale_R = None if tensor.scale_R is None else tensor.scale_R.cpu()
    return replace(tensor, data=tensor.data.cpu(), scale_R=scale_R)
