"""The MLP with its activation inside the products, against the plain one."""

import pytest
import torch

from pgl.kernels import squared_mlp_fits
from tests.kernels.plain_mlp import check_against_plain_operations


@pytest.fixture
def small_tiles(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    from pgl.kernels import squared_mlp

    if kernel_device.type == "cpu":  # the interpreter is slow
        tiles = squared_mlp.Tiles(n=16, f=128, e=16, parts=2, warps=4, stages=2, programs=2)
        monkeypatch.setattr(squared_mlp, "FORWARD_TILES", tiles)
        monkeypatch.setattr(squared_mlp, "BACKWARD_TILES", tiles)
    return kernel_device


@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0, -0.5])
def test_equals_the_plain_operations_forward_and_backward(
    small_tiles: torch.device, slope: float
) -> None:
    sizes = (256, 64, 512) if small_tiles.type == "cuda" else (32, 32, 256)
    check_against_plain_operations(small_tiles, slope, sizes, quack=False)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_of_the_hidden_values_only_signs_are_kept(small_tiles: torch.device, slope: float) -> None:
    from pgl.kernels.squared_mlp import squared_mlp

    torch.manual_seed(0)
    dtype = torch.bfloat16 if small_tiles.type == "cuda" else torch.float32
    x_NE, fc_FE = (torch.randn(n, 64, device=small_tiles).to(dtype) for n in (128, 256))
    _, a_NF, signs = squared_mlp(x_NE, fc_FE, fc_FE.T.contiguous(), slope, False)
    assert a_NF.shape == (128, 256)
    if slope == 0:
        assert signs.numel() == 0
        return
    # Bit b of number c of group g is the sign of column 64 g + 8 b + c.
    bits = signs[:, :, None, :] >> torch.arange(8, device=small_tiles)[:, None] & 1
    below_NF = bits.permute(1, 0, 2, 3).reshape(128, 256).bool()
    assert torch.equal(below_NF, x_NE.float() @ fc_FE.float().T < 0)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_the_operators_are_well_formed(small_tiles: torch.device, slope: float) -> None:
    from pgl.kernels.squared_mlp import activated_product_backward, squared_mlp

    dtype = torch.bfloat16 if small_tiles.type == "cuda" else torch.float32
    x_NE, fc_FE = (torch.randn(n, 64, device=small_tiles).to(dtype) for n in (128, 256))
    proj_EF = fc_FE.T.contiguous()
    torch.library.opcheck(squared_mlp, (x_NE, fc_FE, proj_EF, slope, False))
    _, a_NF, signs = squared_mlp(x_NE, fc_FE, proj_EF, slope, False)
    torch.library.opcheck(activated_product_backward, (x_NE, proj_EF, a_NF, signs, slope, False))


def test_only_shapes_that_come_out_even_are_taken() -> None:
    assert squared_mlp_fits(256, 512, 1536, torch.bfloat16)
    assert not squared_mlp_fits(200, 512, 1536, torch.bfloat16)
    assert not squared_mlp_fits(256, 500, 1536, torch.bfloat16)
    assert squared_mlp_fits(256, 512, 1920, torch.bfloat16)
    assert not squared_mlp_fits(256, 512, 1600, torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert not squared_mlp_fits(256, 512, 1536, dtype)
