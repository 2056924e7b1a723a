"""Routing of parameters and the optimizer that is built from a config."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pgl.optim import OptimizerConfig, build_optimizer, groups, route


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_q = nn.Linear(8, 8, bias=False)
        self.resid_mix = nn.Parameter(torch.ones(2, 8))
        self.attn_scale = nn.Parameter(torch.ones(8))


class Tiny(nn.Module):
    """A module with one parameter of each sort, named as in pgl.model.GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.bigram = nn.Module()
        self.bigram.embed = nn.Embedding(11, 4)
        self.bigram.proj = nn.Linear(4, 8, bias=False)
        self.ve_shared = nn.Module()
        self.ve_shared.embed = nn.Embedding(16, 4)
        self.ve_shared.proj = nn.Linear(4, 8, bias=False)
        self.skip_weights = nn.Parameter(torch.ones(1, 8))
        self.lm_head = nn.Linear(8, 16, bias=False)


def names_of(model: nn.Module, config: OptimizerConfig) -> dict[str, list[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return {
        group["name"]: [name_of[p] for p in group["params"]]
        for group in build_optimizer(model, config).param_groups
    }


def test_groups_their_order_and_members() -> None:
    groups = names_of(Tiny(), OptimizerConfig())
    assert list(groups) == ["embedding", "matrix", "scalar", "head"]
    assert groups["embedding"] == [
        "tok_emb.weight",
        "bigram.embed.weight",
        "ve_shared.embed.weight",
    ]
    assert groups["matrix"] == [
        "blocks.0.c_q.weight",
        "blocks.1.c_q.weight",
        "bigram.proj.weight",
        "ve_shared.proj.weight",
    ]
    assert "blocks.0.resid_mix" in groups["scalar"]
    assert "skip_weights" in groups["scalar"]
    assert groups["head"] == ["lm_head.weight"]


def test_routing_switches() -> None:
    config = OptimizerConfig(
        bigram_proj="adamw", value_embedding_proj="adamw", bigram_embedding_lr="scalar"
    )
    groups = names_of(Tiny(), config)
    for name in ("bigram.proj.weight", "ve_shared.proj.weight", "bigram.embed.weight"):
        assert name in groups["scalar"]
    assert groups["matrix"] == ["blocks.0.c_q.weight", "blocks.1.c_q.weight"]


@pytest.mark.parametrize(
    ("name", "ndim", "group"),
    [
        ("blocks.3.attn.gate.weight", 2, "scalar"),
        ("blocks.3.attn.gate.bias", 1, "scalar"),
        ("backout_lambda", 0, "scalar"),
        ("_orig_mod.blocks.3.mlp.proj.weight", 2, "matrix"),
        ("module.tok_emb.weight", 2, "embedding"),
    ],
)
def test_route(name: str, ndim: int, group: str) -> None:
    assert route(name, ndim, OptimizerConfig()) == group


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Tiny()
    model.lm_head.weight.requires_grad_(False)
    assert list(names_of(model, OptimizerConfig())) == ["embedding", "matrix", "scalar"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(model, OptimizerConfig())


def test_settings_reach_the_groups() -> None:
    config = OptimizerConfig(
        matrix_lr=0.1,
        scalar_lr=0.2,
        embedding_lr=0.3,
        head_lr=0.4,
        nesterov=False,
        ns_steps=7,
        ns_coefficients="polar_express",
        decay_order="after",
        muon_weight_decay=0.6,
        adam_weight_decay=0.7,
        head_weight_decay=0.8,
        beta1=0.11,
        beta2=0.12,
        eps=0.13,
        grad_clip_norm=None,
        momentum_format="int8",
    )
    optimizer = build_optimizer(Tiny(), config)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    matrix = by_name["matrix"]
    assert (matrix["lr"], matrix["weight_decay"]) == (0.1, 0.6)
    assert 0 < matrix["momentum"] < 1  # a start; ScheduleConfig sets it at every step
    assert (matrix["nesterov"], matrix["ns_steps"]) == (False, 7)
    assert (matrix["ns_coefficients"], matrix["decay_order"]) == ("polar_express", "after")
    for name, lr, decay in (("scalar", 0.2, 0.7), ("embedding", 0.3, 0.7), ("head", 0.4, 0.8)):
        assert (by_name[name]["lr"], by_name[name]["weight_decay"]) == (lr, decay)
        assert (by_name[name]["betas"], by_name[name]["eps"]) == ((0.11, 0.12), 0.13)
    assert optimizer.grad_clip_norm is None
    matrices = matrix["params"]
    assert all("momentum_codes" in optimizer.state[p] for p in matrices)
    assert build_optimizer(Tiny(), OptimizerConfig()).grad_clip_norm == 0.3
    assert build_optimizer(Tiny(), OptimizerConfig(clip="local")).clip == "local"


@pytest.mark.parametrize(("is_cuda", "compiled"), [(True, [True, False]), (False, [False] * 2)])
def test_muon_is_compiled_where_it_is_asked_for_on_a_gpu(monkeypatch, is_cuda, compiled) -> None:
    asked = []
    monkeypatch.setattr(groups, "MuonAdamW", lambda *_, compile, **__: asked.append(compile))
    parameter = SimpleNamespace(requires_grad=True, ndim=2, is_cuda=is_cuda)
    gpt = SimpleNamespace(named_parameters=lambda: [("blocks.0.c_q.weight", parameter)])
    for wanted in (True, False):
        build_optimizer(gpt, OptimizerConfig(compile=wanted))
    assert asked == compiled


@pytest.mark.parametrize(
    "bad",
    [
        {"matrix_lr": -0.1},
        {"adam_weight_decay": -1.0},
        {"beta2": 1.5},
        {"eps": 0.0},
        {"grad_clip_norm": 0.0},
        {"ns_steps": 0},
    ],
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)
