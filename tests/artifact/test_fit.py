"""The search for the size: it ends at or under the limit, uses it, and says when nothing fits."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgl.artifact import ArtifactTooLarge, fit_to_limit
from pgl.artifact.fit import MAX_OCTAVES, MAX_PACKS, code_bytes
from pgl.quant import QuantConfig, RowGrid, StateQuantizer, TensorRule

FIXED_BYTES = 5_000


def quantizer(bits=6, rows=400, std=0.1):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "blocks.0.mlp.fc.weight": torch.randn(rows, 256, generator=generator) * std,
        "tok_emb.weight": torch.randn(rows // 4, 64, generator=generator) * std,
    }
    rule = TensorRule(grid=RowGrid(bits=bits))
    return StateQuantizer(weights, QuantConfig(mlp=rule, passthrough_max_numel=0))


class Counted:
    """Packs to the entropy and something that the search does not know of."""

    def __init__(self, waste=1.03):
        self.waste, self.sizes = waste, []

    def __call__(self, stored):
        self.sizes.append(FIXED_BYTES + int(self.waste * code_bytes(stored)))
        return self.sizes[-1]


@given(limit_bytes=st.integers(8_000, 110_000), waste=st.floats(0.95, 1.2))
@example(limit_bytes=108_681, waste=1.03125)  # just below 8 bits a code, where finer steps cost
@example(limit_bytes=107_780, waste=1.0159451947392373)  # hardly more
@settings(max_examples=25, deadline=None)
def test_any_limit_is_kept_and_used(limit_bytes, waste):
    pack = Counted(waste)
    fit = fit_to_limit(quantizer(), pack, limit_bytes, refine=True)
    assert pack.sizes[fit.chosen] <= limit_bytes
    assert FIXED_BYTES + int(waste * code_bytes(fit.stored)) == pack.sizes[fit.chosen]
    assert [attempt.total_bytes for attempt in fit.attempts] == pack.sizes
    assert len(pack.sizes) <= MAX_PACKS
    # 8 bits a code are the most there is.
    most_bytes = FIXED_BYTES + int(waste * code_bytes(quantizer()(2**-8)))
    assert pack.sizes[fit.chosen] > min(0.99 * limit_bytes, 0.99 * most_bytes)


def test_a_plan_that_fits_is_left_alone_unless_bytes_are_to_be_used():
    plan = quantizer()(1.0)
    size = FIXED_BYTES + int(1.03 * code_bytes(plan))
    for limit_bytes in (size, 2 * size, None):
        fit = fit_to_limit(quantizer(), Counted(), limit_bytes, refine=False)
        assert fit.step_factor == 1
        assert len(fit.attempts) == 1
        assert all(torch.equal(fit.stored[name].data, plan[name].data) for name in plan)
    finer = fit_to_limit(quantizer(), Counted(), int(1.3 * size), refine=True)
    assert finer.step_factor < 1
    assert finer.stored["blocks.0.mlp.fc.weight"].kind == "int7"


def test_a_plan_that_does_not_fit_gets_coarser_steps():
    size = FIXED_BYTES + int(1.03 * code_bytes(quantizer()(1.0)))
    fit = fit_to_limit(quantizer(), Counted(), int(0.8 * size), refine=False)
    assert fit.step_factor > 1
    assert fit.attempts[0].total_bytes == size
    assert fit.attempts[fit.chosen].total_bytes <= 0.8 * size


def test_a_limit_below_what_is_not_coded_is_refused():
    with pytest.raises(ArtifactTooLarge, match=r"with every code zero, .* limit of 4,000"):
        fit_to_limit(quantizer(), Counted(), 4_000, refine=True)


def test_a_size_that_jumps_about_still_ends_under_the_limit():
    class Jumpy(Counted):
        def __call__(self, stored):
            super().__call__(stored)
            self.sizes[-1] += 9_000 * (len(self.sizes) % 2)
            return self.sizes[-1]

    for limit_bytes in (20_000, 40_000):
        pack = Jumpy()
        fit = fit_to_limit(quantizer(), pack, limit_bytes, refine=True)
        assert pack.sizes[fit.chosen] <= limit_bytes
        assert len(pack.sizes) <= MAX_PACKS + MAX_OCTAVES


def test_entropy_of_codes():
    stored = quantizer(rows=4)(1.0)
    expected = 0.0
    for tensor in stored.values():
        counts = tensor.data.flatten().long().add(128).bincount().double()
        share = counts[counts > 0] / counts.sum()
        expected -= float((share.log2() * counts[counts > 0]).sum()) / 8
    assert code_bytes(stored) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.6, 0.9, 1.2])
def test_what_is_left_unused_is_what_is_documented(share):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2000, 256, generator=generator) * torch.rand(2000, 1, generator=generator)
    # Without a floor each row has a step of its own, so the size moves smoothly.
    rule = TensorRule(grid=RowGrid(scale_floor=None))
    config = QuantConfig(mlp=rule, passthrough_max_numel=0)
    quantise, pack = StateQuantizer({"blocks.0.mlp.fc.weight": weights}, config), Counted()
    limit_bytes = int(share * pack(quantise(1.0)))
    pack.sizes.clear()
    fit = fit_to_limit(quantise, pack, limit_bytes, refine=True)
    assert 0 <= limit_bytes - pack.sizes[fit.chosen] <= max(limit_bytes / 4000 + 1, 64)
    assert len(pack.sizes) <= 4


@pytest.mark.parametrize("share", [0.6, 0.9, 1.2])
def test_one_step_for_all_rows_leaves_no_more_than_its_rounding(share):
    quantise, pack = quantizer(rows=2000), Counted()
    limit_bytes = int(share * pack(quantise(1.0)))
    fit = fit_to_limit(quantise, pack, limit_bytes, refine=True)
    spacing_bytes = 1.03 * 2000 * 256 * 2**-10 / math.log(2) / 8  # of float16, at a bit an octave
    unused = limit_bytes - fit.attempts[fit.chosen].total_bytes
    assert 0 <= unused <= limit_bytes / 4000 + 1.1 * spacing_bytes


def test_codes_that_no_step_makes_zero_are_zeroed_before_a_limit_is_refused():
    weights = torch.zeros(8, 64)
    weights[:, 0] = 4e6  # the largest step keeps a code of 61
    rule = TensorRule(grid=RowGrid(clip="quantile", clip_quantile=0.5))
    config = QuantConfig(mlp=rule, passthrough_max_numel=0)
    quantise = StateQuantizer({"blocks.0.mlp.fc.weight": weights}, config)
    assert quantise(2.0**MAX_OCTAVES)["blocks.0.mlp.fc.weight"].data.any()
    fit = fit_to_limit(quantise, lambda stored: int(code_bytes(stored)), 1, refine=False)
    assert fit.attempts[fit.chosen].total_bytes <= 1
    assert not fit.stored["blocks.0.mlp.fc.weight"].data.any()
