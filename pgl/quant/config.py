"""What becomes of each group of tensors when a model is packed."""

from dataclasses import dataclass, field
from typing import Literal

from pgl.quant.groups import Group
from pgl.quant.rows import RowGrid

FloatKind = Literal["float16", "bfloat16", "float32"]


@dataclass
class TensorRule:
    """How the large matrices of one group are stored."""

    store: Literal["codes", "float16", "bfloat16", "float32"] = "codes"
    """Integer codes with a step per row, or plain floating point."""

    method: Literal["round", "gptq"] = "round"
    """How codes are chosen: nearest on the grid, or GPTQ, which needs calibration Hessians and
    halves the error of the layers' outputs (worth .0047 BPB in PR #703's parent)."""

    grid: RowGrid = field(default_factory=RowGrid)
    """The integer grid."""

    def __post_init__(self) -> None:
        if self.method == "gptq" and self.store != "codes":
            raise ValueError(
                'artifact.quant.<group>.method is "gptq", which chooses codes, but store is '
                f'"{self.store}": set store to "codes" or method to "round"'
            )


@dataclass
class GPTQConfig:
    """Settings of GPTQ (Frantar et al., arXiv:2210.17323)."""

    damping: float = 0.0201
    """Added to the Hessian's diagonal, in units of its mean. PR #703 adds 1 % twice."""

    act_order: bool = True
    """Quantise the inputs with the most energy first, while the rest can still make up for it."""

    block_columns: int = 128
    """Columns coded between two updates of the rest of the matrix. Changes speed only."""

    select_by: Literal["mse", "hessian"] = "mse"
    """What picks the quantile when the grid's `clip` is "search": plain squared error (PR #703), or
    squared error of the layer's outputs, which is what GPTQ minimises."""

    steps: Literal["grid", "balanced"] = "grid"
    """Whether a row's step is the grid's, or each row gets the step at which an error costs the
    same loss throughout the model. Balanced steps need the gradients of calibration sequences;
    codes then use up to 8 bits, and the grids of the calibrated groups are not used."""

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"artifact.quant.gptq.damping is {self.damping}: choose 0 or more")
        if self.block_columns < 1:
            raise ValueError(
                f"artifact.quant.gptq.block_columns is {self.block_columns}: choose 1 or more"
            )
        if self.steps == "balanced" and self.select_by != "mse":
            raise ValueError(
                f'artifact.quant.gptq.select_by is "{self.select_by}", but balanced steps search '
                'no quantile: leave select_by out or set steps to "grid"'
            )


def _matrix_rule() -> TensorRule:
    return TensorRule(grid=RowGrid(bits=6, clip="search"))


def _embedding_rule() -> TensorRule:
    return TensorRule(
        grid=RowGrid(
            bits=8,
            clip="quantile",
            clip_weights=True,
            scale_floor=1 / 127,
            round_scale_first=False,
        )
    )


@dataclass
class QuantConfig:
    """The plan of a whole model; the defaults are PR #549's, without GPTQ."""

    attention: TensorRule = field(default_factory=_matrix_rule)
    """Query, key, value and output projections."""

    mlp: TensorRule = field(default_factory=_matrix_rule)
    """Up and down projections."""

    token_embedding: TensorRule = field(default_factory=_embedding_rule)
    """Token embedding, and the output head where it is not tied."""

    bigram: TensorRule = field(default_factory=_embedding_rule)
    """Bigram table and its projection."""

    value_embedding: TensorRule = field(default_factory=_embedding_rule)
    """Value embedding table and its projection."""

    passthrough_max_numel: int = 65_536
    """Matrices of at most this many weights stay in floating point (PR #324: 8192)."""

    small_dtype: FloatKind = "float16"
    """What such small matrices are stored as."""

    control_dtype: FloatKind = "float16"
    """What gains, gates, scalars, residual mixes and skip weights are stored as (PR #236:
    float32)."""

    prune_fraction: float = 0.0
    """Share of each large matrix set to zero before it is coded, the smallest first (PR #324:
    0.05)."""

    prune_min_numel: int = 65_537
    """Matrices of at least this many weights are pruned."""

    gptq: GPTQConfig = field(default_factory=GPTQConfig)
    """Settings of the groups whose method is "gptq"."""

    def __post_init__(self) -> None:
        if not 0 <= self.prune_fraction < 1:
            raise ValueError(
                f"artifact.quant.prune_fraction is {self.prune_fraction}: choose a value in [0, 1)"
            )
        if self.passthrough_max_numel < 0:
            raise ValueError(
                f"artifact.quant.passthrough_max_numel is {self.passthrough_max_numel}: "
                "choose 0 or more"
            )
        for name in ("token_embedding", "bigram", "value_embedding"):
            if getattr(self, name).method == "gptq":
                raise ValueError(
                    f'artifact.quant.{name}.method is "gptq", but the rows of an embedding are '
                    'looked up, not multiplied by inputs to calibrate with: set it to "round"'
                )

        if self.gptq.steps == "balanced" and not self.needs_hessians():
            raise ValueError(
                'artifact.quant.gptq.steps is "balanced", but no group is quantised by GPTQ: set '
                'attention.method or mlp.method to "gptq", or gptq.steps to "grid"'
            )

    def rule(self, group: Group) -> TensorRule | None:
        """Return the rule of a group's large matrices; None for "control", which has none."""
        return None if group == "control" else getattr(self, group)

    def needs_hessians(self) -> bool:
        """Tell whether some group is quantised by GPTQ."""
        return any(
            rule.store == "codes" and rule.method == "gptq" for rule in (self.attention, self.mlp)
        )

    def needs_energies(self) -> bool:
        """Tell whether GPTQ also needs to know how much the loss minds each output's error."""
        return self.needs_hessians() and self.gptq.steps == "balanced"
