"""The one linear layer of the model: float32 weight, computed in the dtype of its input."""

import torch.nn.functional as F
from torch import Tensor, nn

from pgl.quant.fake_quant import fake_quantize


class CastedLinear(nn.Linear):
    """Linear layer without bias whose float32 weight is cast to the input's dtype at use.

    Quantisation-aware training is switched on by setting ``qat_clip``, at any time and on a
    compiled model too: torch.compile guards the attribute, so the first step after the switch
    compiles a second variant and switching back and forth costs nothing from then on.

    Attributes:
        qat_clip: Largest code of the grid, 15 (int5) or 31 (int6); None switches fake quantisation
            off. Acts in training mode only.
        qat_scale_floor: Take the scale of PR #549 (from the uncast weight, at least 1/qat_clip)
            instead of PR #324's.
    """

    qat_clip: int | None
    qat_scale_floor: bool

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.qat_clip = None
        self.qat_scale_floor = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` in the dtype of ``x``: (..., in) -> (..., out)."""
        if self.training and self.qat_clip is not None:
            weight = fake_quantize(self.weight, self.qat_clip, x.dtype, self.qat_scale_floor)
        else:
            weight = self.weight.to(x.dtype)
        return F.linear(x, weight)
