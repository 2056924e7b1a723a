"""CastedLinear and fake quantisation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.model.linear import CastedLinear
from pgl.quant.fake_quant import fake_quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_cast_to_the_input(dtype: torch.dtype) -> None:
    linear, x = CastedLinear(6, 4), torch.randn(3, 6, dtype=dtype)
    y = linear(x)
    assert (y.dtype, linear.weight.dtype, linear.bias) == (dtype, torch.float32, None)
    assert torch.equal(y, F.linear(x, linear.weight.to(dtype)))
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    clip=st.sampled_from([1, 7, 15, 31]),
    scale_floor=st.booleans(),
    size=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
)
@settings(max_examples=40, deadline=None)
def test_fake_quantize_row_by_row(
    rows: int, columns: int, clip: int, scale_floor: bool, size: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * size
    rounded = fake_quantize(weight, clip, torch.float32, scale_floor)
    for i in range(rows):
        largest = max(abs(float(w)) for w in weight[i])
        scale = max(largest / clip, 1 / clip) if scale_floor else max(largest, 1e-12) / clip
        codes = rounded[i] / scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.min() >= -clip - 1.001
        assert codes.max() <= clip + 0.001
        assert (rounded[i] - weight[i]).abs().max() <= 0.5001 * scale


def test_gradient_passes_straight_through() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    upstream = torch.randn(3, 5)
    for scale_floor in (False, True):
        weight.grad = None
        fake_quantize(weight, 15, torch.float32, scale_floor).backward(upstream)
        assert torch.equal(weight.grad, upstream)
