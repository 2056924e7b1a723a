"""Single operations of the model against the reference's, gradients included."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pgl.model.attention import exclusive_attention
from pgl.model.config import GPTConfig
from pgl.model.embeddings import SharedValueEmbedding, SmearGate, bigram_bucket
from pgl.model.gpt import softcap
from pgl.model.mlp import MLP, leaky_relu2, relu2
from pgl.model.rotary import apply_rotary, inverse_frequencies, ntk_base, rotary_table

Golden = Callable[[str], dict[str, np.ndarray]]

CPU = torch.device("cpu")
ROPE_FORMS = {
    # name: (rotated dims, train length); the stock baseline never rescales
    "base_full64": (64, 10**9),
    "236_full64_trainlen1024": (64, 1024),
    "324_full64_trainlen2048": (64, 2048),
    "388_partial16_trainlen1024": (16, 1024),
}


def tensors(arrays: dict[str, np.ndarray], *names: str) -> list[Tensor]:
    return [torch.tensor(arrays[name]) for name in names]


def leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, requires_grad=True)


def assert_close(
    actual: Tensor, expected: np.ndarray, atol: float = 5e-6, rtol: float = 1e-5
) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), atol=atol, rtol=rtol)


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("form", ROPE_FORMS)
def test_rope(golden: Golden, form: str, length: int) -> None:
    arrays = golden("rope")
    rotated_dims, train_len = ROPE_FORMS[form]
    key = f"{form}_{length}"
    base = ntk_base(10000.0, rotated_dims, train_len, length)
    assert base == pytest.approx(float(arrays[f"theta_base_{key}"]), rel=1e-12)
    assert_close(inverse_frequencies(base, rotated_dims, CPU), arrays[f"inv_freq_{key}"], 0, 1e-6)

    cos, sin = rotary_table(length, 10000.0, rotated_dims, train_len, CPU)
    rows = torch.tensor(arrays[f"positions_{length}"])
    assert_close(cos[rows], arrays[f"cos_{key}"], 1e-6, 0)
    assert_close(sin[rows], arrays[f"sin_{key}"], 1e-6, 0)
    if f"q_rot_{key}" in arrays:
        for name in ("q", "k"):
            x = torch.tensor(arrays[f"{name}_{length}"])
            assert_close(apply_rotary(x, cos[rows], sin[rows]), arrays[f"{name}_rot_{key}"], 1e-6)


@pytest.mark.parametrize("name", ["real", "random", "edge"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bigram_hash(golden: Golden, name: str, dtype: torch.dtype) -> None:
    arrays = golden("bigram_hash")
    ids = torch.tensor(arrays[f"tokens_{name}"]).to(dtype)
    sizes = {int(key.rsplit("_", 1)[1]) for key in arrays if key.startswith(f"buckets_{name}_")}
    assert sizes
    for num_buckets in sizes:
        expected = torch.tensor(arrays[f"buckets_{name}_{num_buckets}"]).long()
        assert torch.equal(bigram_bucket(ids, num_buckets), expected)


def test_smear_gate(golden: Golden) -> None:
    arrays = golden("smear_gate")
    x = leaf(arrays["x"])
    smear = SmearGate(x.size(-1))
    assert_close(smear(x), arrays["out_gate_zero"])
    smear.load_state_dict({"gate": torch.tensor(arrays["gate"])})
    out = smear(x)
    assert_close(out, arrays["out"])
    out.backward(torch.tensor(arrays["upstream_grad"]))
    assert_close(x.grad, arrays["grad_x"])
    assert_close(smear.gate.grad, arrays["grad_gate"])


def test_exclusive_attention(golden: Golden) -> None:
    arrays = golden("xsa")
    y, v = leaf(arrays["y"]), leaf(arrays["v"])
    out = exclusive_attention(y, v)
    assert_close(out, arrays["out"])
    out.backward(torch.tensor(arrays["upstream_grad"]))
    assert_close(y.grad, arrays["grad_y"])
    # A value of length ~1e-14 has a gradient of ~1e11 by construction: compare relatively.
    expected = torch.tensor(arrays["grad_v"])
    error = (v.grad - expected).norm(dim=-1)
    assert (error <= 1e-5 * expected.norm(dim=-1) + 5e-6).all()


def test_value_embedding(golden: Golden) -> None:
    arrays = golden("value_embedding")
    table, proj, scale, ids = tensors(arrays, "table", "proj", "scale", "ids")
    kv_dim, width = proj.shape
    config = GPTConfig(
        vocab_size=table.size(0),
        model_dim=2 * kv_dim,
        num_heads=2,
        num_kv_heads=1,
        value_embedding_dim=width,
    )
    ve = SharedValueEmbedding(config)
    ve.load_state_dict({"embed.weight": table, "proj.weight": proj, "scale": scale})
    layer_scales = leaf(arrays["layer_scales"])
    shared = ve(ids, torch.float32)
    assert_close(shared, arrays["out"])
    objective = torch.tensor(0.0)
    for layer in range(len(layer_scales)):
        out = layer_scales[layer] * shared
        assert_close(out, arrays[f"out_layer{layer}"])
        objective = objective + (torch.tensor(arrays[f"upstream_grad{layer}"]) * out).sum()
    objective.backward()
    gradients = {
        "table": ve.embed.weight.grad,
        "proj": ve.proj.weight.grad,
        "scale": ve.scale.grad,
        "layer_scales": layer_scales.grad,
    }
    for name, gradient in gradients.items():
        assert_close(gradient, arrays[f"grad_{name}"])


def test_squared_activations(golden: Golden) -> None:
    arrays = golden("leaky_relu2")
    slope = float(arrays["negative_slope"])
    for name, function in (("leaky_relu2", lambda x: leaky_relu2(x, slope)), ("relu2", relu2)):
        x = leaf(arrays["x"])
        out = function(x)
        assert_close(out, arrays[name])
        out.backward(torch.tensor(arrays["upstream_grad"]))
        assert_close(x.grad, arrays[f"grad_{name}"])


def test_leaky_mlp(golden: Golden) -> None:
    arrays = golden("leaky_relu2")
    up, down, x = tensors(arrays, "mlp_up", "mlp_down", "mlp_x")
    config = GPTConfig(
        model_dim=up.size(1), num_heads=2, num_kv_heads=1, mlp_hidden=up.size(0),
        mlp_activation="leaky_relu2", mlp_negative_slope=float(arrays["negative_slope"]),
    )  # fmt: skip
    mlp = MLP(config)
    mlp.load_state_dict({"fc.weight": up, "proj.weight": down})
    assert_close(mlp(x), arrays["mlp_out_leaky_relu2"])
    assert not torch.equal(MLP(replace(config, mlp_activation="relu2"))(x), mlp(x))


def test_softcap(golden: Golden) -> None:
    arrays = golden("softcap")
    z = leaf(arrays["z"])
    out = softcap(z, float(arrays["cap"]))
    assert_close(out, arrays["out"])
    out.backward(torch.tensor(arrays["upstream_grad"]))
    assert_close(z.grad, arrays["grad_z"])
