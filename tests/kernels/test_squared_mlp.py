"""The MLP with its activation inside the products, against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from pgl.kernels import squared_mlp_fits


@pytest.fixture
def small_tiles(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    from pgl.kernels import squared_mlp

    if kernel_device.type == "cpu":  # the interpreter is slow
        tiles = squared_mlp.Tiles(n=16, f=16, e=16, warps=4, stages=2, programs=2)
        monkeypatch.setattr(squared_mlp, "FORWARD_TILES", tiles)
        monkeypatch.setattr(squared_mlp, "BACKWARD_TILES", tiles)
    return kernel_device


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_equals_the_plain_operations_forward_and_backward(
    small_tiles: torch.device, slope: float
) -> None:
    from pgl.kernels.squared_mlp import squared_mlp

    on_gpu = small_tiles.type == "cuda"
    rows, dim, hidden = (256, 64, 512) if on_gpu else (32, 32, 48)
    dtype, tolerance = (torch.bfloat16, 2e-2) if on_gpu else (torch.float32, 1e-5)
    torch.manual_seed(0)
    x_NE, fc_FE, proj_EF = (
        (torch.randn(shape, device=small_tiles) / shape[1] ** 0.5).to(dtype).requires_grad_()
        for shape in ((rows, dim), (hidden, dim), (dim, hidden))
    )
    fused, _, _ = squared_mlp(x_NE, fc_FE, proj_EF, slope)
    inputs = [tensor.detach().float().requires_grad_() for tensor in (x_NE, fc_FE, proj_EF)]
    leaky = F.leaky_relu(inputs[0] @ inputs[1].T, slope)
    plain = (leaky * leaky) @ inputs[2].T

    upstream = torch.randn_like(plain)
    assert _relative(fused, plain) < tolerance
    ours = torch.autograd.grad(fused, (x_NE, fc_FE, proj_EF), upstream.to(dtype))
    theirs = torch.autograd.grad(plain, inputs, upstream.to(dtype).float())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert _relative(gradient, expected) < tolerance


def test_only_shapes_that_come_out_even_are_taken() -> None:
    assert squared_mlp_fits(256, 512, 1536, torch.bfloat16)
    assert not squared_mlp_fits(200, 512, 1536, torch.bfloat16)
    assert not squared_mlp_fits(256, 500, 1536, torch.bfloat16)
    assert not squared_mlp_fits(256, 512, 1500, torch.bfloat16)
    assert not squared_mlp_fits(256, 512, 1536, torch.float32)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs).detach().norm() / theirs.detach().norm())
