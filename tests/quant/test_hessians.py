import pytest
import torch
from torch import nn

from pgl.model import GPT, GPTConfig
from pgl.quant import collect_hessians


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6, bias=False)
        self.b = nn.Linear(4, 2, bias=False)
        self.c = nn.Linear(8, 3, bias=False)
        self.unused = nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.c(torch.cat((self.a(x), self.b(x)), -1))


def test_mean_of_outer_products():
    model = Tiny()
    batches = [torch.randn(2, 3, 4) for _ in range(3)]
    hessians = collect_hessians(model, batches, "cpu")
    assert set(hessians) == {"a.weight", "b.weight", "c.weight"}
    x = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(hessians["a.weight"], x.T @ x / 3)
    y = torch.cat((model.a(x), model.b(x)), -1)
    torch.testing.assert_close(hessians["c.weight"], (y.T @ y / 3).detach())
    assert hessians["a.weight"] is hessians["b.weight"]


def test_mode_and_hooks_are_restored():
    model = Tiny().train()
    collect_hessians(model, [torch.randn(1, 4)], "cpu")
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_true_float32_under_autocast():
    model = Tiny()
    x = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        hessian = collect_hessians(model, [x], "cpu")["a.weight"]
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(hessian, x.T @ x)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        collect_hessians(Tiny(), [], "cpu")


def test_gpt_layers_have_their_hessians_and_share_them():
    config = GPTConfig(vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1)
    gpt = GPT(config)
    ids = torch.randint(32, (2, 8))
    hessians = collect_hessians(gpt, [ids], "cpu", forward=gpt.features)
    names = {name for name, p in gpt.named_parameters() if ".attn." in name or ".mlp." in name}
    matrices = {name for name in names if gpt.get_parameter(name).ndim == 2}
    assert set(hessians) == matrices
    for name in matrices:
        assert hessians[name].shape == (gpt.get_parameter(name).shape[1],) * 2
    first = {name: hessians[f"blocks.0.attn.{name}.weight"] for name in ("c_q", "c_k", "c_v")}
    assert first["c_q"] is first["c_k"] is first["c_v"]
    assert hessians["blocks.1.attn.c_q.weight"] is not first["c_q"]
