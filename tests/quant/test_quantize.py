from dataclasses import replace

import pytest
import torch

from pgl.quant import (
    Calibration,
    GPTQConfig,
    QuantConfig,
    RowGrid,
    TensorRule,
    dequantize_state,
    gptq,
    quantization_losses,
    quantize_rows,
    quantize_state,
    storage_kind,
    tensor_group,
)
from pgl.quant.quantize import bits_of

SMALL = QuantConfig(passthrough_max_numel=64)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "tok_emb.weight": normal(20, 16).bfloat16(),
        "bigram.embed.weight": normal(24, 8),
        "bigram.proj.weight": normal(8, 8),
        "bigram.scale": torch.tensor(0.05),
        "ve_shared.embed.weight": normal(20, 8),
        "skip_weights": normal(5, 16),
        "blocks.0.attn.c_q.weight": normal(16, 16),
        "blocks.1.attn.c_q.weight": normal(16, 16),
        "blocks.0.attn.q_gain": normal(4),
        "blocks.0.mlp.fc.weight": normal(32, 16),
        "blocks.0.resid_mix": normal(2, 16),
    }


@pytest.fixture
def hessians(state):
    found = {}
    for name, tensor in state.items():
        if ".attn.c_q" in name or ".mlp." in name:
            x = torch.randn(99, tensor.shape[1])
            found[name] = x.T @ x
    return found


@pytest.mark.parametrize(
    ("name", "ndim", "group"),
    [
        ("blocks.3.attn.proj.weight", 2, "attention"),
        ("blocks.3.attn.q_gain", 1, "control"),
        ("blocks.3.attn.gate.weight", 2, "control"),
        ("blocks.3.mlp.proj.weight", 2, "mlp"),
        ("blocks.3.resid_mix", 2, "control"),
        ("tok_emb.weight", 2, "token_embedding"),
        ("lm_head.weight", 2, "token_embedding"),
        ("bigram.proj.weight", 2, "bigram"),
        ("bigram.scale", 0, "control"),
        ("ve_shared.proj.weight", 2, "value_embedding"),
        ("skip_weights", 2, "control"),
        ("ve_layer_scales.0", 1, "control"),
    ],
)
def test_groups(name, ndim, group):
    assert tensor_group(name, ndim) == group


def test_plan_is_followed_and_nothing_is_lost(state):
    stored = quantize_state(state, SMALL)
    assert list(stored) == list(state)
    for name, tensor in stored.items():
        assert tensor.kind == storage_kind(name, state[name].shape, SMALL)
        assert tensor.weights().shape == state[name].shape
    kinds = {name: tensor.kind for name, tensor in stored.items()}
    assert kinds["tok_emb.weight"] == "int8"
    assert kinds["blocks.0.mlp.fc.weight"] == "int6"
    assert kinds["bigram.proj.weight"] == "float16"
    assert kinds["skip_weights"] == "float16"


def test_round_trip_dtypes_and_values(state):
    stored = quantize_state(state, SMALL)
    restored = dequantize_state(stored)
    assert {n: t.dtype for n, t in restored.items()} == {n: t.dtype for n, t in state.items()}
    assert all(t.dtype == torch.float32 for t in dequantize_state(stored, torch.float32).values())
    assert torch.equal(restored["skip_weights"], state["skip_weights"].half().float())
    name = "blocks.0.mlp.fc.weight"
    rows = quantize_rows(state[name], SMALL.mlp.grid)
    assert torch.equal(restored[name], rows.codes_RC.float() * rows.scale_R.float()[:, None])


def test_gptq_groups_use_their_hessians(state, hessians):
    config = replace(SMALL, attention=TensorRule(method="gptq"), mlp=TensorRule(method="gptq"))
    assert config.needs_hessians()
    assert not SMALL.needs_hessians()
    stored = quantize_state(state, config, Calibration(hessians))
    for name in hessians:
        alone = gptq(state[name], hessians[name], RowGrid())
        assert torch.equal(stored[name].data, alone.codes_RC)
    rounded = quantize_state(state, SMALL)
    better = quantization_losses(state, stored, hessians)
    worse = quantization_losses(state, rounded, hessians)
    for name in hessians:
        assert better[name].output_relative < worse[name].output_relative
        assert better[name].relative >= worse[name].relative


def test_losses_are_relative(state):
    stored = quantize_state(state, SMALL)
    losses = quantization_losses(state, stored)
    name = "blocks.0.attn.c_q.weight"
    error = state[name] - stored[name].weights()
    assert losses[name].relative == pytest.approx((error.norm() / state[name].norm()).item())
    assert losses[name].output_relative is None
    zeros = {name: torch.zeros(16, 16)}
    assert quantization_losses(zeros, quantize_state(zeros, SMALL))[name].relative == 0


def test_each_setting_acts(state):
    base = quantize_state(state, SMALL)
    int5 = TensorRule(grid=RowGrid(bits=5))
    for group, name in [
        ("attention", "blocks.1.attn.c_q.weight"),
        ("mlp", "blocks.0.mlp.fc.weight"),
        ("token_embedding", "tok_emb.weight"),
        ("bigram", "bigram.embed.weight"),
        ("value_embedding", "ve_shared.embed.weight"),
    ]:
        stored = quantize_state(state, replace(SMALL, **{group: int5}))
        changed = {n for n in state if stored[n].kind != base[n].kind}
        assert changed == {n for n in state if base[n].group == group and base[n].kind[:3] == "int"}
        assert name in changed
    plain = replace(SMALL, mlp=TensorRule(store="bfloat16"))
    assert quantize_state(state, plain)["blocks.0.mlp.fc.weight"].data.dtype == torch.bfloat16
    small = quantize_state(state, replace(SMALL, small_dtype="float32"))
    assert small["bigram.proj.weight"].kind == "float32"
    control = quantize_state(state, replace(SMALL, control_dtype="float32"))
    assert control["bigram.scale"].kind == control["skip_weights"].kind == "float32"
    assert control["bigram.proj.weight"].kind == "float16"
    larger = quantize_state(state, replace(SMALL, passthrough_max_numel=10**6))
    assert {t.kind for t in larger.values()} == {"float16"}


def test_pruning_acts_on_large_matrices_only(state):
    config = replace(SMALL, prune_fraction=0.5, prune_min_numel=100)
    config.mlp = TensorRule(store="float32")
    stored = quantize_state(state, config)
    assert (stored["blocks.0.mlp.fc.weight"].data == 0).float().mean() == 0.5
    assert (stored["bigram.proj.weight"].data != 0).all()
    assert (stored["blocks.0.resid_mix"].data != 0).all()


def test_users_mistakes_are_named(state, hessians):
    config = replace(SMALL, mlp=TensorRule(method="gptq"))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc.weight .* no calibration Hessian"):
        quantize_state(state, config, Calibration({}))
    with pytest.raises(ValueError, match=r"step is torch.int64"):
        quantize_state({"step": torch.tensor(1)}, SMALL)
    with pytest.raises(ValueError, match=r"blocks.0.attn.q_gain holds NaN"):
        quantize_state({"blocks.0.attn.q_gain": torch.tensor([torch.nan])}, SMALL)
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_state({"blocks.0.attn.q_gain": torch.tensor([1e6])}, SMALL)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prune_fraction": 1.0}, "prune_fraction"),
        ({"passthrough_max_numel": -1}, "passthrough_max_numel"),
        ({"bigram": TensorRule(method="gptq")}, "bigram.method"),
        ({"token_embedding": TensorRule(method="gptq")}, "token_embedding.method"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        QuantConfig(**settings)


def test_config_survives_yaml_and_the_command_line():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--quant", type=QuantConfig, default=QuantConfig())
    parsed = parser.parse_args(
        ["--quant.mlp.grid.bits=5", "--quant.mlp.method=gptq", "--quant.attention.grid.clip=max"]
    )
    config = parser.instantiate_classes(parsed).quant
    assert config.mlp.grid.bits == 5
    assert config.mlp.method == "gptq"
    assert config.attention.grid.clip == "max"
    again = parser.instantiate_classes(parser.parse_string(parser.dump(parsed))).quant
    assert again == config


def test_the_factor_of_the_steps_is_no_setting(state):
    with pytest.raises(TypeError, match="step_factor"):
        RowGrid(step_factor=0.5)
    grid = RowGrid()
    assert grid.scaled(0.5).step_factor == 0.5
    assert grid.step_factor == 1
    # A grid that was scaled all the same gets the kind that holds its codes.
    config = replace(SMALL, mlp=TensorRule(grid=grid.scaled(0.5)))
    stored = quantize_state(state, config)["blocks.0.mlp.fc.weight"]
    assert stored.kind == f"int{bits_of(stored.data)}" == "int7"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TensorRule(store="float16", method="gptq"), r'store is "float16"'),
        (lambda: QuantConfig(gptq=GPTQConfig(steps="balanced")), "no group is quantised by GPTQ"),
        (lambda: GPTQConfig(steps="balanced", select_by="hessian"), "search no quantile"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
