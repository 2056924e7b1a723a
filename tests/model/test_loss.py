"""Losses: types, shapes, the MiLe limits and compilation."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pgl.model.loss import cross_entropy, mile_loss, mile_weights, token_cross_entropy


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = (3 * torch.randn(2, 5, 11, generator=generator)).to(dtype)
    return logits_BTV, torch.randint(0, 11, (2, 5), generator=generator)


def naive_mile(logits: Tensor, targets: Tensor, gamma: float, clamp_min: float) -> float:
    """One token at a time."""
    total = weight_sum = 0.0
    for z, y in zip(logits.flatten(0, -2).double(), targets.flatten(), strict=True):
        p = z.exp() / z.exp().sum()
        entropy = -sum(float(q) * torch.log(q).item() for q in p)
        weight = max((1 - torch.tensor(-entropy).exp().item()) ** gamma, clamp_min)
        total += weight * -torch.log(p[y]).item()
        weight_sum += weight
    return total / weight_sum


def test_cross_entropy_equals_torch_in_float32() -> None:
    logits, targets = batch()
    expected = F.cross_entropy(logits.view(-1, 11), targets.view(-1))
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    assert cross_entropy(logits.bfloat16(), targets).dtype == torch.float32
    torch.testing.assert_close(cross_entropy(logits, targets.int()), expected)
    assert token_cross_entropy(logits, targets).shape == (10,)


@pytest.mark.parametrize("gamma", [0.3, 1.1, 2.0])
@pytest.mark.parametrize("clamp_min", [0.0, 0.1, 0.7])
def test_mile_equals_naive(gamma: float, clamp_min: float) -> None:
    logits, targets = batch(1)
    ours = mile_loss(logits, targets, torch.tensor(gamma), clamp_min)
    assert ours.item() == pytest.approx(naive_mile(logits, targets, gamma, clamp_min), rel=1e-5)


def test_mile_at_gamma_zero_is_cross_entropy() -> None:
    logits, targets = batch(2)
    torch.testing.assert_close(
        mile_loss(logits, targets, torch.tensor(0.0)), cross_entropy(logits, targets)
    )
    assert torch.equal(mile_weights(logits, torch.tensor(0.0)), torch.ones(10))


def test_certain_predictions_do_not_give_nan() -> None:
    logits = torch.zeros(3, 8, dtype=torch.float64)
    logits[:, 2] = 200.0
    logits.requires_grad_()
    loss = mile_loss(logits, torch.tensor([2, 2, 1]), torch.tensor(1.1))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert torch.allclose(mile_weights(logits, torch.tensor(1.1)), torch.full((3,), 0.1))


def test_weights_carry_no_gradient() -> None:
    logits, targets = batch(3)
    logits.requires_grad_()
    gamma = torch.tensor(1.1, requires_grad=True)
    assert not mile_weights(logits, gamma).requires_grad
    mile_loss(logits, targets, gamma).backward()
    assert gamma.grad is None
    weights = mile_weights(logits, gamma)
    expected = torch.autograd.grad(
        (weights * token_cross_entropy(logits, targets)).sum() / weights.sum(), logits
    )[0]
    torch.testing.assert_close(logits.grad, expected)


def test_gamma_may_be_bf16() -> None:
    logits, targets = batch(4)
    held = mile_loss(logits, targets, torch.tensor(1.1, dtype=torch.bfloat16))
    exact = mile_loss(logits, targets, torch.tensor(1.1015625))
    assert torch.equal(held, exact)


def test_compiles_once_for_all_values_of_gamma() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(mile_loss, fullgraph=True, dynamic=False, backend=count)
    logits, targets = batch(5)
    for gamma in (1.1, 0.5, 0.0):
        expected = mile_loss(logits, targets, torch.tensor(gamma))
        torch.testing.assert_close(compiled(logits, targets, torch.tensor(gamma)), expected)
    assert graphs == 1
