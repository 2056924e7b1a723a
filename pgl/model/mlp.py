"""The MLP of a block: up, squared activation, down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl.kernels import squared_mlp_fits
from pgl.model.config import GPTConfig
from pgl.model.linear import CastedLinear


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU, ``max(x, 0)^2``. Source: the challenge's baseline."""
    positive = F.relu(x)
    # Not .square(): autocast runs pow in float32. The product rounds to the same bfloat16.
    return positive * positive


def leaky_relu2(x: Tensor, negative_slope: float) -> Tensor:
    """Squared leaky ReLU: ``x^2`` above zero, ``(negative_slope x)^2`` below.

    Source: PR #549 and #703 with slope 0.5; measured -0.0021 to -0.003 bits per byte.
    """
    leaky = F.leaky_relu(x, negative_slope)
    return leaky * leaky


class MLP(nn.Module):
    """``proj(activation(fc(x)))`` with ``config.mlp_hidden`` hidden units."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.mlp_activation
        self.negative_slope = config.mlp_negative_slope
        self.kernels = False  # see GPT.prepare
        self.quack = config.kernels == "quack"
        self.fc = CastedLinear(config.model_dim, config.mlp_hidden)
        self.proj = CastedLinear(config.mlp_hidden, config.model_dim)

    def forward(self, x: Tensor, out_gain_E: Tensor | None = None) -> Tensor:
        """(B, T, dim) -> (B, T, dim), times the output's gain (dim,) if there is one."""
        if self.kernels and torch.compiler.is_compiling() and self._fits(x):
            return self._fused(x, out_gain_E)
        hidden = self.fc(x)
        if self.activation == "relu2":
            return self.proj(relu2(hidden), out_gain_E)
        return self.proj(leaky_relu2(hidden, self.negative_slope), out_gain_E)

    def _fits(self, x: Tensor) -> bool:
        rows = x.numel() // x.size(-1)
        return squared_mlp_fits(rows, x.size(-1), self.fc.out_features, x.dtype)

    def _fused(self, x: Tensor, out_gain_E: Tensor | None) -> Tensor:
        fc = self.fc.compute_weight(x.dtype)
        proj = self.proj.compute_weight(x.dtype, out_gain_E)
        slope = 0.0 if self.activation == "relu2" else self.negative_slope
        y, _, _ = torch.ops.pgl.squared_mlp(x.flatten(0, -2), fc, proj, slope, self.quack)
        return y.view_as(x)
