"""The optimizer against torch's own, and what it promises about state, clipping and gradients."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pgl.optim import MuonAdamW, zeropower

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


def naive_muon(p: Tensor, gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    p, m = p.detach().clone(), torch.zeros_like(p)
    for g in gradients:
        m = group["momentum"] * m + g
        u = g + group["momentum"] * m
        o = zeropower(u, dtype=torch.float32) * max(1, p.size(0) / p.size(1)) ** 0.5
        p = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * o
    return p


def test_every_matrix_equals_naive_muon() -> None:
    optimizer = make_optimizer(ns_dtype=torch.float32)
    group = optimizer.param_groups[1]
    expected = [
        naive_muon(p, [random(*p.shape, seed=1000 * step + i + 1) for step in range(4)], group)
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_against_torch(weight_decay: float) -> None:
    ours, theirs = make_parameters(SCALAR_SHAPES), make_parameters(SCALAR_SHAPES)
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
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


def test_moments_have_the_type_of_the_parameter() -> None:
    optimizer = make_optimizer()
    table = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[table]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[table]["exp_avg_sq"].dtype == torch.bfloat16
    before = table.detach().clone()
    train(optimizer, 0, 1)
    torch.testing.assert_close(  # a first Adam step is lr * sign
        (before - table.detach()).float(), 0.03 * table.grad.sign().float(), rtol=0, atol=0.02
    )


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


def test_gradient_norm_is_known_without_clipping() -> None:
    optimizer = make_optimizer()
    assert optimizer.grad_norm.isnan()
    train(optimizer, 0, 1)
    expected = sum((p.grad.double() ** 2).sum() for p in all_parameters(optimizer)).sqrt()
    assert optimizer.grad_norm.ndim == 0
    torch.testing.assert_close(optimizer.grad_norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum_format", ["float32", "bfloat16", "int8"])
def test_resume_continues_bit_for_bit(momentum_format: str) -> None:
    straight = make_optimizer(momentum_format=momentum_format, grad_clip_norm=1.0)
    train(straight, 0, 3)
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    weights = snapshot(straight)
    straight.param_groups[1]["lr"] = 0.5  # later changes do not reach the saved state
    straight.param_groups[1]["lr"] = 0.02
    train(straight, 3, 6)

    resumed = make_optimizer(momentum_format=momentum_format, grad_clip_norm=1.0)
    train(resumed, 40, 41)  # other state, which loading has to replace
    for parameter, weight in zip(all_parameters(resumed), weights, strict=True):
        parameter.data.copy_(weight)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, 3, 6)
    for a, b in zip(snapshot(resumed), snapshot(straight), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(all_parameters(resumed), all_parameters(straight), strict=True):
        for key, value in straight.state[b].items():
            assert torch.equal(resumed.state[a][key], value), key


def test_reset_from_a_deep_copy() -> None:
    optimizer = make_optimizer()
    start, weights = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    train(optimizer, 0, 2)
    first = snapshot(optimizer)
    optimizer.load_state_dict(start)
    for parameter, weight in zip(all_parameters(optimizer), weights, strict=True):
        parameter.data.copy_(weight)
    train(optimizer, 0, 2)
    for a, b in zip(snapshot(optimizer), first, strict=True):
        assert torch.equal(a, b)


def test_loading_takes_over_the_settings_of_the_groups() -> None:
    source, target = make_optimizer(), make_optimizer()
    source.param_groups[1].update(lr=0.5, momentum=0.7)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[1]["lr"] == 0.5
    before = snapshot(target)
    train(target, 0, 1)
    moved = (target.param_groups[1]["params"][3].detach() - before[4]).norm()
    assert moved > 0.3  # 0.5 times an orthogonal 6x6 matrix, not 0.02 times


def test_state_exists_before_the_first_step() -> None:
    optimizer = make_optimizer()
    for parameter in all_parameters(optimizer):
        assert optimizer.state[parameter]
    trained = make_optimizer()
    train(trained, 0, 1)
    for a, b in zip(all_parameters(optimizer), all_parameters(trained), strict=True):
        assert optimizer.state[a].keys() == trained.state[b].keys()


def test_refuses_a_state_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="momentum_format='float32' needs"):
        make_optimizer().load_state_dict(make_optimizer(momentum_format="int8").state_dict())
    other = MuonAdamW([{"kind": "muon", "name": "matrix", "params": make_parameters(SHAPES)}])
    with pytest.raises(ValueError, match="routing it was made with"):
        make_optimizer().load_state_dict(other.state_dict())
    same_count = [(8, 12), *SHAPES[1:]]
    reshaped = MuonAdamW(
        [{"kind": "muon", "name": "matrix", "params": make_parameters(same_count)}]
    )
    with pytest.raises(ValueError, match="has shape"):
        other.load_state_dict(reshaped.state_dict())


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


def test_bytes_of_momentum() -> None:
    parameters = make_parameters([(32, 16), (32, 16), (16, 48)])
    values = 2 * 512 + 768
    expected = {"float32": 4 * values, "bfloat16": 2 * values, "int8": values + 2 * values // 256}
    for momentum_format, size in expected.items():
        optimizer = MuonAdamW(
            [{"kind": "muon", "name": "matrix", "params": parameters}],
            momentum_format=momentum_format,
        )
        assert optimizer.momentum_bytes() == size
        assert optimizer.momentum_bytes_saved() == 4 * values - size


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


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"kind": "sgd", "name": "x"}, "needs a 'kind'"),
        ({"kind": "muon"}, "a 'name'"),
        ({"kind": "adamw", "name": "x", "momentum": 0.9}, "adamw does not know: momentum"),
        ({"kind": "muon", "name": "x", "decay_order": "never"}, "decay_order"),
        ({"kind": "muon", "name": "x", "ns_coefficients": "none"}, "ns_coefficients"),
        ({"kind": "muon", "name": "x", "lr": -1.0}, "must not be negative"),
    ],
)
def test_bad_groups_are_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonAdamW([{"params": make_parameters([(2, 2)]), **group}])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="only matrices can be orthogonalised"):
        MuonAdamW([{"kind": "muon", "name": "x", "params": make_parameters([(3,)])}])
    with pytest.raises(ValueError, match="grad_clip_norm must be positive"):
        make_optimizer(grad_clip_norm=0.0)
    with pytest.raises(ValueError, match="momentum_format must be one of"):
        make_optimizer(momentum_format="int4")


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
