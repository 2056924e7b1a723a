"""Which parameter goes to which optimizer, with which learning rate."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from pgl.optim.momentum import MomentumFormat
from pgl.optim.muon import DecayOrder
from pgl.optim.muon_adamw import Clip, MuonAdamW
from pgl.optim.newton_schulz import NSCoefficients, step_coefficients

MAX_RATE = 1000
"""Largest learning rate or decay: a weight that moves so far says nothing any more."""
RATES = (
    *("matrix_lr", "scalar_lr", "embedding_lr", "head_lr"),
    *("muon_weight_decay", "adam_weight_decay", "head_weight_decay"),
)

GroupName = Literal["embedding", "matrix", "scalar", "head"]


@dataclass
class OptimizerConfig:
    """Settings of the optimizer. The defaults are those of PR #388, but for its decay of 0.042."""

    matrix_lr: float = 0.025
    """Learning rate of the matrices (Muon)."""
    scalar_lr: float = 0.025
    """Learning rate of gains, gates, scales, mixes and skip weights (AdamW)."""
    embedding_lr: float = 0.035
    """Learning rate of the embedding tables (AdamW)."""
    head_lr: float = 0.008
    """Learning rate of an untied output head (AdamW)."""
    nesterov: bool = True
    """Look ahead along the momentum (Nesterov)."""
    ns_steps: int = 5
    """Newton-Schulz iterations per step."""
    ns_coefficients: NSCoefficients = "keller"
    """Polynomial of the Newton-Schulz iteration."""
    decay_order: DecayOrder = "before"
    """Decay matrices before their update (PRs 324, 388, 703) or after it (PR 236)."""
    muon_weight_decay: float = 0.04
    """Weight decay of the matrices, multiplied by the current learning rate."""
    adam_weight_decay: float = 0.04
    """Weight decay of every AdamW tensor but the head, gains and scales included."""
    head_weight_decay: float = 0.0
    """Weight decay of an untied output head."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the denominator of AdamW."""
    grad_clip_norm: float | None = 0.3
    """Global gradient norm to clip to, null for no clipping."""
    clip: Clip = "reduced"
    """Gradient that is clipped: reduced (the mean over all devices) or local (each device's own,
    before the mean, as PR 703; needs trainer.strategy parallel_muon)."""
    momentum_format: MomentumFormat = "float32"
    """How Muon keeps its momentum; int8 saves memory and no time."""
    compile: bool = True
    """Compile Muon's arithmetic on CUDA devices; others always run it eagerly."""
    bigram_proj: Literal["muon", "adamw"] = "muon"
    """Optimizer of the bigram projection: muon (PRs 324, 388) or adamw (PRs 236, 703)."""
    value_embedding_proj: Literal["muon", "adamw"] = "muon"
    """Optimizer of the value-embedding projection: muon (PR 388) or adamw (PR 703)."""
    bigram_embedding_lr: Literal["embedding", "scalar"] = "embedding"
    """Learning rate of the bigram table: embedding_lr or scalar_lr (PR 236)."""

    def __post_init__(self) -> None:
        for name in RATES:
            _check(0 <= getattr(self, name) <= MAX_RATE, name, f"must be from 0 to {MAX_RATE}")
        for name in ("beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        _check(self.eps > 0, "eps", "must be positive")
        _check(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            "grad_clip_norm",
            "must be positive, or null for no clipping",
        )
        _check(
            self.clip == "reduced" or self.grad_clip_norm is not None,
            "clip",
            "is local, so grad_clip_norm must say what to clip to",
        )
        step_coefficients(self.ns_coefficients, self.ns_steps)


def _check(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"model.optimizer.{name} {rule}.")


def route(name: str, ndim: int, config: OptimizerConfig) -> GroupName:
    """Return the group of a parameter, from its name and number of dimensions.

    Muon takes the matrices of linear layers. Two-dimensional parameters that are no linear map
    (``resid_mix``, ``skip_weights``) and gates are scalars.

    Args:
        name: Name as in ``named_parameters``.
        ndim: Number of dimensions.
        config: Routing switches.
    """
    if name.endswith("bigram.embed.weight"):
        return config.bigram_embedding_lr
    if name.endswith(("emb.weight", "embed.weight")):
        return "embedding"
    if name.endswith("lm_head.weight"):
        return "head"
    if ndim != 2 or not name.endswith(".weight") or "gate" in name:
        return "scalar"
    if name.endswith("bigram.proj.weight"):
        return "matrix" if config.bigram_proj == "muon" else "scalar"
    if name.endswith("ve_shared.proj.weight"):
        return "matrix" if config.value_embedding_proj == "muon" else "scalar"
    return "matrix"


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return groups for :class:`MuonAdamW`: embedding, matrix, scalar, head; empty ones left out.

    Args:
        named_parameters: Names and parameters; those that need no gradient are left out.
        config: Learning rates and routing.
    """
    members: dict[GroupName, list[Tensor]] = {
        "embedding": [],
        "matrix": [],
        "scalar": [],
        "head": [],
    }
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[route(name, parameter.ndim, config)].append(parameter)
    groups: list[dict[str, Any]] = []
    for name, parameters in members.items():
        if parameters:
            settings = _muon_settings(config) if name == "matrix" else _adamw_settings(name, config)
            groups.append({"name": name, "params": parameters, **settings})
    return groups


def build_optimizer(
    gpt: nn.Module, config: OptimizerConfig, reduce_gradients: bool = False
) -> MuonAdamW:
    """Make the optimizer of a model.

    Args:
        gpt: The model, already on its device.
        config: Settings.
        reduce_gradients: Whether the optimizer averages the gradients of the processes (Parallel
            Muon); otherwise somebody has done so before it steps (DDP).

    Raises:
        ValueError: The model has nothing to train, or ``clip`` is local with gradients that are
            averaged before.
    """
    groups = parameter_groups(gpt.named_parameters(), config)
    if not groups:
        raise ValueError("The model has no parameter that requires a gradient.")
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return MuonAdamW(
        groups,
        grad_clip_norm=config.grad_clip_norm,
        clip=config.clip,
        momentum_format=config.momentum_format,
        compile=config.compile and on_cuda,
        reduce_gradients=reduce_gradients,
    )


def _muon_settings(config: OptimizerConfig) -> dict[str, Any]:
    # Without the momentum: MuonAdamW has a default, and ScheduleConfig sets it at every step.
    return {
        "kind": "muon",
        "lr": config.matrix_lr,
        "nesterov": config.nesterov,
        "weight_decay": config.muon_weight_decay,
        "decay_order": config.decay_order,
        "ns_steps": config.ns_steps,
        "ns_coefficients": config.ns_coefficients,
    }


def _adamw_settings(name: GroupName, config: OptimizerConfig) -> dict[str, Any]:
    lr = {
        "embedding": config.embedding_lr,
        "scalar": config.scalar_lr,
        "head": config.head_lr,
    }[name]
    return {
        "kind": "adamw",
        "lr": lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.head_weight_decay if name == "head" else config.adam_weight_decay,
    }
