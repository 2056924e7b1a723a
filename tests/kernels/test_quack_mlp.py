"""The MLP's products by quack: around a stand-in for them on CPUs, and on a GPU the real ones."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from pgl import kernels
from pgl.model import gpt as gpt_module
from pgl.model.mlp import MLP
from tests.kernels.plain_mlp import check_against_plain_operations
from tests.kernels.test_compiled_model import CONFIG, randomized

ON_GPU = torch.cuda.is_available()


class StandIn(ModuleType):
    """``launch`` of :mod:`pgl.kernels.quack_mlp` in plain torch, and how often it was called."""

    calls = 0

    def launch(
        self,
        x_NE: torch.Tensor,
        w: torch.Tensor,
        a_NF: torch.Tensor,
        out_NF: torch.Tensor,
        signs: torch.Tensor,
        slope: float,
        backward: bool,
    ) -> None:
        self.calls += 1
        total_NF = x_NE @ (w if backward else w.T)
        bit = torch.arange(32)
        blocks = (a_NF.size(0) // 64, 64, a_NF.size(1) // 64, 64)
        if backward:
            below = torch.zeros_like(total_NF, dtype=torch.bool)
            if slope:
                bits = (signs[..., None] >> bit) & 1
                below = bits.view(blocks[0], blocks[2], 64, 64).transpose(1, 2).reshape(a_NF.shape)
            out_NF.copy_(total_NF * a_NF.sqrt() * torch.where(below.bool(), -2 * abs(slope), 2.0))
            return
        assert a_NF is out_NF
        out_NF.copy_(F.leaky_relu(total_NF, slope).square())
        if slope:
            below = (total_NF < 0).view(blocks).transpose(1, 2).reshape(*signs.shape, 32)
            signs.copy_((below << bit).sum(-1).to(torch.int32))


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with the products: on a CPU the stand-in."""
    if ON_GPU:
        for package in ("quack", "cutlass"):
            pytest.importorskip(package, reason="quack's products: pip install -e '.[quack]'")
        if not kernels.squared_mlp_available(torch.device("cuda")):
            pytest.skip("quack's products need a Hopper GPU")
        from pgl.kernels import quack_mlp

        return quack_mlp
    stand_in = StandIn("pgl.kernels.quack_mlp")
    monkeypatch.setitem(sys.modules, "pgl.kernels.quack_mlp", stand_in)
    return stand_in


# Tiles of 192 columns and of 128; an even and an odd number of tiles of 128 rows.
@pytest.mark.parametrize(("rows", "hidden"), [(256, 384), (384, 512)])
@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0, -0.5])
def test_equals_the_plain_operations_forward_and_backward(
    quack: ModuleType, kernel_device: torch.device, slope: float, rows: int, hidden: int
) -> None:
    signs = check_against_plain_operations(kernel_device, slope, (rows, 64, hidden), quack=True)
    assert signs.numel() == (rows * hidden // 32 if slope else 0)
    if isinstance(quack, StandIn):
        assert quack.calls == 2


@pytest.mark.skipif(ON_GPU, reason="the stand-in runs on CPUs")
def test_every_mlp_of_a_model_uses_them_both_ways(
    quack: StandIn, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgl.kernels import squared_mlp

    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "squared_mlp_available", lambda device: True)
    monkeypatch.setattr(gpt_module, "prepare_quack", lambda device: None)
    monkeypatch.setattr(MLP, "_fits", lambda mlp, x: True)  # float32, for exact gradients
    monkeypatch.setattr(squared_mlp, "_activation_kernel", None)
    config = replace(CONFIG, model_dim=64, mlp_hidden=128)
    plain, gpt = (
        randomized(kernel_device, replace(config, kernels=choice)) for choice in ("off", "quack")
    )
    gpt.prepare(kernel_device)
    ids_BT = torch.randint(1024, (2, 32))
    losses_BT = torch.compile(gpt.token_losses, backend="aot_eager", fullgraph=True)(ids_BT, ids_BT)
    expected_BT = plain.token_losses(ids_BT, ids_BT)
    torch.testing.assert_close(losses_BT, expected_BT, rtol=1e-4, atol=1e-4)
    losses_BT.mean().backward()
    expected_BT.mean().backward()
    assert quack.calls == 2 * config.num_layers
    for ours, theirs in zip(gpt.blocks, plain.blocks, strict=True):
        torch.testing.assert_close(
            ours.mlp.fc.weight.grad, theirs.mlp.fc.weight.grad, rtol=1e-3, atol=1e-6
        )


def test_the_key_of_compiled_kernels_changes_with_their_source(quack: ModuleType) -> None:
    if isinstance(quack, StandIn):
        pytest.skip("the stand-in compiles nothing")
    keys = [op.cache_key() for op in (quack._StoreSigns("s"), quack._LoadSigns("s", 2.0, -1.0))]
    assert all(quack.SOURCE in str(key) for key in keys)
