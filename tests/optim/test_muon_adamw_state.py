"""What the optimizer keeps, saves, loads and refuses."""

import copy
import io
from typing import Any

import pytest
import torch

from pgl.optim import MuonAdamW
from tests.optim.optimizers import (
    SHAPES,
    all_parameters,
    make_optimizer,
    make_parameters,
    snapshot,
    train,
)


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
