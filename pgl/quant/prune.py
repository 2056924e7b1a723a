"""Magnitude pruning before quantisation."""

from torch import Tensor

from pgl.quant.rows import row_quantile


def prune_threshold(w: Tensor, fraction: float) -> Tensor:
    """Return the `fraction` quantile of |w| over the whole tensor, a float32 scalar."""
    return row_quantile(w.float().abs().flatten(), fraction)


def prune_by_magnitude(w: Tensor, fraction: float) -> Tensor:
    """Return a copy whose smallest entries are zero: those strictly below the quantile.

    PR #324 prunes 5 % of each large matrix, no fine-tuning after it. On Gaussian weights nearly
    all of them would round to zero anyway, so it mainly touches the float16 embedding.

    Args:
        w: Weights of any shape.
        fraction: Share of the entries to set to zero, 0 to 1.
    """
    return w.masked_fill(w.float().abs() < prune_threshold(w, fraction), 0)
