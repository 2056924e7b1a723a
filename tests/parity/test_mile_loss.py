"""MiLe loss, weights and gradients against PR #703's numbers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pgl.model.loss import cross_entropy, mile_loss, mile_weights, token_cross_entropy

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize("gamma", [1.1, 0.5, 0.0, 1.1015625])
def test_loss_weights_and_gradient(golden: Golden, gamma: float) -> None:
    arrays = golden("mile_loss")
    tag = f"gamma{gamma}".replace(".", "p")
    logits = torch.tensor(arrays["logits"], requires_grad=True)
    targets = torch.tensor(arrays["targets"])
    clamp_min = float(arrays["clamp_min"])
    loss = mile_loss(logits, targets, torch.tensor(gamma), clamp_min)
    loss.backward()
    torch.testing.assert_close(
        loss.detach(), torch.tensor(arrays[f"loss_{tag}"]), rtol=5e-6, atol=0
    )
    weights = mile_weights(logits, torch.tensor(gamma), clamp_min)
    torch.testing.assert_close(
        weights, torch.tensor(arrays[f"weights_{tag}"]), rtol=5e-6, atol=5e-6
    )
    torch.testing.assert_close(
        logits.grad, torch.tensor(arrays[f"grad_logits_{tag}"]), rtol=5e-6, atol=5e-6
    )


def test_token_cross_entropy(golden: Golden) -> None:
    arrays = golden("mile_loss")
    logits, targets = torch.tensor(arrays["logits"]), torch.tensor(arrays["targets"])
    expected = torch.tensor(arrays["token_cross_entropy"])
    torch.testing.assert_close(token_cross_entropy(logits, targets), expected, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(cross_entropy(logits, targets), expected.mean(), rtol=5e-6, atol=0)
