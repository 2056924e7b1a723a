"""RMSNorm without a weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last axis to root mean square 1, with float32 sums; keeps the dtype.

    The epsilon is float32's even for bfloat16: embeddings start at std 0.005, and bfloat16's own
    epsilon would swamp their mean square of 2.5e-5. The cast back is needed because autocast
    runs ``rms_norm`` in float32 from torch 2.12 on, which would turn the whole residual stream
    into float32.
    """
    return F.rms_norm(x, (x.size(-1),), eps=EPSILON).to(x.dtype)
