"""The optimizer against torch's own; what it promises of clipping, gradients and settings."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pgl.optim import MuonAdamW, zeropower
from pgl.optim.clip import clip_coefficient
from tests.optim.optimizers import (
    SCALAR_SHAPES,
    SHAPES,
    all_parameters,
    make_optimizer,
    make_parameters,
    random,
    set_gradients,
    snapshot,
    train,
)


def naive_muon(p: Tensor, gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    p, m = p.detach().clone(), torch.zeros_like(p)
    for g in gradients:
        m = group["momentum"] * m + g
        u = g + group["momentum"] * m if group["nesterov"] else m
        o = zeropower(u, group["ns_steps"], group["ns_coefficients"], dtype=torch.float32)
        o = o * max(1, p.size(0) / p.size(1)) ** 0.5
        p = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * o
    return p


@pytest.mark.parametrize(
    "settings",
    [{}, {"nesterov": False}, {"ns_steps": 3}, {"ns_coefficients": "polar_express"}],
)
def test_every_matrix_equals_naive_muon(settings: dict[str, Any]) -> None:
    group = {"kind": "muon", "name": "matrix", "params": make_parameters(SHAPES)}
    group |= {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True}
    group |= {"ns_steps": 5, "ns_coefficients": "keller", **settings}
    optimizer = MuonAdamW([group], ns_dtype=torch.float32)
    expected = [
        naive_muon(p, [random(*p.shape, seed=1000 * step + i) for step in range(4)], group)
        for i, p in enumerate(group["params"])
    ]
    train(optimizer, 0, 4)
    for ours, theirs in zip(group["params"], expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


def test_muon_against_torch() -> None:
    ours, theirs = make_parameters(SHAPES), make_parameters(SHAPES)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    optimizer = MuonAdamW([{"kind": "muon", "name": "matrix", "params": ours, **settings}])
    # Its momentum has a factor (1 - mu), which the normalisation of Newton-Schulz cancels.
    reference = torch.optim.Muon(theirs, nesterov=True, adjust_lr_fn="original", **settings)
    for step in range(5):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(*a.shape, seed=1000 * step + i)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=6e-3)  # both iterate in bf16


@pytest.mark.parametrize(
    ("betas", "eps", "weight_decay"),
    [((0.9, 0.95), 1e-8, 0.0), ((0.9, 0.95), 1e-8, 0.1), ((0.5, 0.8), 0.01, 0.1)],
)
def test_adamw_against_torch(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    ours, theirs = make_parameters(SCALAR_SHAPES), make_parameters(SCALAR_SHAPES)
    settings = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer = MuonAdamW([{"kind": "adamw", "name": "scalar", "params": ours, **settings}])
    reference = torch.optim.AdamW(theirs, foreach=False, fused=False, **settings)
    for step in range(10):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = None if (step, i) == (3, 1) else random(*a.shape, seed=1000 * step + i)
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_clip_equals_torch_clip() -> None:
    clipped = make_optimizer(grad_clip_norm=0.3)
    plain = make_optimizer()
    for step in range(3):
        set_gradients(clipped, step)
        set_gradients(plain, step)
        gradients = [p.grad.clone() for p in all_parameters(clipped)]
        norm = torch.nn.utils.clip_grad_norm_(all_parameters(plain), 0.3)
        clipped.step()
        plain.step()
        torch.testing.assert_close(clipped.grad_norm, norm.float(), rtol=5e-3, atol=0)
        assert plain.grad_norm < 0.31
        for parameter, gradient in zip(all_parameters(clipped), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
    for a, b in zip(snapshot(clipped), snapshot(plain), strict=True):
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 3e-3
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_clip_changes_momentum_by_its_coefficient() -> None:
    clipped, plain = make_optimizer(grad_clip_norm=0.5), make_optimizer()
    train(clipped, 0, 1)
    train(plain, 0, 1)
    factor = 0.5 / (plain.grad_norm + 1e-6)
    for a, b in zip(all_parameters(clipped), all_parameters(plain), strict=True):
        for key in ("momentum_buffer", "exp_avg"):
            if key in plain.state[b]:
                torch.testing.assert_close(
                    clipped.state[a][key], plain.state[b][key] * factor, rtol=1e-2, atol=1e-4
                )


def test_bf16_parameters_are_clipped_those_without_dimensions_too() -> None:
    optimizers = []
    for grad_clip_norm in (0.3, None):
        parameters = [Parameter(p.detach().bfloat16()) for p in make_parameters(SCALAR_SHAPES)]
        group = {"kind": "adamw", "name": "scalar", "params": parameters}
        optimizers.append(MuonAdamW([group], grad_clip_norm=grad_clip_norm))
        set_gradients(optimizers[-1], 0)
    clipped, plain = optimizers
    clipped.step()
    for parameter in all_parameters(plain):
        parameter.grad.mul_(clip_coefficient(clipped.grad_norm, 0.3))
    plain.step()
    for a, b in zip(all_parameters(clipped), all_parameters(plain), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(clipped.state[a]["exp_avg"], plain.state[b]["exp_avg"])


def test_gradient_norm_is_known_without_clipping() -> None:
    optimizer = make_optimizer()
    assert optimizer.grad_norm.isnan()
    train(optimizer, 0, 1)
    expected = sum((p.grad.double() ** 2).sum() for p in all_parameters(optimizer)).sqrt()
    assert optimizer.grad_norm.ndim == 0
    torch.testing.assert_close(optimizer.grad_norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum_format", ["float32", "int8"])
def test_matrix_without_gradient_only_decays(momentum_format: str) -> None:
    optimizer = make_optimizer(momentum_format=momentum_format)
    twin = make_optimizer(momentum_format=momentum_format)
    train(optimizer, 0, 1)
    train(twin, 0, 1)
    set_gradients(optimizer, 1)
    set_gradients(twin, 1)
    silent = optimizer.param_groups[1]["params"][1]
    silent.grad = None
    state = {key: value.clone() for key, value in optimizer.state[silent].items()}
    before = silent.detach().clone()
    scalar = optimizer.param_groups[2]["params"][0]
    scalar.grad, scalar_before = None, scalar.detach().clone()
    optimizer.step()
    twin.step()
    torch.testing.assert_close(silent.detach(), before * (1 - 0.02 * 0.1))
    for key, value in state.items():
        assert torch.equal(optimizer.state[silent][key], value)
    assert torch.equal(scalar.detach(), scalar_before)
    for i in (0, 2, 3, 4):  # the others move as if nothing had happened
        ours = optimizer.param_groups[1]["params"][i]
        theirs = twin.param_groups[1]["params"][i]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_step_without_any_gradient() -> None:
    optimizer = make_optimizer(grad_clip_norm=0.3)
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0
    for i, (a, b) in enumerate(zip(snapshot(optimizer), before, strict=True)):
        factor = 1 - 0.02 * 0.1 if 1 <= i <= len(SHAPES) else 1.0
        torch.testing.assert_close(a, b * factor)


def test_closure_comes_first_and_its_loss_comes_back() -> None:
    optimizer = make_optimizer()
    twin = make_optimizer()
    train(twin, 0, 1)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        set_gradients(optimizer, 0)
        return torch.tensor(3.5)

    assert optimizer.step(closure).item() == 3.5
    for a, b in zip(snapshot(optimizer), snapshot(twin), strict=True):
        assert torch.equal(a, b)


def test_rate_and_momentum_are_read_at_every_step() -> None:
    optimizer = make_optimizer(ns_dtype=torch.float32)
    group = optimizer.param_groups[1]
    group["momentum"] = 0.0
    train(optimizer, 0, 1)
    group["momentum"] = 0.5
    train(optimizer, 1, 2)
    p = group["params"][0]
    expected = 0.5 * random(*p.shape, seed=1) + random(*p.shape, seed=1001)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)
    for each in optimizer.param_groups:
        each["lr"] = 0.0
    before = snapshot(optimizer)
    train(optimizer, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))
    assert [each["initial_lr"] for each in optimizer.param_groups] == [0.03, 0.02, 0.01]


@pytest.mark.parametrize(
    "change",
    [
        {"nesterov": False},
        {"ns_steps": 2},
        {"ns_coefficients": "polar_express"},
        {"decay_order": "after"},
        {"weight_decay": 0.5},
    ],
)
def test_every_muon_setting_acts(change: dict[str, Any]) -> None:
    changed, plain = make_optimizer(), make_optimizer()
    changed.param_groups[1].update(change)
    train(changed, 0, 2)
    train(plain, 0, 2)
    for a, b in zip(
        changed.param_groups[1]["params"], plain.param_groups[1]["params"], strict=True
    ):
        assert not torch.equal(a, b)


def test_it_fits_a_matrix() -> None:
    target = random(8, 8, seed=7)
    weight = Parameter(torch.zeros(8, 8))
    optimizer = MuonAdamW([{"kind": "muon", "name": "matrix", "params": [weight], "momentum": 0.9}])
    for step in range(200):
        optimizer.zero_grad()
        ((weight - target) ** 2).mean().backward()
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.step()
    assert ((weight - target) ** 2).mean() < 0.01


@pytest.mark.slow
def test_compiled_update_equals_eager_and_does_not_recompile() -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (9, 3)]  # two of them each other's transpose

    def make(compile: bool) -> MuonAdamW:
        group = {"kind": "muon", "name": "matrix", "params": make_parameters(shapes)}
        return MuonAdamW([group], grad_clip_norm=0.3, ns_dtype=torch.float32, compile=compile)

    compiled, eager = make(True), make(False)
    counters = torch._dynamo.utils.counters
    before, graphs = counters["stats"]["unique_graphs"], []
    for step in range(3):
        for optimizer in (compiled, eager):
            optimizer.param_groups[0].update(lr=0.02 / (step + 1), momentum=0.9 + 0.03 * step)
            set_gradients(optimizer, step)
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert [count - before for count in graphs] == [1, 1, 1], "all shapes in one graph"
    for a, b in zip(snapshot(compiled), snapshot(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
