"""What the parameter groups and saved states of MuonAdamW must look like."""

from typing import Any, get_args

import torch
from torch import Tensor

from pgl.optim.muon import DecayOrder
from pgl.optim.newton_schulz import step_coefficients

MUON_DEFAULTS: dict[str, Any] = {
    "lr": 0.025,
    "momentum": 0.99,
    "nesterov": True,
    "weight_decay": 0.0,
    "decay_order": "before",
    "ns_steps": 5,
    "ns_coefficients": "keller",
}
ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 0.025,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
}
_DEFAULTS = {"muon": MUON_DEFAULTS, "adamw": ADAMW_DEFAULTS}


def complete_group(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group of :class:`pgl.optim.MuonAdamW` with its defaults filled in.

    Raises:
        ValueError: The kind or name is missing, or a setting is unknown or out of range.
    """
    kind, name = group.get("kind"), group.get("name")
    if kind not in _DEFAULTS or not name:
        raise ValueError(
            "Every parameter group needs a 'kind' (muon or adamw) and a 'name', "
            f"got kind={kind!r}, name={name!r}."
        )
    defaults = _DEFAULTS[kind]
    unknown = group.keys() - defaults.keys() - {"params", "kind", "name", "initial_lr"}
    if unknown:
        raise ValueError(
            f"Group {name!r} has settings that {kind} does not know: {', '.join(sorted(unknown))}."
        )
    complete = {**defaults, **group}
    complete.setdefault("initial_lr", complete["lr"])
    if complete["lr"] < 0 or complete["weight_decay"] < 0:
        raise ValueError(f"lr and weight_decay of group {name!r} must not be negative.")
    if kind == "muon":
        step_coefficients(complete["ns_coefficients"], complete["ns_steps"])
        if complete["decay_order"] not in get_args(DecayOrder):
            raise ValueError(
                f"decay_order of group {name!r} must be before or after, "
                f"got {complete['decay_order']!r}."
            )
    return complete


def check_groups(saved_groups: list[dict[str, Any]], own_groups: list[dict[str, Any]]) -> None:
    """Refuse saved groups that are not those of an optimizer.

    Raises:
        ValueError: Kinds, names or numbers of parameters differ.
    """
    saved = [(g.get("kind"), g.get("name"), len(g["params"])) for g in saved_groups]
    own = [(g["kind"], g["name"], len(g["params"])) for g in own_groups]
    if saved != own:
        raise ValueError(
            f"The checkpoint's optimizer has the groups (kind, name, parameters) {saved} "
            f"instead of {own}; load it with the model and routing it was made with."
        )


def check_state(
    saved: dict[str, Tensor], shapes: dict[str, torch.Size], momentum_format: str
) -> None:
    """Refuse the saved state of one parameter if it is not what the optimizer keeps.

    Args:
        saved: Tensors by name.
        shapes: Names and shapes that they must have.
        momentum_format: What the names follow from.

    Raises:
        ValueError: Names or shapes differ.
    """
    if saved.keys() != shapes.keys():
        raise ValueError(
            f"The checkpoint's optimizer state has {sorted(saved)} where momentum_format="
            f"{momentum_format!r} needs {sorted(shapes)}; set model.optimizer.momentum_format to "
            "what the checkpoint was made with."
        )
    for name, shape in shapes.items():
        if saved[name].shape != shape:
            raise ValueError(
                f"The checkpoint's optimizer state {name!r} has shape "
                f"{tuple(saved[name].shape)} instead of {tuple(shape)}; load it "
                "with the model it was made with."
            )
