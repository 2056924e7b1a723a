"""Fused queries and keys against norm, rotation and gain one after the other."""

import pytest
import torch

from pgl.model.norm import rms_norm
from pgl.model.rotary import apply_rotary, rotary_table

SEQUENCES, LENGTH, HEADS, KEY_HEADS, DIM = 2, 12, 4, 2, 16


@pytest.mark.parametrize("rotated_dims", [8, 16])
def test_equals_the_plain_operations_forward_and_backward(
    kernel_device: torch.device, rotated_dims: int
) -> None:
    from pgl.kernels.qk_norm_rope import qk_norm_rope

    torch.manual_seed(0)
    rows = SEQUENCES * LENGTH
    x_NC = torch.randn(rows, (HEADS + KEY_HEADS) * DIM, device=kernel_device, requires_grad=True)
    gain_H = (torch.rand(HEADS, device=kernel_device) + 0.5).requires_grad_()
    rotary = rotary_table(LENGTH, 10000.0, rotated_dims, 16, kernel_device)

    fused = qk_norm_rope(x_NC, *rotary, gain_H, KEY_HEADS)
    turned = apply_rotary(rms_norm(x_NC.view(SEQUENCES, LENGTH, -1, DIM)), *rotary)
    plain = turned[:, :, :HEADS] * gain_H[:, None], turned[:, :, HEADS:]
    plain = [tensor.flatten(0, 1) for tensor in plain]

    upstream = [torch.randn_like(tensor) for tensor in fused]
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(fused, (x_NC, gain_H), upstream)
    theirs = torch.autograd.grad(plain, (x_NC, gain_H), upstream)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-5)


def test_the_operator_is_well_formed(kernel_device: torch.device) -> None:
    from pgl.kernels.qk_norm_rope import qk_norm_rope

    x_NC = torch.randn(LENGTH, (HEADS + KEY_HEADS) * DIM, device=kernel_device, requires_grad=True)
    rotary = rotary_table(LENGTH, 10000.0, 8, 16, kernel_device)
    gain_H = torch.ones(HEADS, device=kernel_device, requires_grad=True)
    torch.library.opcheck(qk_norm_rope, (x_NC, *rotary, gain_H, KEY_HEADS))
