"""Row grids, pruning, GPTQ and storage routing against the records' own numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgl.quant import (
    GPTQConfig,
    QuantConfig,
    RowGrid,
    TensorRule,
    dequantize_rows,
    gptq,
    prune_by_magnitude,
    quantize_rows,
    storage_kind,
)
from pgl.quant.gptq import column_order, damp, inverse_factor
from pgl.quant.prune import prune_threshold

QUANTILE = RowGrid(clip="quantile", clip_weights=True, round_scale_first=False)
GRIDS = {
    "236_int6": QUANTILE,
    "236_int8": replace(QUANTILE, bits=8, scale_floor=1 / 127),
    "324_int5": RowGrid(bits=5, scale_floor=None, extra_negative_code=True),
    "324_int6": RowGrid(bits=6, scale_floor=None, extra_negative_code=True),
    "388_int6": RowGrid(bits=6, extra_negative_code=True),
    "549_int6": RowGrid(bits=6, clip="search"),
}
ROW_CASES = ["std002", "std02", "outliers_zero_rows", "extreme_rows"]
GPTQ_CASES = ["small_std", "mid_std", "outliers", "dead_column"]


@pytest.mark.parametrize("case", ROW_CASES)
@pytest.mark.parametrize("tag", GRIDS)
def test_row_codes_and_scales_are_exact(golden, tag, case):
    z = golden("row_quant")
    rows = quantize_rows(torch.tensor(z[f"W_{case}"]), GRIDS[tag])
    np.testing.assert_array_equal(rows.codes_RC, z[f"codes_{tag}_{case}"])
    np.testing.assert_array_equal(rows.scale_R, z[f"scale_{tag}_{case}"])
    assert rows.codes_RC.dtype == torch.int8
    assert rows.scale_R.dtype == torch.float16
    if f"dequant_{tag}_{case}" in z:
        np.testing.assert_array_equal(dequantize_rows(rows), z[f"dequant_{tag}_{case}"])


@pytest.mark.parametrize("case", ROW_CASES)
def test_search_takes_the_quantile_of_the_record(golden, case):
    z = golden("row_quant")
    w = torch.tensor(z[f"W_{case}"])
    for p, mse in zip(z["percentiles_549"], z[f"mse_per_percentile_549_{case}"], strict=True):
        only = quantize_rows(w, RowGrid(clip="search", search_quantiles=[float(p)]))
        error = (w - dequantize_rows(only)).double().square().mean().item()
        assert error == pytest.approx(mse, rel=1e-4, abs=1e-12)
        if p == z[f"chosen_percentile_549_{case}"]:
            chosen = quantize_rows(w, RowGrid(clip="search"))
            assert torch.equal(chosen.codes_RC, only.codes_RC)


@pytest.mark.parametrize("tag", ["236_int6", "324_int6", "388_int6", "549_int6"])
def test_vectors_are_one_row_without_a_floor(golden, tag):
    z = golden("row_quant")
    clip = "quantile" if tag == "236_int6" else "max"
    grid = replace(GRIDS[tag], scale_floor=None, clip=clip)
    rows = quantize_rows(torch.tensor(z["vec"])[None], grid)
    np.testing.assert_array_equal(rows.codes_RC[0], z[f"vec_codes_{tag}"])
    np.testing.assert_array_equal(rows.scale_R[0], z[f"vec_scale_{tag}"].astype(np.float16))


@pytest.mark.parametrize("case", ["std02", "std002"])
def test_pruning_of_324(golden, case):
    z = golden("row_quant")
    w = torch.tensor(z[f"W_{case}"])
    assert prune_threshold(w, 0.05).numpy() == z[f"prune05_threshold_324_{case}"]
    pruned = prune_by_magnitude(w, 0.05)
    np.testing.assert_array_equal(pruned, z[f"prune05_W_324_{case}"])
    for bits in (5, 6):
        rows = quantize_rows(pruned, GRIDS[f"324_int{bits}"])
        np.testing.assert_array_equal(rows.codes_RC, z[f"prune05_codes_324_int{bits}_{case}"])
        np.testing.assert_array_equal(rows.scale_R, z[f"prune05_scale_324_int{bits}_{case}"])


def _calibration(z, case):
    x = torch.tensor(z[f"X_{case}"]).float()
    return torch.tensor(z[f"W_{case}"]), torch.einsum("bnc,bnd->cd", x, x) / len(x)


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq(golden, case):
    z = golden("gptq")
    w, hessian = _calibration(z, case)
    rows = gptq(w, hessian, RowGrid(clip="search"))
    assert (rows.codes_RC.numpy() == z[f"codes_{case}"]).mean() >= 0.995
    np.testing.assert_array_equal(rows.scale_R, z[f"scale_{case}"])
    error = w - dequantize_rows(rows)
    proxy = (error @ hessian * error).sum().item() / len(w)
    assert proxy == pytest.approx(float(z[f"proxy_loss_gptq_{case}"]), rel=0.01)
    assert proxy < float(z[f"proxy_loss_percentile_{case}"])
    if f"dequant_{case}" in z:
        np.testing.assert_array_equal(dequantize_rows(rows), z[f"dequant_{case}"])


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_intermediate_steps(golden, case):
    z = golden("gptq")
    _, hessian = _calibration(z, case)
    twice = damp(damp(hessian, 0.01), 0.01)
    once = damp(hessian, GPTQConfig().damping)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)
    if f"hessian_{case}" in z:
        expected = torch.tensor(z[f"hessian_{case}"])
        torch.testing.assert_close(damp(hessian, 0.01), expected, rtol=1e-5, atol=1e-5)
    order = column_order(once[None], act_order=True)[0]
    np.testing.assert_array_equal(order, z[f"permutation_{case}"])
    factor = inverse_factor(once[order][:, order])
    np.testing.assert_allclose(
        factor.diagonal(), z[f"cholesky_upper_diag_{case}"], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_losses_of_each_quantile(golden, case):
    z = golden("gptq")
    w, hessian = _calibration(z, case)
    for i, p in enumerate([0.999, 0.9995, 0.9999, 0.99999, 1.0]):
        rows = gptq(w, hessian, RowGrid(clip="search", search_quantiles=[p]))
        error = w - dequantize_rows(rows)
        mse = error.square().mean().item()
        proxy = (error @ hessian * error).sum().item() / len(w)
        assert mse == pytest.approx(z[f"mse_per_percentile_{case}"][i], rel=0.01)
        assert proxy == pytest.approx(z[f"proxy_loss_per_percentile_{case}"][i], rel=0.01)


def _rule(tag):
    return TensorRule(grid=GRIDS[tag])


INT8 = _rule("236_int8")
PLANS = {
    "236": QuantConfig(
        attention=_rule("236_int6"),
        mlp=_rule("236_int6"),
        bigram=_rule("236_int6"),
        control_dtype="float32",
    ),
    "324": QuantConfig(
        attention=_rule("324_int6"),
        mlp=_rule("324_int5"),
        bigram=_rule("324_int6"),
        token_embedding=TensorRule(store="float16"),
        passthrough_max_numel=8192,
        prune_fraction=0.05,
    ),
    "388": QuantConfig(attention=_rule("388_int6"), mlp=_rule("388_int6")),
    "703": QuantConfig(
        attention=TensorRule(method="gptq", grid=GRIDS["549_int6"]),
        mlp=TensorRule(method="gptq", grid=GRIDS["549_int6"]),
    ),
}
KINDS = {"fp16": "float16", "fp32": "float32"}


@pytest.mark.parametrize("recipe", PLANS)
def test_storage_routing(golden, recipe):
    z = golden(f"init_stats_{recipe}")
    shapes = {
        name: tuple(shape[:ndim])
        for name, shape, ndim in zip(z["name"], z["shape"].tolist(), z["ndim"], strict=True)
    }
    if recipe == "703":
        shapes |= _unbanked(shapes)
    assert len(z["storage_name"]) > 100
    for name, kind, numel in zip(
        z["storage_name"], z["storage_kind"], z["storage_numel"], strict=True
    ):
        shape = torch.Size(shapes[str(name)])
        assert shape.numel() == numel
        assert storage_kind(str(name), shape, PLANS[recipe]) == KINDS.get(kind, kind), name


def _unbanked(shapes):
    layers, dim, kv = 11, 512, 256
    named = {}
    for i in range(layers):
        named[f"blocks.{i}.attn.c_q.weight"] = named[f"blocks.{i}.attn.proj.weight"] = (dim, dim)
        named[f"blocks.{i}.attn.c_k.weight"] = named[f"blocks.{i}.attn.c_v.weight"] = (kv, dim)
        named[f"blocks.{i}.mlp.fc.weight"] = tuple(shapes["mlp_up_bank"][1:])
        named[f"blocks.{i}.mlp.proj.weight"] = tuple(shapes["mlp_down_bank"][1:])
    return named
