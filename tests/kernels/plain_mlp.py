"""The fused MLP's slow twin: what both of its products are held to."""

import torch
import torch.nn.functional as F


def check_against_plain_operations(
    device: torch.device, slope: float, sizes: tuple[int, int, int], quack: bool
) -> torch.Tensor:
    """Compare outputs and gradients for sizes (rows, dim, hidden); return the packed signs."""
    from pgl.kernels.squared_mlp import squared_mlp

    rows, dim, hidden = sizes
    on_gpu = device.type == "cuda"
    dtype, tolerance = (torch.bfloat16, 2e-2) if on_gpu else (torch.float32, 1e-5)
    torch.manual_seed(0)
    x_NE, fc_FE, proj_EF = (
        (torch.randn(shape, device=device) / shape[1] ** 0.5).to(dtype).requires_grad_()
        for shape in ((rows, dim), (hidden, dim), (dim, hidden))
    )
    fused, _, signs = squared_mlp(x_NE, fc_FE, proj_EF, slope, quack)
    inputs = [tensor.detach().float().requires_grad_() for tensor in (x_NE, fc_FE, proj_EF)]
    leaky = F.leaky_relu(inputs[0] @ inputs[1].T, slope)
    plain = (leaky * leaky) @ inputs[2].T

    upstream = torch.randn_like(plain)
    assert _relative(fused, plain) < tolerance
    ours = torch.autograd.grad(fused, (x_NE, fc_FE, proj_EF), upstream.to(dtype))
    theirs = torch.autograd.grad(plain, inputs, upstream.to(dtype).float())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert _relative(gradient, expected) < tolerance
    return signs


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs).detach().norm() / theirs.detach().norm())
