"""RoPE: what a rotation has to do, whatever the numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.model.rotary import apply_rotary, inverse_frequencies, ntk_base, rotary_table

CPU = torch.device("cpu")


@given(shift=st.integers(0, 40), rotated_dims=st.sampled_from([4, 8, 16]), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_scores_depend_on_distance_only(shift: int, rotated_dims: int, seed: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_table(64, 10000.0, rotated_dims, 64, CPU)

    def score(t: int, s: int) -> float:
        rotated_q = apply_rotary(q, cos[t : t + 1], sin[t : t + 1])
        rotated_k = apply_rotary(k, cos[s : s + 1], sin[s : s + 1])
        return float((rotated_q * rotated_k).sum())

    assert score(20, 7) == pytest.approx(score(20 + shift, 7 + shift), abs=1e-4)


@given(rotated_dims=st.sampled_from([4, 8, 16]))
@settings(max_examples=3, deadline=None)
def test_only_the_first_dimensions_turn_and_lengths_stay(rotated_dims: int) -> None:
    x = torch.randn(2, 9, 3, 16)
    y = apply_rotary(x, *rotary_table(9, 10000.0, rotated_dims, 64, CPU))
    assert torch.equal(y[..., rotated_dims:], x[..., rotated_dims:])
    assert not torch.equal(y[:, 1:, :, :rotated_dims], x[:, 1:, :, :rotated_dims])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_ntk_rule_stretches_the_slowest_rotation_by_the_context() -> None:
    assert ntk_base(10000.0, 16, 1024, 1024) == 10000.0
    assert ntk_base(10000.0, 16, 1024, 2048) == pytest.approx(22081.79, abs=0.01)
    assert ntk_base(10000.0, 64, 2048, 4096) == pytest.approx(20452.23, abs=0.01)
    for dims in (4, 16, 64):
        slowest = [ntk_base(500.0, dims, 8, n) ** -((dims - 2) / dims) for n in (8, 24)]
        assert slowest[0] / slowest[1] == pytest.approx(3.0)


def test_table_is_float32_even_under_autocast_and_inference_mode() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotary_table(2048, 10000.0, 64, 2048, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert float(cos[2047, 0]) == pytest.approx(math.cos(2047), abs=1e-6)


@pytest.mark.parametrize("dims", [8, 16, 64])
def test_frequencies_are_those_of_the_definition(dims):
    found = inverse_frequencies(10000.0, dims, torch.device("cpu"))
    expected = [10000.0 ** (-2 * j / dims) for j in range(dims // 2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_contexts_up_to_the_reference_length_keep_the_base():
    assert {ntk_base(10000.0, 16, 1024, length) for length in (1, 400, 700, 1023, 1024)} == {
        10000.0
    }
    assert ntk_base(10000.0, 16, 1024, 1025) > 10000.0
