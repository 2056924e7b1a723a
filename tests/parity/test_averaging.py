"""EMA and SWA against the reference runs' numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage

Golden = Callable[[str], dict[str, np.ndarray]]
DTYPES = {"fp32_param": torch.float32, "bf16_param": torch.bfloat16}


def trajectory(arrays: dict[str, np.ndarray], parameter: str) -> list[Tensor]:
    return list(torch.tensor(arrays[f"trajectory_{parameter}"]).to(DTYPES[parameter]))


@pytest.mark.parametrize("parameter", DTYPES)
def test_exponential_average(golden: Golden, parameter: str) -> None:
    arrays = golden("ema")
    ema = ExponentialAverage(float(arrays["ema_decay"]))
    expected = torch.tensor(arrays[f"ema_{parameter}"])
    for weights, e in zip(trajectory(arrays, parameter), expected, strict=True):
        ema.update({"w": weights})
        torch.testing.assert_close(ema.average()["w"], e, rtol=2e-6, atol=2e-6)
    final = ema.average()["w"].to(DTYPES[parameter]).float()
    # Cast to bf16, a last-bit difference may fall on either side of a rounding boundary.
    tolerance = 2**-8 if parameter == "bf16_param" else 2e-6
    theirs = torch.tensor(arrays[f"ema_final_cast_{parameter}"])
    torch.testing.assert_close(final, theirs, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("make", [UniformAverage, lambda: LastAverage(1000)])
def test_uniform_average_is_the_true_mean(
    golden: Golden, parameter: str, make: Callable[[], UniformAverage]
) -> None:
    arrays = golden("ema")
    swa = make()
    for weights in trajectory(arrays, parameter)[1:]:
        swa.update({"w": weights})
    assert swa.count == int(arrays["swa_count"])
    exact = torch.tensor(arrays[f"swa_mean_f64_{parameter}"])
    torch.testing.assert_close(swa.average()["w"].double(), exact, rtol=2e-6, atol=2e-6)


def test_sum_in_bf16_would_be_visibly_worse(golden: Golden) -> None:
    arrays = golden("ema")
    exact = torch.tensor(arrays["swa_mean_f64_bf16_param"])
    theirs = torch.tensor(arrays["swa_mean_own_dtype_bf16_param"])
    assert (theirs - exact).abs().max() > 1e-4
