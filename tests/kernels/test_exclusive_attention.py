"""Fused XSA against the plain one."""

import pytest
import torch

from pgl.model.attention import exclusive_attention as plain_exclusive_attention

ROWS, KEY_HEADS, DIM = 21, 3, 16


# Values that are no longer than 1e-12 are divided by that, not by their length.
@pytest.mark.parametrize(("group", "length"), [(1, 1.0), (2, 1.0), (3, 1.0), (2, 1e-13)])
def test_equals_the_plain_operations_forward_and_backward(
    kernel_device: torch.device, group: int, length: float
) -> None:
    from pgl.kernels.exclusive_attention import exclusive_attention

    torch.manual_seed(0)
    y_NHD = torch.randn(ROWS, group * KEY_HEADS, DIM, device=kernel_device).requires_grad_()
    wide_NC = torch.randn(ROWS, 5 * KEY_HEADS * DIM, device=kernel_device)
    wide_NC[0] = 0  # values of no direction
    wide_NC.mul_(length).requires_grad_()
    v_NKD = wide_NC[:, -KEY_HEADS * DIM :].unflatten(1, (KEY_HEADS, DIM))  # as kernels hand it over
    ours_NHD = exclusive_attention(y_NHD, v_NKD)
    plain_NHD = plain_exclusive_attention(y_NHD[None], v_NKD[None])[0]
    torch.testing.assert_close(ours_NHD, plain_NHD, rtol=1e-5, atol=1e-5)
    upstream_NHD = torch.randn_like(ours_NHD)
    upstream_NHD[0] = 0  # the gradient of a value of no direction is about 1e12
    ours = torch.autograd.grad(ours_NHD, (y_NHD, wide_NC), upstream_NHD)
    theirs = torch.autograd.grad(plain_NHD, (y_NHD, wide_NC), upstream_NHD)
    for gradient, expected in zip(ours, theirs, strict=True):
        scale = 1 + float(expected.abs().max())
        torch.testing.assert_close(gradient / scale, expected / scale, rtol=1e-5, atol=2e-5)


def test_the_operators_are_well_formed(kernel_device: torch.device) -> None:
    from pgl.kernels.exclusive_attention import exclusive_attention, exclusive_attention_backward

    y_NHD = torch.randn(ROWS, 2 * KEY_HEADS, DIM, device=kernel_device, requires_grad=True)
    v_NKD = torch.randn(ROWS, KEY_HEADS, DIM, device=kernel_device, requires_grad=True)
    torch.library.opcheck(exclusive_attention, (y_NHD, v_NKD))
    y_NHD, v_NKD = y_NHD.detach(), v_NKD.detach()
    torch.library.opcheck(exclusive_attention_backward, (y_NHD, y_NHD, v_NKD))
