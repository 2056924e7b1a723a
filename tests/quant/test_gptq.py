import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pgl.quant import GPTQConfig, RowGrid, dequantize_rows, gptq, quantize_rows
from pgl.quant.gptq import damp, inverse_factor

GRID = RowGrid(clip="search")


def problem(rows=12, columns=40, seed=0, std=0.2):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator) * std, x.T @ x


def slow_gptq(w, hessian, grid, config):
    """No blocks, no factor: after each column the rest is re-solved from the inverse Hessian."""
    hessian = damp(hessian, config.damping).double()
    order = hessian.diagonal().argsort(descending=True) if config.act_order else None
    order = torch.arange(w.shape[1]) if order is None else order
    steps = quantize_rows(w, grid).scale_R.double()
    w = w.double()[:, order].clone()
    hessian = hessian[order][:, order]
    codes = torch.zeros(w.shape)
    for i in range(w.shape[1]):
        codes[:, i] = (w[:, i] / steps).round().clamp(grid.min_code, grid.max_code)
        error = w[:, i] - codes[:, i] * steps
        inverse = torch.linalg.inv(hessian[i:, i:])
        w[:, i + 1 :] -= error[:, None] * inverse[0, 1:] / inverse[0, 0]
    return codes[:, order.argsort()].to(torch.int8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_columns", [1, 7, 40, 128])
def test_against_the_slow_twin(act_order, block_columns):
    w, hessian = problem()
    config = GPTQConfig(act_order=act_order, block_columns=block_columns)
    grid = RowGrid(clip="max")
    codes = gptq(w, hessian, grid, config).codes_RC
    agree = (codes == slow_gptq(w, hessian, grid, config)).float().mean()
    assert agree > 0.99  # a tie may break the other way in float32


def output_loss(w, rows, hessian):
    error = w - dequantize_rows(rows)
    return (error @ hessian * error).sum().item()


def test_outputs_are_better_than_by_rounding():
    w, hessian = problem()
    rounded = output_loss(w, quantize_rows(w, GRID), hessian)
    assert output_loss(w, gptq(w, hessian, GRID), hessian) < 0.7 * rounded


def test_a_diagonal_hessian_is_plain_rounding():
    w, _ = problem()
    hessian = torch.diag(torch.rand(w.shape[1]) + 0.1)
    assert torch.equal(gptq(w, hessian, GRID).codes_RC, quantize_rows(w, GRID).codes_RC)


@given(
    count=st.integers(1, 4),
    rows=st.integers(1, 6),
    columns=st.integers(1, 30),
    shared=st.booleans(),
    std=st.sampled_from([0.05, 1.0]),
)
@settings(max_examples=20, deadline=None)
def test_a_stack_is_its_matrices(count, rows, columns, shared, std):
    problems = [problem(rows, columns, seed, std) for seed in range(count)]
    weights = torch.stack([w for w, _ in problems])
    hessians = torch.stack([h for _, h in problems])
    hessian = hessians[0] if shared else hessians
    together = gptq(weights, hessian, GRID)
    for k in range(count):
        alone = gptq(weights[k], hessian if shared else hessians[k], GRID)
        assert torch.equal(together.scale_R[k], alone.scale_R)
        assert (together.codes_RC[k] == alone.codes_RC).float().mean() > 0.97


def test_factor_is_that_of_the_inverse():
    _, hessian = problem()
    damped = damp(hessian, 0.01)
    factor = inverse_factor(damped).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor, torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-8
    )


def test_the_scale_of_the_hessian_does_not_matter():
    w, hessian = problem()
    small = gptq(w, hessian / 1024, GRID)
    assert torch.equal(gptq(w, hessian, GRID).codes_RC, small.codes_RC)


def test_each_setting_changes_the_result():
    w, hessian = problem(std=2.0)
    grid = RowGrid(bits=5, clip="search", search_quantiles=[0.8, 1.0], scale_floor=None)
    base = gptq(w, hessian, grid).codes_RC
    for config in (GPTQConfig(damping=1.0), GPTQConfig(act_order=False)):
        assert not torch.equal(gptq(w, hessian, grid, config).codes_RC, base)
    by_output = gptq(w, hessian, grid, GPTQConfig(select_by="hessian"))
    by_weight = gptq(w, hessian, grid, GPTQConfig(select_by="mse"))
    assert output_loss(w, by_output, hessian) <= output_loss(w, by_weight, hessian)
    worse = [
        output_loss(w, gptq(w, hessian, RowGrid(5, "search", 1.0, [p], scale_floor=None)), hessian)
        for p in (0.8, 1.0)
    ]
    assert output_loss(w, by_output, hessian) == pytest.approx(min(worse))


@pytest.mark.parametrize(("select_by", "quantile"), [("mse", 1.0), ("hessian", 0.9)])
def test_the_quantile_is_the_best_for_the_weights_or_for_the_outputs(select_by, quantile):
    # An outlier on an input that is next to never there: its error moves no output.
    w, hessian = problem()[0], torch.eye(40)
    w[:, 3] = 10 * w.abs().max()
    hessian[3, 3] = 1e-9
    settings = {"clip": "search", "scale_floor": None}
    searched = RowGrid(search_quantiles=[0.9, 1.0], **settings)
    rows = gptq(w, hessian, searched, GPTQConfig(select_by=select_by))
    alone = gptq(w, hessian, RowGrid(search_quantiles=[quantile], **settings))
    assert torch.equal(rows.scale_R, alone.scale_R)
    assert torch.equal(rows.codes_RC, alone.codes_RC)


class ProductCounter(TorchDispatchMode):
    """Counts the products that correct columns which are still to be coded."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.baddbmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("block_columns", "blocks"), [(7, 6), (40, 1)])
def test_columns_are_corrected_block_by_block(block_columns, blocks):
    w, hessian = problem()
    with ProductCounter() as products:
        gptq(w, hessian, RowGrid(clip="max"), GPTQConfig(block_columns=block_columns))
    assert products.count == w.shape[1] + blocks


def test_weight_clamp_of_the_grid_holds():
    w, hessian = problem()
    w[:, 3] = 9.0
    grid = RowGrid(clip="quantile", clip_quantile=0.5, clip_weights=True)
    bound = torch.quantile(w.abs(), 0.5, dim=1)
    restored = dequantize_rows(gptq(w, hessian, grid)).abs().amax(1)
    assert (restored <= bound + 1 / 31).all()


def test_autocast_changes_nothing():
    w, hessian = problem()
    plain = gptq(w, hessian, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gptq(w, hessian, GRID).codes_RC, plain.codes_RC)


def test_a_bad_hessian_is_refused():
    w, hessian = problem()
    with pytest.raises(ValueError, match="positive definite"):
        gptq(w, -hessian, GRID)
    hessian[0, 0] = torch.nan
    with pytest.raises(ValueError, match="positive definite"):
        gptq(w, hessian, GRID)


@pytest.mark.parametrize(("setting", "value"), [("damping", -0.1), ("block_columns", 0)])
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"artifact.quant.gptq.{setting}"):
        GPTQConfig(**{setting: value})


def test_inputs_that_were_never_seen_leave_plain_rounding():
    w, _ = problem()
    grid = RowGrid(clip="max", scale_floor=None)
    found = gptq(w, torch.zeros(w.shape[1], w.shape[1]), grid)
    assert torch.equal(found.codes_RC, quantize_rows(w, grid).codes_RC)


@pytest.mark.parametrize("clip", ["max", "search"])
@pytest.mark.parametrize("select_by", ["mse", "hessian"])
def test_weights_beyond_all_steps_are_called_diverged(clip, select_by):
    torch.manual_seed(0)
    w, x = torch.randn(2, 8, 16), torch.randn(99, 16)
    w[1, 3] = 1e8
    grid = RowGrid(clip=clip)
    for code in (
        lambda: gptq(w, x.T @ x, grid, GPTQConfig(select_by=select_by)),
        lambda: quantize_rows(w, grid),
    ):
        with pytest.raises(ValueError, match="the weights have diverged"):
            code()
