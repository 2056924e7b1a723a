"""Pieces of Muon against their obvious twins."""

import pytest
import torch
from torch.nn import Parameter

from pgl.optim.int8_momentum import dequantize_blocks, quantize_blocks
from pgl.optim.momentum import FloatMomentum, Int8Momentum
from pgl.optim.muon import (
    advance_stacks,
    apply_update_,
    momentum_direction,
    shape_scale,
)
from pgl.optim.ranks import Ranks


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


def advance(
    M: torch.Tensor, G: torch.Tensor, grad_scale: torch.Tensor | None, places: int
) -> torch.Tensor:
    dtype = torch.float64
    arguments = (grad_scale, 0.9, True, [places], 5, "keller", dtype, [dtype])
    [directions] = advance_stacks([M], [G], *arguments)
    return directions


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_together_are_the_whole(world_size: int) -> None:
    count = 5
    G, start = random(count, 6, 4).double(), random(count, 6, 4, seed=1).double()
    whole_M = start.clone()
    whole = advance(whole_M, G, None, count)
    shares = []
    for rank in range(world_size):
        ranks = Ranks(rank, world_size)
        own = slice(ranks.own(count).start, ranks.own(count).stop)
        M = start[own].clone()
        shares.append(advance(M, G[own], None, ranks.places(count)))
        assert torch.equal(M, whole_M[own])
    gathered = torch.cat(shares)
    torch.testing.assert_close(gathered[:count], whole, rtol=1e-7, atol=1e-9)
    assert not gathered[count:].any()


def test_several_stacks_at_once_are_those_one_by_one() -> None:
    shapes = [(3, 6, 4), (2, 4, 6), (1, 5, 5)]
    gradients = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    together = [torch.zeros(shape) for shape in shapes]
    arguments = (torch.tensor(0.5), 0.9, True)
    directions = advance_stacks(
        together, gradients, *arguments, [3, 2, 2], 5, "keller", torch.float32, [torch.float32] * 3
    )
    for M, G, O_KRC, places in zip(together, gradients, directions, [3, 2, 2], strict=True):
        alone = torch.zeros_like(M)
        [expected] = advance_stacks(
            [alone], [G], *arguments, [places], 5, "keller", torch.float32, [torch.float32]
        )
        assert O_KRC.is_contiguous()
        torch.testing.assert_close(O_KRC, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(M, alone)


def test_gradient_scale_acts_before_the_momentum() -> None:
    G = random(2, 4, 4).double()
    scaled, plain = torch.zeros_like(G), torch.zeros_like(G)
    advance(scaled, G, torch.tensor(0.25).double(), 2)
    advance(plain, G * 0.25, None, 2)
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("count", [1, 2, 7, 11, 22])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_item_has_one_owner(world_size: int, count: int) -> None:
    ranks = [Ranks(rank, world_size) for rank in range(world_size)]
    owned = [item for rank in ranks for item in rank.own(count)]
    assert owned == list(range(count))
    assert all(len(rank.own(count)) <= rank.places(count) for rank in ranks)
    assert ranks[0].places(count) * world_size < count + world_size


def test_float_state_is_a_view_of_the_stack() -> None:
    momentum = FloatMomentum(2, Parameter(random(3, 4)), torch.bfloat16)
    momentum.read()[1] = 2.0
    assert momentum.stacks["momentum_buffer"][1].eq(2.0).all()
    assert momentum.stacks["momentum_buffer"][0].eq(0.0).all()
    assert momentum.read().dtype == torch.bfloat16


def test_int8_momentum_reads_what_was_written() -> None:
    momentum = Int8Momentum(3, Parameter(random(20, 30)))  # 600 values: 2 blocks and a rest
    assert not momentum.read().any()
    M = random(3, 20, 30, seed=4).bfloat16()
    momentum.write(M)
    for i in range(3):
        codes, scale = quantize_blocks(M[i].flatten())
        assert torch.equal(momentum.stacks["momentum_codes"][i], codes)
        assert torch.equal(momentum.stacks["momentum_scale"][i], scale)
        assert torch.equal(momentum.read()[i], dequantize_blocks(codes, scale, 600).view(20, 30))
