"""Training losses over soft-capped logits.

Shapes: N targets (any number of dimensions), V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ENTROPY_EPS = 1e-8


def token_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the cross-entropy of every target in float32 nats, shape (N,) with N flattened."""
    return F.cross_entropy(
        logits_NV.float().flatten(0, -2), targets_N.flatten().long(), reduction="none"
    )


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy in float32 nats, a 0-d tensor.

    Args:
        logits_NV: Logits (..., V), any floating type.
        targets_N: Target ids (...), int32 or int64.
    """
    return token_cross_entropy(logits_NV, targets_N).mean()


def mile_weights(logits_NV: Tensor, gamma: Tensor, clamp_min: float = 0.1) -> Tensor:
    """Return the weight of every target, ``max((1 - exp(-H))^gamma, clamp_min)``, shape (N,).

    H is the entropy of the prediction in nats. The weights carry no gradient.

    Args:
        logits_NV: Logits (..., V).
        gamma: 0-d exponent; at 0 all weights are exactly 1.
        clamp_min: Least weight.
    """
    with torch.no_grad():
        p_NV = logits_NV.detach().float().flatten(0, -2).softmax(-1)
        entropy_N = -(p_NV * (p_NV + ENTROPY_EPS).log()).sum(-1)
        # The epsilon can push the entropy of a certain prediction below 0, and a negative number to
        # a fractional power is NaN.
        uncertainty_N = (1.0 - (-entropy_N).exp()).clamp_min(0.0)
        return uncertainty_N.pow(gamma.float()).clamp_min(clamp_min)


def mile_loss(
    logits_NV: Tensor, targets_N: Tensor, gamma: Tensor, clamp_min: float = 0.1
) -> Tensor:
    """Return cross-entropy weighted towards uncertain predictions, a 0-d tensor in nats.

    ``sum(w ce) / sum(w)`` with :func:`mile_weights` (PR #703, which shows no gain from it: 1.1176
    against 1.1171 without). ``gamma`` is a tensor, so that one compiled graph serves the whole
    schedule; at 0 the loss is :func:`cross_entropy`.

    Args:
        logits_NV: Logits (..., V), any floating type.
        targets_N: Target ids (...), int32 or int64.
        gamma: 0-d exponent.
        clamp_min: Least weight.
    """
    weights_N = mile_weights(logits_NV, gamma, clamp_min)
    return (weights_N * token_cross_entropy(logits_NV, targets_N)).sum() / weights_N.sum()
