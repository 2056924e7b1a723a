"""The one linear layer of the model: float32 weight, computed in the dtype of its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgl.quant.fake_quant import FakeQuantConfig, fake_quantize
from pgl.quant.groups import tensor_group

# Shape suffixes: O output, I input.


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

    def forward(self, x: Tensor, out_gain_O: Tensor | None = None) -> Tensor:
        """Return ``out_gain * (x @ weight.T)`` in the dtype of ``x``: (..., in) -> (..., out)."""
        return F.linear(x, self.compute_weight(x.dtype, out_gain_O))

    def compute_weight(self, dtype: torch.dtype, out_gain_O: Tensor | None = None) -> Tensor:
        """Return the weight that a product in ``dtype`` uses: cast, or fake-quantised.

        Args:
            dtype: Of the product.
            out_gain_O: A gain for each output, multiplied into the weight. The product is the same,
                and no stream is read or written for the gain and its gradient: 2 ms of a
                micro-batch of 70 with PR #703's model (reckoned from the bytes).
        """
        quantized = self.training and self.qat_clip is not None
        weight_OI = self.weight
        if quantized:
            weight_OI = fake_quantize(weight_OI, self.qat_clip, dtype, self.qat_scale_floor)
        if out_gain_O is not None:
            weight_OI = out_gain_O.unsqueeze(1) * weight_OI
        return weight_OI.to(dtype)


def set_fake_quantization(model: nn.Module, config: FakeQuantConfig | None) -> list[str]:
    """Switch fake quantisation of a model's linear layers on, or off with None.

    The output head stays as it is: tied or not, its product reads the plain weight.

    Returns:
        Names of the layers that are fake-quantised from now on.
    """
    switched_on = []
    for name, layer in model.named_modules():
        if not isinstance(layer, CastedLinear):
            continue
        bits = None if config is None else config.bits(tensor_group(f"{name}.weight", 2))
        layer.qat_clip = None if bits is None else 2 ** (bits - 1) - 1
        if config is not None and bits is not None:
            layer.qat_scale_floor = config.scale_floor
            switched_on.append(name)
    return switched_on
