"""Squared activations by their definition."""

import pytest
import torch

from pgl.model.mlp import leaky_relu2, relu2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_activations_keep_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert relu2(x).dtype == leaky_relu2(x, 0.5).dtype == dtype
    assert relu2(x).tolist() == [0.0, 0.0, 0.0, 0.25, 9.0]
    assert leaky_relu2(x, 0.5).tolist() == [2.25, 0.0625, 0.0, 0.25, 9.0]
    assert leaky_relu2(x, 0.0).tolist() == relu2(x).tolist()
