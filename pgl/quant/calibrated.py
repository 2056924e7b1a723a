"""All matrices that GPTQ calibrates: stacked by shape, divided over the processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgl.quant.balance import balanced_steps, code_balanced, mean_step
from pgl.quant.config import GPTQConfig
from pgl.quant.gptq import Factor, factorise, search_codes
from pgl.quant.precision import full_float32
from pgl.quant.ranks import share_out
from pgl.quant.rows import RowCodes, RowGrid

# Shape suffixes: K matrices of one shape, R rows (outputs), C columns (inputs).


@dataclass(frozen=True)
class Calibration:
    """What calibration sequences said about each linear layer, by the name of its weight."""

    hessians: Mapping[str, Tensor]
    """Mean of X^T X of the inputs, (C, C), as :func:`pgl.quant.collect_hessians` returns it."""

    energies: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean squared gradient of each output, (R,), as :func:`pgl.quant.collect_output_energies`
    returns it; balanced steps alone need it."""


@dataclass(frozen=True)
class _Stack:
    names: list[str]
    grid: RowGrid
    w_KRC: Tensor
    hessian_KCC: Tensor
    factor: Factor
    steps_KR: Tensor | None


class CalibratedMatrices:
    """Codes a set of matrices by GPTQ, as often as asked with other steps.

    With several processes each one keeps and codes its share of the matrices; all processes have
    to call every method together, and get all results.

    Args:
        weights: Float32 matrices by name, on the device that does the work.
        grids: Grid of each.
        calibration: What was collected for them; may be None if there are none.
        config: Settings of GPTQ.

    Raises:
        ValueError: A matrix lacks its Hessian, or its energies if steps are balanced.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        grids: Mapping[str, RowGrid],
        calibration: Calibration | None,
        config: GPTQConfig,
    ) -> None:
        self.config = config
        self._weights, self._grids = weights, grids
        for name in weights:
            _check_calibrated(name, calibration, config)
        self._calibration = calibration or Calibration({})
        # The same shapes together, so that each process gets some of each.
        self._names = sorted(weights, key=lambda name: (weights[name].shape, name))
        self._stacks: list[_Stack] = []
        self._mean = 0.0
        if self._names:
            means = share_out(self._names, self._prepare)
            sizes = {name: weights[name].numel() for name in self._names}
            self._mean = mean_step(means, sizes)

    def code(self, step_factor: float) -> dict[str, RowCodes]:
        """Return codes and steps of all matrices, on the CPU."""
        if not self._names:
            return {}
        return share_out(self._names, lambda _: self._code_own(step_factor))

    def _prepare(self, names: list[str]) -> dict[str, float]:
        """Stack and factorise this process's matrices; return the means of their log steps."""
        alike: dict[tuple, list[str]] = {}
        for name in names:
            key = (self._weights[name].shape, repr(self._grids[name]))
            alike.setdefault(key, []).append(name)
        means = {}
        for group in alike.values():
            w_KRC = torch.stack([self._weights[name] for name in group])
            hessian_KCC = self._collected(group, self._calibration.hessians, w_KRC)
            with full_float32(w_KRC.device.type):
                factor = factorise(hessian_KCC, self.config)
            steps_KR = None
            if self.config.steps == "balanced":
                energy_KR = self._collected(group, self._calibration.energies, w_KRC)
                steps_KR = balanced_steps(factor, energy_KR)
                means.update(zip(group, steps_KR.mean(-1).tolist(), strict=True))
            stack = _Stack(group, self._grids[group[0]], w_KRC, hessian_KCC, factor, steps_KR)
            self._stacks.append(stack)
        return {name: means.get(name, 0.0) for name in names}

    def _collected(self, names: list[str], by_name: Mapping[str, Tensor], like: Tensor) -> Tensor:
        return torch.stack([by_name[name].to(like) for name in names])

    def _code_own(self, step_factor: float) -> dict[str, RowCodes]:
        coded = {}
        for stack in self._stacks:
            with full_float32(stack.w_KRC.device.type):
                rows = self._code_stack(stack, step_factor)
            for k, name in enumerate(stack.names):
                coded[name] = RowCodes(rows.codes_RC[k].cpu(), rows.scale_R[k].cpu())
        return coded

    def _code_stack(self, stack: _Stack, step_factor: float) -> RowCodes:
        if stack.steps_KR is not None:
            return code_balanced(
                stack.w_KRC, stack.factor, stack.steps_KR, self._mean, step_factor, self.config
            )
        grid = stack.grid.scaled(step_factor)
        return search_codes(stack.w_KRC, stack.factor, stack.hessian_KCC, grid, self.config)


def _check_calibrated(name: str, calibration: Calibration | None, config: GPTQConfig) -> None:
    if calibration is None or name not in calibration.hessians:
        raise ValueError(
            f"{name} is to be quantised by GPTQ but has no calibration Hessian: collect "
            'Hessians first, or set artifact.quant.<group>.method to "round"'
        )
    if config.steps == "balanced" and name not in calibration.energies:
        raise ValueError(
            f"{name} is to get balanced steps but has no output energies: collect them first, or "
            'set artifact.quant.gptq.steps to "grid"'
        )
