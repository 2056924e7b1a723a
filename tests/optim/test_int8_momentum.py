"""Blockwise int8 codes: error bound, padding, batches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.optim import dequantize_blocks, quantize_blocks


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 700),
    block_size=st.sampled_from([16, 256]),
    seed=st.integers(0, 99),
    exponent=st.integers(-6, 3),
)
def test_error_is_half_a_quantum(length: int, block_size: int, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, generator=generator) * 10.0**exponent
    codes, scale = quantize_blocks(x, block_size)
    assert codes.shape == (-(-length // block_size), block_size)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    back = dequantize_blocks(codes, scale, length, torch.float32)
    for i, block in enumerate(x.split(block_size)):
        absmax = block.abs().max()
        error = (block - back.split(block_size)[i]).abs().max()
        # Half a quantum from rounding, and up to 2^-9 of the value from the bf16 scale.
        assert error <= absmax * (0.5 / 127 + 2**-8)


def test_batched_form_equals_one_by_one() -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantize_blocks(x)
    for i in range(3):
        one_codes, one_scale = quantize_blocks(x[i])
        assert torch.equal(codes[i], one_codes)
        assert torch.equal(scale[i], one_scale)
    assert torch.equal(
        dequantize_blocks(codes, scale, 300)[1], dequantize_blocks(codes[1], scale[1], 300)
    )


def test_zeros_stay_zeros() -> None:
    codes, scale = quantize_blocks(torch.zeros(10))
    assert not codes.any()
    assert not dequantize_blocks(codes, scale, 10).any()


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    codes, _ = quantize_blocks(x, 6)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]
