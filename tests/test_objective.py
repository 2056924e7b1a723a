"""The loss that a configuration asks for."""

import pytest
import torch

from pgl.model.loss import cross_entropy, mile_loss
from pgl.objective import LossConfig, training_loss


def batch():
    generator = torch.Generator().manual_seed(0)
    logits_BTV = 3 * torch.randn(2, 5, 11, generator=generator)
    ids_BT, targets_BT = torch.randint(11, (2, 2, 5), generator=generator)
    return logits_BTV, ids_BT, targets_BT


@pytest.mark.parametrize("clamp_min", [0.0, 0.5, 0.9])
def test_mile_has_the_configured_smallest_weight(clamp_min):
    logits_BTV, ids_BT, targets_BT = batch()
    config, gamma = LossConfig(mile_gamma=1.1, mile_clamp_min=clamp_min), torch.tensor(1.1)
    loss = training_loss(lambda _: logits_BTV, ids_BT, targets_BT, config, gamma)
    assert loss == mile_loss(logits_BTV, targets_BT, gamma, clamp_min)
    for other in {0.0, 0.5, 0.9} - {clamp_min}:
        assert loss != mile_loss(logits_BTV, targets_BT, gamma, other)


def test_without_an_exponent_it_is_cross_entropy():
    logits_BTV, ids_BT, targets_BT = batch()
    loss = training_loss(lambda _: logits_BTV, ids_BT, targets_BT, LossConfig(), torch.tensor(0.7))
    assert loss == cross_entropy(logits_BTV, targets_BT)
