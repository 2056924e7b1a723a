"""A small optimizer with every kind of group, and gradients that depend on the step alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pgl.optim import MuonAdamW

SHAPES = [(12, 8), (12, 8), (8, 12), (6, 6), (12, 8)]
SCALAR_SHAPES = [(7,), (), (2, 5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Parameter]:
    return [Parameter(random(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]


def make_optimizer(**options: Any) -> MuonAdamW:
    """Return an optimizer over a bf16 table, matrices of three shapes and a few scalars."""
    table = Parameter(random(9, 4, seed=50).bfloat16())
    groups = [
        {"kind": "adamw", "name": "embedding", "params": [table], "lr": 0.03},
        {
            "kind": "muon",
            "name": "matrix",
            "params": make_parameters(SHAPES),
            "lr": 0.02,
            "momentum": 0.95,
            "weight_decay": 0.1,
        },
        {
            "kind": "adamw",
            "name": "scalar",
            "params": make_parameters(SCALAR_SHAPES, seed=20),
            "lr": 0.01,
            "weight_decay": 0.1,
        },
    ]
    return MuonAdamW(groups, **options)


def all_parameters(optimizer: MuonAdamW) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: MuonAdamW, step: int) -> None:
    for i, parameter in enumerate(all_parameters(optimizer)):
        parameter.grad = random(*parameter.shape, seed=1000 * step + i).to(parameter.dtype)


def train(optimizer: MuonAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(optimizer, step)
        optimizer.step()


def snapshot(optimizer: MuonAdamW) -> list[Tensor]:
    return [p.detach().clone() for p in all_parameters(optimizer)]
