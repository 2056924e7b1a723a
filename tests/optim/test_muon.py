"""Pieces of Muon against their obvious twins."""

import pytest
import torch
from torch.nn import Parameter

from pgl.optim.int8_momentum import dequantize_blocks, quantize_blocks
from pgl.optim.muon import (
    FloatMomentum,
    Int8Momentum,
    apply_update_,
    momentum_direction,
    shape_scale,
    sharded_update,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_shape_scale() -> None:
    assert shape_scale(1536, 512) == pytest.approx(3**0.5)
    assert shape_scale(512, 1536) == 1.0
    assert shape_scale(512, 128) == 2.0


def test_direction_without_nesterov_is_the_momentum() -> None:
    M, G = random(2, 3, 4), random(2, 3, 4, seed=1)
    expected = 0.9 * M + G
    direction = momentum_direction(M, G, 0.9, nesterov=False)
    torch.testing.assert_close(direction, expected)
    torch.testing.assert_close(M, expected)
    lookahead = momentum_direction(M, G, 0.9, nesterov=True)
    torch.testing.assert_close(lookahead, G + 0.9 * (0.9 * expected + G))


def test_decay_before_and_after() -> None:
    p, u = random(3, 4), random(3, 4, seed=1)
    for order, expected in (("before", p * 0.9 - 0.5 * u), ("after", (p - 0.5 * u) * 0.9)):
        ours = p.clone()
        apply_update_([ours], u[None], 0.5, 0.1, order)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_together_are_the_whole(world_size: int) -> None:
    count = 5
    G, start = random(count, 6, 4), random(count, 6, 4, seed=1)
    settings = (True, 5, "keller", torch.float64)

    def run(M: torch.Tensor, first: int, size: int) -> torch.Tensor:
        nesterov, steps, coefficients, dtype = settings
        return sharded_update(
            M, G.double(), None, 0.9, nesterov, first, size, steps, coefficients, dtype
        )

    whole_M = start.double()
    whole = run(whole_M, 0, count)
    size = -(-count // world_size)
    shards = []
    for rank in range(world_size):
        M = start.double()
        shards.append(run(M, rank * size, size))
        assert torch.equal(M, whole_M)
    gathered = torch.cat(shards)
    torch.testing.assert_close(gathered[:count], whole, rtol=1e-7, atol=1e-9)
    assert not gathered[count:].any()


def test_gradient_scale_acts_before_the_momentum() -> None:
    G = random(2, 4, 4)
    scaled, plain = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    arguments = (0.9, True, 0, 2, 5, "keller", torch.float32)
    sharded_update(scaled, G, torch.tensor(0.25), *arguments)
    sharded_update(plain, G * 0.25, None, *arguments)
    assert torch.equal(scaled, plain)


def test_float_state_is_a_view_of_the_stack() -> None:
    stack = FloatMomentum([Parameter(random(3, 4)) for _ in range(2)], torch.bfloat16)
    stack.read()[1] = 2.0
    assert stack.state(1)["momentum_buffer"].eq(2.0).all()
    assert stack.state(0)["momentum_buffer"].eq(0.0).all()
    assert stack.read().dtype == torch.bfloat16


def test_int8_momentum_reads_what_was_written() -> None:
    parameters = [Parameter(random(20, 30)) for _ in range(3)]  # 600 values: 2 blocks and a rest
    stack = Int8Momentum(parameters)
    assert not stack.read().any()
    M = random(3, 20, 30, seed=4).bfloat16()
    stack.write(M)
    for i in range(3):
        codes, scale = quantize_blocks(M[i].flatten())
        assert torch.equal(stack.state(i)["momentum_codes"], codes)
        assert torch.equal(stack.state(i)["momentum_scale"], scale)
        assert torch.equal(stack.read()[i], dequantize_blocks(codes, scale, 600).view(20, 30))
