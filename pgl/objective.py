"""What a training step minimises."""

from dataclasses import dataclass

from torch import Tensor, nn

from pgl.model.loss import cross_entropy, mile_loss


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy, or MiLe's entropy-weighted form of it."""

    mile_gamma: float = 0.0
    """Exponent of the entropy weights at full learning rate; 0 is plain cross-entropy, PR #703
    uses 1.1. It falls to 0 with the learning rate."""
    mile_clamp_min: float = 0.1
    """Smallest weight of a token."""

    def __post_init__(self) -> None:
        if self.mile_gamma < 0:
            raise ValueError(f"model.loss.mile_gamma must not be negative, got {self.mile_gamma}")
        if not 0 <= self.mile_clamp_min <= 1:
            raise ValueError(
                f"model.loss.mile_clamp_min must be between 0 and 1, got {self.mile_clamp_min}"
            )


def training_loss(
    gpt: nn.Module, ids_BT: Tensor, targets_BT: Tensor, config: LossConfig, mile_gamma: Tensor
) -> Tensor:
    """Return the mean loss of one micro-batch, a 0-d float32 tensor.

    Where it is not finite, neither is its gradient, so that the global gradient norm tells all
    ranks of a bad loss on any of them: an infinite loss may well have a finite gradient.

    Args:
        gpt: The model; called with token ids it returns logits.
        ids_BT: Input tokens.
        targets_BT: The token after each input.
        config: Which loss.
        mile_gamma: Current exponent as a 0-d tensor, so that a new value never recompiles.
    """
    logits_BTV = gpt(ids_BT)
    if config.mile_gamma == 0:
        loss = cross_entropy(logits_BTV, targets_BT)
    else:
        loss = mile_loss(logits_BTV, targets_BT, mile_gamma, clamp_min=config.mile_clamp_min)
    # Divided by 1, which changes no bit, or by 0.
    return loss / loss.detach().isfinite()
