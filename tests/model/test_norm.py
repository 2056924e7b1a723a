"""RMSNorm without a weight."""

import pytest
import torch

from pgl.model.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 0.005, 100.0])
def test_root_mean_square_is_one_even_for_small_embeddings(size: float, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 256) * size).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = rms_norm(x)
    assert y.dtype == dtype
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1.1920929e-07).rsqrt()
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=tolerance)
