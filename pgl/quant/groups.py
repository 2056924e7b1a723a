"""Which part of the model a tensor belongs to, told by its name."""

from typing import Literal, get_args

Group = Literal["attention", "mlp", "token_embedding", "bigram", "value_embedding", "control"]
GROUPS: tuple[Group, ...] = get_args(Group)

# First match wins. Matrices that match nothing (resid_mix, skip_weights) are control.
_MARKS: tuple[tuple[str, Group], ...] = (
    (".attn.gate.", "control"),
    (".attn.", "attention"),
    (".mlp.", "mlp"),
    ("tok_emb.", "token_embedding"),
    ("lm_head.", "token_embedding"),
    ("bigram.", "bigram"),
    ("ve_shared.", "value_embedding"),
)


def tensor_group(name: str, ndim: int) -> Group:
    """Return the group of a tensor of the model's state dict.

    Gains, gates and scalars (anything that is not a matrix) are "control" wherever they live.
    """
    if ndim == 2:
        for mark, group in _MARKS:
            if mark in f".{name}":
                return group
    return "control"
