"""Fused residual sum and norm against the two operations."""

import pytest
import torch

from pgl.model.norm import rms_norm


@pytest.mark.parametrize("dim", [32, 48])
@pytest.mark.parametrize("mixes", [True, False])
def test_equals_the_plain_operations_forward_and_backward(
    kernel_device: torch.device, mixes: bool, dim: int
) -> None:
    from pgl.kernels.residual_norm import residual_norm

    torch.manual_seed(0)
    shapes = ((35, dim), (35, dim), (dim,), (dim,))
    x_NE, y_NE, a_E, b_E = (
        torch.randn(shape, device=kernel_device, requires_grad=True) for shape in shapes
    )
    inputs = (x_NE, y_NE, a_E, b_E) if mixes else (x_NE, y_NE, b_E)

    fused = residual_norm(x_NE, y_NE, a_E if mixes else None, b_E, 0.7)
    total_NE = (a_E * x_NE if mixes else x_NE) + b_E * y_NE
    plain = total_NE, 0.7 * rms_norm(total_NE)

    upstream = [torch.randn_like(tensor) for tensor in fused]
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(fused, inputs, upstream)
    theirs = torch.autograd.grad(plain, inputs, upstream)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-5)


def test_the_operator_is_well_formed(kernel_device: torch.device) -> None:
    from pgl.kernels.residual_norm import residual_norm

    x_NE, y_NE = (torch.randn(9, 16, device=kernel_device, requires_grad=True) for _ in range(2))
    gain_E = torch.ones(16, device=kernel_device, requires_grad=True)
    torch.library.opcheck(residual_norm, (x_NE, y_NE, gain_E, gain_E, 0.5))
    torch.library.opcheck(residual_norm, (x_NE, y_NE, None, gain_E, 0.5))
