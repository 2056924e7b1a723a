"""Fused residual sum and norm against the plain operations."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pgl.model.norm import rms_norm

SCALE = 0.7


def assert_same(fused: Sequence[Tensor], plain: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn_like(tensor) for tensor in fused]
    ours = torch.autograd.grad(fused, inputs, upstream)
    theirs = torch.autograd.grad(plain, inputs, upstream)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-5)


def streams(count: int, rows: int, dim: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, dim, device=device, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("dim", [32, 48])
def test_sum_equals_the_plain_operations(kernel_device: torch.device, dim: int) -> None:
    from pgl.kernels.residual_norm import residual_norm

    x_NE, y_NE = streams(2, 35, dim, kernel_device)
    total_NE = x_NE + y_NE
    plain = total_NE, SCALE * rms_norm(total_NE)
    assert_same(residual_norm(x_NE, y_NE, SCALE), plain, (x_NE, y_NE))


@pytest.mark.parametrize("dim", [32, 48])
@pytest.mark.parametrize("cached", [True, False])
def test_mix_equals_the_plain_operations(
    kernel_device: torch.device, cached: bool, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgl.kernels import residual_norm

    monkeypatch.setattr(residual_norm, "MIX_PROGRAMS", 4)  # each of which has several blocks
    x_NE, cached_NE, x0_NE = streams(3, 35, dim, kernel_device)
    mix_2E = torch.randn(2, dim, device=kernel_device, requires_grad=True)

    mixed_NE = mix_2E[0] * x_NE + mix_2E[1] * x0_NE
    read_NE = mix_2E[0] * cached_NE + mix_2E[1] * x0_NE if cached else mixed_NE
    plain = mixed_NE, SCALE * rms_norm(read_NE)
    fused = residual_norm.mix_norm(x_NE, cached_NE if cached else None, x0_NE, mix_2E, SCALE)
    inputs = (x_NE, *([cached_NE] if cached else []), x0_NE, mix_2E)
    assert_same(fused, plain, inputs)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(kernel_device: torch.device, used: int) -> None:
    from pgl.kernels.residual_norm import mix_norm

    x_NE, x0_NE = streams(2, 9, 16, kernel_device)
    mix_2E = torch.randn(2, 16, device=kernel_device, requires_grad=True)
    mixed_NE = mix_2E[0] * x_NE + mix_2E[1] * x0_NE
    plain = mixed_NE, SCALE * rms_norm(mixed_NE)
    fused = mix_norm(x_NE, None, x0_NE, mix_2E, SCALE)
    assert_same([fused[used]], [plain[used]], (x_NE, x0_NE, mix_2E))


def test_strides_and_no_rows(kernel_device: torch.device) -> None:
    from pgl.kernels.residual_norm import residual_norm

    x_EN, y_EN = (x_NE.detach().T.contiguous() for x_NE in streams(2, 9, 16, kernel_device))
    total_NE = x_EN.T + y_EN.T
    torch.testing.assert_close(residual_norm(x_EN.T, y_EN.T, SCALE)[0], total_NE)
    assert residual_norm(x_EN.T[:0], y_EN.T[:0], SCALE)[1].shape == (0, 16)


def test_the_operators_are_well_formed(kernel_device: torch.device) -> None:
    from pgl.kernels.residual_norm import mix_norm, residual_norm

    x_NE, cached_NE, y_NE = streams(3, 9, 16, kernel_device)
    mix_2E = torch.ones(2, 16, device=kernel_device, requires_grad=True)
    torch.library.opcheck(residual_norm, (x_NE, y_NE, 0.5))
    torch.library.opcheck(mix_norm, (x_NE, None, y_NE, mix_2E, 0.5))
    torch.library.opcheck(mix_norm, (x_NE, cached_NE, y_NE, mix_2E, 0.5))
