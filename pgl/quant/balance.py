"""Steps that spend bits where the loss notices them.

At a given size the loss is least when a step costs the same wherever it is: ``step_r**2 * energy_r
* input`` is one constant for every row r of every matrix. ``energy_r`` is the mean squared gradient
of the row's output (:mod:`pgl.quant.sensitivity`), ``input`` is what is left of the matrix's inputs
once GPTQ has made up for an error with the columns that follow: the mean of ``1 / U_cc**2``. One
factor for the whole model then trades error against size.

Measured on a PR #703 model of 270 steps, at files of one size (10.0 MB): 0.005 nats a token lost
where GPTQ on the grid's steps loses 0.030 (docs/artifact.md). Steps that follow the columns'
``U_cc`` too need a factor for each column in the file and were no better.

Shape legend: K matrices of one shape, R rows (outputs), C columns (inputs).
"""

import math
from collections.abc import Mapping

from torch import Tensor

from pgl.quant.config import GPTQConfig
from pgl.quant.gptq import Factor, code_columns
from pgl.quant.rows import RowCodes, RowGrid, RowScales, storable

REFERENCE_STEP = 1 / 31  # geometric mean of a model's steps at factor 1: the PRs' floor
STEPS_PER_OCTAVE = 8  # coarser steps of the steps cost error, finer ones bytes
SMALLEST_ENERGY = 1e-3  # in units of the matrix's mean: an output that never mattered may yet do
SMALLEST_MEAN_ENERGY = 1e-30
LIVE_OCTAVES = 20.0  # a matrix with steps coarser than the finest's by more has no say in the mean
MAX_OCTAVES_FROM_MEAN = 8.0


def balanced_steps(factor: Factor, energy_KR: Tensor) -> Tensor:
    """Return the steps of rows (K, R) at which errors cost the same, as logarithms to base 2.

    Only their differences matter, within a matrix and between matrices.
    """
    diagonal_KC = factor.upper_KCC.diagonal(dim1=-2, dim2=-1)
    input_K1 = diagonal_KC.square().reciprocal().mean(-1, keepdim=True)
    mean_K1 = energy_KR.mean(-1, keepdim=True).clamp(min=SMALLEST_MEAN_ENERGY)
    return -((energy_KR + SMALLEST_ENERGY * mean_K1) * input_K1).log2() / 2


def mean_step(means: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Return the mean of the model's steps as a logarithm to base 2.

    A matrix that the loss does not notice at all has steps of any size; it does not count, lest it
    make those of the others finer.

    Args:
        means: The mean of each matrix's steps, as logarithms to base 2.
        sizes: Weights of each matrix.
    """
    finest = min(means.values())
    live = [name for name in means if means[name] <= finest + LIVE_OCTAVES]
    return sum(means[name] * sizes[name] for name in live) / sum(sizes[name] for name in live)


def code_balanced(
    w_KRC: Tensor,
    factor: Factor,
    steps_KR: Tensor,
    mean: float,
    step_factor: float,
    config: GPTQConfig,
) -> RowCodes:
    """Code matrices by GPTQ on balanced steps.

    Args:
        w_KRC: Float32 weights.
        factor: Of their Hessians.
        steps_KR: Logarithms to base 2 of their steps. They are kept within 8 octaves of the mean.
        mean: What stands for a step of 1/31 at a factor of 1: the mean over the whole model.
        step_factor: Multiplies all steps.
        config: For the block size.

    Raises:
        ValueError: The weights have diverged.
    """
    steps_KR = (steps_KR - mean).clamp(-MAX_OCTAVES_FROM_MEAN, MAX_OCTAVES_FROM_MEAN)
    steps_KR = steps_KR + math.log2(REFERENCE_STEP * step_factor)
    steps_KR = (steps_KR * STEPS_PER_OCTAVE).round() / STEPS_PER_OCTAVE
    scale_KR = storable(steps_KR.exp2(), w_KRC.abs()).half()
    scales = RowScales(scale_KR.float(), None)
    codes_KRC = code_columns(w_KRC, factor, scales, RowGrid(bits=8), config.block_columns)
    return RowCodes(codes_KRC, scale_KR)
