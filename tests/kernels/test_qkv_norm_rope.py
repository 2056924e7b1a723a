"""Fused queries, keys and values against norm, rotation, gain and addition one after the other."""

import pytest
import torch

from pgl.model.norm import rms_norm
from pgl.model.rotary import apply_rotary, rotary_table

# Rows times heads of a kind: 36 times 3 and 1, no multiple of a program's block.
SEQUENCES, LENGTH, HEADS, KEY_HEADS, DIM = 3, 12, 3, 1, 16
COLUMNS = (HEADS + 2 * KEY_HEADS) * DIM


@pytest.mark.parametrize(
    ("rotated_dims", "copies"), [(8, (1, 1)), (12, (2, 1)), (16, (1, 3)), (8, (3, 3))]
)
def test_equals_the_plain_operations_forward_and_backward(
    kernel_device: torch.device, rotated_dims: int, copies: tuple[int, int]
) -> None:
    from pgl.kernels.qkv_norm_rope import qkv_norm_rope

    torch.manual_seed(0)
    rows = SEQUENCES * LENGTH
    x_NC = torch.randn(rows, COLUMNS, device=kernel_device, requires_grad=True)
    gain_H = (torch.rand(HEADS, device=kernel_device) + 0.5).requires_grad_()
    rotary = rotary_table(LENGTH, 10000.0, rotated_dims, 16, kernel_device)

    fused = qkv_norm_rope(x_NC, *rotary, gain_H, KEY_HEADS, *copies)
    heads = x_NC.view(SEQUENCES, LENGTH, -1, DIM).split((HEADS, KEY_HEADS, KEY_HEADS), dim=2)
    q, k = (apply_rotary(rms_norm(x), *rotary) for x in heads[:2])
    k, v = (
        x.unsqueeze(3).expand(-1, -1, -1, count, -1)
        for x, count in zip((k, heads[2]), copies, strict=True)
    )
    plain = [tensor.flatten(0, 1) for tensor in (q * gain_H[:, None], k, v)]

    inputs = (x_NC, gain_H)
    upstream = [torch.randn_like(tensor) for tensor in fused]
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(fused, inputs, upstream)
    theirs = torch.autograd.grad(plain, inputs, upstream)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-5)


def test_values_are_not_copied(kernel_device: torch.device) -> None:
    from pgl.kernels.qkv_norm_rope import qkv_norm_rope

    x_NC = torch.randn(LENGTH, COLUMNS, device=kernel_device)
    rotary = rotary_table(LENGTH, 10000.0, 8, 16, kernel_device)
    gain_H = torch.ones(HEADS, device=kernel_device)
    _, k_NKGD, v_NKGD = qkv_norm_rope(x_NC, *rotary, gain_H, KEY_HEADS, 2, 2)
    assert k_NKGD.stride(2) == v_NKGD.stride(2) == 0
    assert v_NKGD.data_ptr() == x_NC[:, -KEY_HEADS * DIM :].data_ptr()
    assert torch.equal(v_NKGD[:, :, 0].flatten(1), x_NC[:, -KEY_HEADS * DIM :])


def test_the_operators_are_well_formed(kernel_device: torch.device) -> None:
    from pgl.kernels.qkv_norm_rope import qk_norm_rope, qkv_norm_rope_backward

    x_NC = torch.randn(LENGTH, COLUMNS, device=kernel_device)
    rotary = rotary_table(LENGTH, 10000.0, 8, 16, kernel_device)
    gain_H = torch.ones(HEADS, device=kernel_device)
    torch.library.opcheck(qk_norm_rope, (x_NC, *rotary, gain_H, KEY_HEADS))
    shapes = [(HEADS, DIM), (KEY_HEADS, 2, DIM), (KEY_HEADS, 1, DIM)]
    upstream = [x_NC.new_ones(LENGTH, *shape) for shape in shapes]
    torch.library.opcheck(qkv_norm_rope_backward, (*upstream, x_NC, *rotary, gain_H))
