import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.quant.rows import RowGrid, dequantize_rows, quantize_rows, row_quantile, storable


def slow_codes(w, grid, clip):
    """One weight at a time, from the definition."""
    codes, steps = [], []
    for row, bound in zip(w.tolist(), clip.tolist(), strict=True):
        step = max(bound / grid.max_code, grid.scale_floor or 2.0**-14)
        used = torch.tensor(step).half().item() if grid.round_scale_first else step
        held = [min(max(x, -bound), bound) if grid.clip_weights else x for x in row]
        codes.append([min(max(round(x / used), grid.min_code), grid.max_code) for x in held])
        steps.append(step)
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(steps).half()


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("floor", [None, 1 / 31])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("clip_weights", [True, False])
def test_against_the_slow_twin(bits, floor, first, clip_weights):
    grid = RowGrid(
        bits=bits,
        clip="quantile",
        clip_quantile=0.9,
        scale_floor=floor,
        round_scale_first=first,
        clip_weights=clip_weights,
        extra_negative_code=bits == 5,
    )
    w = torch.randn(9, 40) * torch.logspace(-3, 1, 9)[:, None]
    rows = quantize_rows(w, grid)
    codes, steps = slow_codes(w, grid, torch.quantile(w.abs(), 0.9, dim=1))
    assert torch.equal(rows.codes_RC, codes)
    torch.testing.assert_close(rows.scale_R, steps, rtol=1e-3, atol=0)


def test_each_setting_changes_the_result():
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 0.3
    w[:, 0] = -40.0
    base = dequantize_rows(quantize_rows(w, RowGrid(clip="quantile", clip_quantile=0.99)))
    changed = {
        "bits": RowGrid(bits=5, clip="quantile", clip_quantile=0.99),
        "clip": RowGrid(clip="max"),
        "clip_quantile": RowGrid(clip="quantile", clip_quantile=0.9),
        "search_quantiles": RowGrid(clip="search", search_quantiles=[0.9]),
        "clip_weights": RowGrid(clip="quantile", clip_quantile=0.99, clip_weights=True),
        "scale_floor": RowGrid(clip="quantile", clip_quantile=0.99, scale_floor=None),
        "extra_negative_code": RowGrid(
            clip="quantile", clip_quantile=0.99, extra_negative_code=True
        ),
    }
    for name, grid in changed.items():
        if name == "scale_floor":
            continue
        assert not torch.equal(dequantize_rows(quantize_rows(w, grid)), base), name
    free = quantize_rows(w * 0.01, changed["scale_floor"])
    assert free.scale_R.max() < quantize_rows(w * 0.01, RowGrid()).scale_R.min()
    fine = torch.linspace(-1, 1, 4096)[None]
    late = quantize_rows(fine * 1.0003, RowGrid(bits=8, round_scale_first=False, scale_floor=None))
    early = quantize_rows(fine * 1.0003, RowGrid(bits=8, scale_floor=None))
    assert torch.equal(late.scale_R, early.scale_R)
    assert not torch.equal(late.codes_RC, early.codes_RC)


def test_leading_matrices_are_independent():
    w = torch.randn(3, 2, 8, 300) * torch.tensor([0.1, 1.0, 20.0])[:, None, None, None]
    grid = RowGrid(clip="search", scale_floor=None)
    together = quantize_rows(w, grid)
    for i in range(3):
        for j in range(2):
            alone = quantize_rows(w[i, j], grid)
            assert torch.equal(together.codes_RC[i, j], alone.codes_RC)
            assert torch.equal(together.scale_R[i, j], alone.scale_R)


@given(
    columns=st.integers(1, 300),
    p=st.sampled_from([0.05, 0.5, 0.999, 0.9999984, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_quantile_is_torchs(columns, p, seed):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(row_quantile(x, p), torch.quantile(x, p, dim=-1))


def test_error_is_at_most_half_a_step():
    w = torch.randn(16, 64)
    rows = quantize_rows(w, RowGrid(bits=6, scale_floor=None))
    error = (w - dequantize_rows(rows)).abs()
    # The float16 step may be too small for the largest weight by 2**-11 of it.
    assert (error <= rows.scale_R.float()[:, None] * (0.5 + 31 * 2.0**-11)).all()


def test_zero_rows_stay_zero():
    rows = quantize_rows(torch.zeros(2, 5), RowGrid(scale_floor=None))
    assert not dequantize_rows(rows).any()
    assert (rows.scale_R == 2.0**-14).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e7])
def test_a_row_without_a_float16_step_is_refused(bad):
    w = torch.ones(2, 4)
    w[1, 1] = bad
    with pytest.raises(ValueError, match="diverged"):
        quantize_rows(w, RowGrid())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bits", 4),
        ("bits", 9),
        ("clip_quantile", 0.0),
        ("clip_quantile", 1.5),
        ("search_quantiles", []),
        ("search_quantiles", [0.9, 2.0]),
        ("scale_floor", 0.0),
        ("scale_floor", 1e9),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"artifact.quant.<group>.grid.{setting}"):
        RowGrid(**{setting: value})


def test_range_of_codes():
    assert [RowGrid(bits=bits).max_code for bits in (5, 6, 7, 8)] == [15, 31, 63, 127]
    assert RowGrid(bits=6).min_code == -31
    assert RowGrid(bits=6, extra_negative_code=True).min_code == -32
    # Another step than the grid's own lets codes use all 8 bits, finer or coarser.
    assert [RowGrid(bits=6).scaled(factor).max_code for factor in (0.5, 2.0)] == [127, 127]


def test_a_finer_step_stays_within_eight_bits():
    w = torch.tensor([[127.0, -1.0]])
    assert storable(torch.tensor([0.25]), w.abs()).tolist() == [1.0]
    assert storable(torch.tensor([4.0]), w.abs()).tolist() == [4.0]


def test_the_search_takes_the_quantile_with_the_least_error():
    # Bulk and outliers: the middle quantile is the best, the last one tried the worst but one.
    w = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    w[:, :2] = 30.0
    quantiles = [1.0, 0.9, 0.5, 0.99]
    errors = [
        (
            w
            - dequantize_rows(
                quantize_rows(w, RowGrid(clip="quantile", clip_quantile=p, scale_floor=None))
            )
        )
        .square()
        .mean()
        .item()
        for p in quantiles
    ]
    grid = RowGrid(clip="search", search_quantiles=quantiles, scale_floor=None)
    found = (w - dequantize_rows(quantize_rows(w, grid))).square().mean().item()
    assert found == pytest.approx(min(errors))
    assert sorted(errors)[1] > 1.01 * min(errors)
