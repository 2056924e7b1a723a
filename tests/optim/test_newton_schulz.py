"""The orthogonalisation does what it says, whatever the shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgl.optim import zeropower
from pgl.optim.newton_schulz import KELLER, POLAR_EXPRESS, step_coefficients


def naive(G: Tensor, steps: int) -> Tensor:
    """One matrix, no batch, no transposition."""
    a, b, c = KELLER
    X = G / (G.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_batch_equals_naive(count: int, rows: int, cols: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    G_KRC = torch.randn(count, rows, cols, generator=generator, dtype=torch.float64)
    expected = torch.stack([naive(G, steps) for G in G_KRC])
    ours = zeropower(G_KRC, steps, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def spectrum(name: str, steps: int, dtype: torch.dtype, smallest: float) -> Tensor:
    """Return the singular values left of values spread from ``smallest`` to 1."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(64, 32, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    S = torch.logspace(0, torch.tensor(smallest).log10().item(), 32, dtype=torch.float64)
    return torch.linalg.svdvals(zeropower(U * S @ V.T, steps, name, dtype).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keller_leaves_a_band(dtype: torch.dtype) -> None:
    values = spectrum("keller", 5, dtype, 0.05)
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_polar_express_converges_to_one() -> None:
    values = spectrum("polar_express", 8, torch.float64, 1e-3)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)
    five = spectrum("polar_express", 5, torch.float64, 0.01)
    assert (five - 1).abs().max() < 0.15


def test_polar_express_is_stable_in_bf16() -> None:
    values = spectrum("polar_express", 8, torch.bfloat16, 0.05)
    assert (values - 1).abs().max() < 0.05


def test_polar_express_is_closer_to_the_polar_factor_than_keller() -> None:
    G = torch.randn(24, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)

    def error(name: str) -> float:
        return float((zeropower(G, 5, name, torch.float64) - U @ Vh).norm())

    assert error("polar_express") < 0.5 * error("keller")


def test_polar_express_safety_factor() -> None:
    # The one singular value of a rank-1 matrix enters at 1 / 1.01, with the first polynomial
    # p(x / 1.01) of the paper's listing.
    vector = torch.arange(1.0, 6.0, dtype=torch.float64)
    G = torch.outer(vector, vector)
    a, b, c = POLAR_EXPRESS[0]
    x = 1 / 1.01**2
    expected = a * x + b * x**3 + c * x**5
    value = torch.linalg.svdvals(zeropower(G, 1, "polar_express", torch.float64))[0]
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_last_polynomial_repeats() -> None:
    assert step_coefficients("polar_express", 10)[7:] == [POLAR_EXPRESS[-1]] * 3
    assert len(step_coefficients("polar_express", 3)) == 3
    assert step_coefficients("keller", 2) == [KELLER] * 2


def test_scale_of_the_input_does_not_matter() -> None:
    G = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(2))
    for factor in (1e-3, 1e4):
        torch.testing.assert_close(
            zeropower(G * factor, dtype=torch.float32),
            zeropower(G, dtype=torch.float32),
            rtol=1e-3,
            atol=1e-3,
        )


def test_zero_matrix_and_leading_dimensions() -> None:
    G = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(3))
    G[1, 2] = 0
    out = zeropower(G)
    assert out.shape == G.shape
    assert out.dtype == torch.bfloat16
    assert not out[1, 2].any()
    assert torch.equal(zeropower(G[0, 1][None])[0], zeropower(G[0, 1]))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="ns_coefficients must be one of keller, polar_express"):
        zeropower(torch.ones(2, 2), coefficients="newton")
    with pytest.raises(ValueError, match="ns_steps must be at least 1"):
        zeropower(torch.ones(2, 2), steps=0)
