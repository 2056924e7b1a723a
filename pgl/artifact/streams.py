"""Stored tensors as byte streams, one for each group and kind, and back."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pgl.artifact.codecs import Layout
from pgl.artifact.errors import ArtifactError
from pgl.quant.groups import Group
from pgl.quant.stored import CODE_KINDS, DTYPES, StoredTensor

SCALES = "scales"
_DTYPE_OF_KIND = {**DTYPES, **dict.fromkeys(CODE_KINDS, torch.int8)}


@dataclass(frozen=True)
class TableEntry:
    """What the tensor table says about one tensor."""

    name: str
    group: Group
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def stream(self) -> str:
        """Name of the stream that holds its codes or values."""
        return f"{self.group}.{self.kind}"

    @property
    def is_codes(self) -> bool:
        """Whether it has integer codes, and so row scales too."""
        return self.kind in CODE_KINDS

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass
class StreamPlan:
    """Size and layout of one stream, as they follow from the tensor table."""

    num_bytes: int = 0
    layout: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_codes(self) -> bool:
        """Whether the stream holds integer codes."""
        return bool(self.layout)


def make_table(stored: Mapping[str, StoredTensor]) -> list[TableEntry]:
    """List the tensors in the order in which they are written.

    The same matrix of all layers comes together, as codecs adapt to what they have just seen. The
    order depends on the names alone, so the same model gives the same bytes.
    """
    entries = [
        TableEntry(name, t.group, t.kind, t.dtype, tuple(t.data.shape))
        for name, t in stored.items()
    ]
    return sorted(entries, key=lambda entry: (entry.stream, *_layers_together(entry.name)))


def plan_streams(table: Sequence[TableEntry]) -> dict[str, StreamPlan]:
    """Return the streams that a table calls for, the row scales last."""
    plans: dict[str, StreamPlan] = {}
    num_scales = 0
    for entry in table:
        plan = plans.setdefault(entry.stream, StreamPlan())
        plan.num_bytes += entry.numel * _DTYPE_OF_KIND[entry.kind].itemsize
        if entry.is_codes:
            rows, columns = entry.shape
            plan.layout.append((rows, columns))
            num_scales += rows
    if num_scales:
        plans[SCALES] = StreamPlan(2 * num_scales)
    return plans


def to_streams(table: Sequence[TableEntry], stored: Mapping[str, StoredTensor]) -> dict[str, bytes]:
    """Write tensors into their streams: codes as they are, other values with their bytes split.

    Of floating-point values all first bytes come first, then all second bytes and so on: the
    bytes with sign and exponent repeat themselves, the low ones are noise.
    """
    pieces: dict[str, list[Tensor]] = {}
    for entry in table:
        tensor = stored[entry.name]
        pieces.setdefault(entry.stream, []).append(tensor.data.flatten())
        if tensor.scale_R is not None:
            pieces.setdefault(SCALES, []).append(tensor.scale_R)
    return {name: _split_bytes(torch.cat(parts)) for name, parts in pieces.items()}


def from_streams(
    table: Sequence[TableEntry], streams: Mapping[str, bytes]
) -> dict[str, StoredTensor]:
    """Read tensors back from their streams, whose sizes are those of the plan.

    Raises:
        ArtifactError: A value or a scale is not finite, or a code does not fit its kind. The
            message has no file name; the caller adds it.
    """
    values: dict[str, Tensor] = {}
    for name, data in streams.items():
        kind = "float16" if name == SCALES else name.split(".")[-1]
        values[name] = _join_bytes(data, kind)
        if values[name].is_floating_point() and not bool(values[name].isfinite().all()):
            raise ArtifactError(f"holds NaN or infinity in its stream {name}")
        if kind in CODE_KINDS and not _codes_fit(values[name], int(kind[3:])):
            raise ArtifactError(f"holds codes beyond {kind} in its stream {name}")
    taken = dict.fromkeys(streams, 0)

    def take(stream: str, count: int) -> Tensor:
        start = taken[stream]
        taken[stream] = start + count
        return values[stream][start : start + count]

    stored = {}
    for entry in table:
        data = take(entry.stream, entry.numel).reshape(entry.shape)
        scale_R = take(SCALES, entry.shape[0]) if entry.is_codes else None
        stored[entry.name] = StoredTensor(entry.group, entry.kind, entry.dtype, data, scale_R)
    return stored


def code_layout(plan: StreamPlan) -> Layout:
    """Return the matrices of a stream of codes, nothing for other streams."""
    return tuple(plan.layout)


def _layers_together(name: str) -> tuple[str, list[int]]:
    return re.sub(r"\d+", "#", name), [int(number) for number in re.findall(r"\d+", name)]


def _codes_fit(codes: Tensor, bits: int) -> bool:
    if not codes.numel():
        return True
    low, high = codes.aminmax()
    return -(2 ** (bits - 1)) <= low.item() and high.item() < 2 ** (bits - 1)


def _split_bytes(values: Tensor) -> bytes:
    raw = values.contiguous().view(torch.uint8).numpy()
    return raw.reshape(-1, values.element_size()).T.tobytes()


def _join_bytes(data: bytes, kind: str) -> Tensor:
    dtype = _DTYPE_OF_KIND[kind]
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    joined = torch.from_numpy(np.array(planes.T, order="C").reshape(-1))
    return joined.view(dtype)
