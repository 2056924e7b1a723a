"""A tensor as it is kept in the artifact, and the way back to weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgl.quant.groups import Group
from pgl.quant.rows import RowCodes, dequantize_rows

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CODE_KINDS = ("int5", "int6", "int7", "int8")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the state dict in the form that is written to disk."""

    group: Group
    """Part of the model it belongs to."""

    kind: str
    """What `data` holds: "int5" .. "int8" codes, or "float16", "bfloat16" or "float32" values."""

    dtype: str
    """Name of the dtype that the model keeps the tensor in."""

    data: Tensor
    """Codes (R, C) as int8, or values of any shape in the dtype of `kind`."""

    scale_R: Tensor | None = None
    """Step of each row as float16; None for values."""

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES
        is_codes = self.kind in CODE_KINDS
        assert is_codes == (self.scale_R is not None)
        assert self.data.dtype == (torch.int8 if is_codes else DTYPES[self.kind])
        assert self.scale_R is None or self.scale_R.shape == self.data.shape[:-1]

    def weights(self) -> Tensor:
        """Return the float32 weights it stands for."""
        if self.scale_R is None:
            return self.data.float()
        return dequantize_rows(RowCodes(self.data, self.scale_R))


def dequantize_state(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the state dict that stored tensors stand for.

    Args:
        stored: Tensors by name.
        dtype: One dtype for all, e.g. ``torch.float32`` to see exactly what the codes say. None
            gives each tensor the dtype that the model keeps it in.
    """
    return {name: s.weights().to(dtype or DTYPES[s.dtype]) for name, s in stored.items()}
