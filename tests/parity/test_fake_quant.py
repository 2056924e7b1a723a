"""Fake quantisation against the references': weights used, outputs and gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl.model.linear import CastedLinear

Golden = Callable[[str], dict[str, np.ndarray]]

FORMS = {"324_int5": (15, False), "324_int6": (31, False), "549_late": (31, True)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_ULP = 2.0**-8


def assert_near(actual: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """float32: 1e-6 of the size of the sums; bfloat16: 1 % of the tensor's largest value."""
    reference = torch.tensor(expected)
    limit = (1e-6 if dtype == torch.float32 else 1e-2) * max(float(reference.abs().max()), 1.0)
    torch.testing.assert_close(actual.detach().float(), reference, atol=limit, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_fake_quantised_linear(golden: Golden, form: str, dtype: str) -> None:
    arrays = golden("qat_fake_quant")
    cases = [name.removeprefix("W_") for name in arrays if name.startswith("W_")]
    assert cases
    for case in cases:
        linear = CastedLinear(*reversed(arrays[f"W_{case}"].shape))
        linear.weight.data.copy_(torch.tensor(arrays[f"W_{case}"]))
        x = torch.tensor(arrays[f"x_{case}"]).to(DTYPES[dtype]).requires_grad_()
        dy = torch.tensor(arrays[f"dy_{case}"]).to(DTYPES[dtype])
        linear.qat_clip, linear.qat_scale_floor = FORMS[form]
        tag = f"{form}_{dtype}_{case}"

        identity = torch.eye(x.size(1), dtype=DTYPES[dtype])
        used = linear(identity).T.detach().float()
        expected = torch.tensor(arrays[f"Wq_{tag}"])
        tolerance = 1e-6 if dtype == "fp32" else BF16_ULP
        torch.testing.assert_close(used, expected, atol=1e-9, rtol=tolerance)

        y = linear(x)
        y.backward(dy)
        assert_near(y, arrays[f"y_{tag}"], DTYPES[dtype])
        assert_near(x.grad, arrays[f"dx_{tag}"], DTYPES[dtype])
        assert_near(linear.weight.grad, arrays[f"dW_{tag}"], DTYPES[dtype])


def test_evaluation_uses_the_plain_weight(golden: Golden) -> None:
    arrays = golden("qat_fake_quant")
    weight, x = torch.tensor(arrays["W_std02"]), torch.tensor(arrays["x_std02"])
    linear = CastedLinear(weight.size(1), weight.size(0))
    linear.weight.data.copy_(weight)
    linear.qat_clip = 15
    assert torch.equal(linear.eval()(x), F.linear(x, weight))
    assert not torch.equal(linear.train()(x), F.linear(x, weight))
