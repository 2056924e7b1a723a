"""Weight averages against numpy-like twins, their checkpoints and refusals."""

import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage, WeightAverage

MAKERS: dict[str, Callable[[], WeightAverage]] = {
    "exponential": lambda: ExponentialAverage(0.9),
    "uniform": UniformAverage,
    "last": lambda: LastAverage(3),
    "uniform_cpu": lambda: UniformAverage(device="cpu"),
    "last_cpu": lambda: LastAverage(3, device="cpu"),
}


def weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "matrix": torch.randn(4, 3, generator=generator),
        "table": torch.randn(5, 2, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
    }


def exact_mean(steps: range, name: str) -> Tensor:
    return torch.stack([weights(step)[name].double() for step in steps]).mean(0)


@settings(max_examples=20, deadline=None)
@given(updates=st.integers(1, 9), length=st.integers(1, 5))
def test_means_equal_the_exact_mean(updates: int, length: int) -> None:
    uniform, last = UniformAverage(), LastAverage(length)
    for step in range(updates):
        uniform.update(weights(step))
        last.update(weights(step))
    assert uniform.count == last.count == updates
    for name in weights(0):
        for average, steps in (
            (uniform, range(updates)),
            (last, range(max(0, updates - length), updates)),
        ):
            ours = average.average()[name]
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact_mean(steps, name), rtol=1e-6, atol=1e-6)


def test_exponential_average_with_a_decay_per_update() -> None:
    average = ExponentialAverage(0.9)
    expected = weights(0)["matrix"].double()
    average.update(weights(0), decay=0.1)  # the first update copies whatever the decay
    for step, decay in enumerate([None, 0.5, None, 0.0, 1.0], start=1):
        average.update(weights(step), decay)
        used = 0.9 if decay is None else decay
        expected = used * expected + (1 - used) * weights(step)["matrix"].double()
        torch.testing.assert_close(
            average.average()["matrix"].double(), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("maker", MAKERS)
def test_average_does_not_alias_weights_or_itself(maker: str) -> None:
    average = MAKERS[maker]()
    live = weights(0)
    average.update(live)
    for tensor in live.values():
        tensor.zero_()
    torch.testing.assert_close(average.average()["matrix"], weights(0)["matrix"])
    average.average()["matrix"].zero_()
    torch.testing.assert_close(average.average()["matrix"], weights(0)["matrix"])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("updates", [0, 1, 2, 5])
def test_resume_continues_bit_for_bit(maker: str, updates: int) -> None:
    straight, resumed = MAKERS[maker](), MAKERS[maker]()
    for step in range(updates):
        straight.update(weights(step))
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.count == updates
    for step in range(updates, updates + 4):
        straight.update(weights(step))
        resumed.update(weights(step))
    for name, tensor in straight.average().items():
        assert torch.equal(resumed.average()[name], tensor)


@pytest.mark.parametrize("maker", MAKERS)
def test_loaded_state_is_a_copy(maker: str) -> None:
    straight, resumed = MAKERS[maker](), MAKERS[maker]()
    straight.update(weights(0))
    resumed.load_state_dict(straight.state_dict())
    before = straight.average()
    for step in range(1, 5):
        resumed.update(weights(step))
    for name, tensor in straight.average().items():
        assert torch.equal(before[name], tensor)


@pytest.mark.parametrize("maker", MAKERS)
def test_parameters_and_order_of_names(maker: str) -> None:
    average = MAKERS[maker]()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights(0).items()}
    average.update(parameters)
    average.update(dict(reversed(parameters.items())))
    for name, tensor in average.average().items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, weights(0)[name].float())


@pytest.mark.parametrize("maker", MAKERS)
def test_refusals(maker: str) -> None:
    average = MAKERS[maker]()
    with pytest.raises(ValueError, match="no weight average yet"):
        average.average()
    with pytest.raises(ValueError, match="leave out ids"):
        average.update({"ids": torch.arange(3)})
    average.update(weights(0))
    with pytest.raises(ValueError, match="same names at every update; scalar are not"):
        average.update({"matrix": torch.zeros(4, 3), "table": torch.zeros(5, 2)})
    assert average.count == 1


def test_bad_constructor_arguments() -> None:
    with pytest.raises(ValueError, match="decay of a weight average"):
        ExponentialAverage(1.5)
    with pytest.raises(ValueError, match="decay of a weight average"):
        ExponentialAverage().update(weights(0), decay=-0.1)
    with pytest.raises(ValueError, match="at least 1"):
        LastAverage(0)
    saved = LastAverage(3)
    for step in range(3):
        saved.update(weights(step))
    with pytest.raises(ValueError, match="length it was saved with"):
        LastAverage(2).load_state_dict(saved.state_dict())
