"""What a run keeps of each score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pgl.evaluate import ScoreMap, WindowLoader


@dataclass(frozen=True)
class Score:
    """One score of one set of weights."""

    weights: str
    """Which weights: raw, ema, swa or quantised."""
    windows: str
    """How they were scored: chunked or sliding, and what else was done to get the score."""
    bpb: float
    """Bits per byte."""
    loss: float
    """Nats per token."""
    tokens: int
    """Targets scored."""
    bytes: int
    """Bytes of those targets."""
    seq_len: int
    """Tokens of a window."""
    stride_tokens: int
    """Tokens between windows."""
    repeated: int | None = None
    """Targets that were scored more than once; None where nobody counted."""
    missed: int | None = None
    """Targets that were not scored."""
    legal: bool = True
    """False if the weights had been trained on text before it was scored."""


def make_score(
    weights: str,
    windows: str,
    loader: WindowLoader,
    result: Mapping[str, Tensor],
    score_map: ScoreMap | None = None,
    legal: bool = True,
) -> Score:
    """Return a score as plain values.

    Args:
        weights: See :class:`Score`.
        windows: See :class:`Score`.
        loader: The windows.
        result: What :func:`pgl.evaluate.evaluate_windows` returned.
        score_map: Which targets were scored, on all ranks.
        legal: See :class:`Score`.
    """
    times = None if score_map is None else score_map.times()
    return Score(
        weights,
        windows,
        bpb=float(result["bpb"]),
        loss=float(result["loss"]),
        tokens=int(result["tokens"]),
        bytes=int(result["bytes"]),
        seq_len=loader.seq_len,
        stride_tokens=loader.stride,
        repeated=None if times is None else int((times > 1).sum()),
        missed=None if times is None else int((times == 0).sum()),
        legal=legal,
    )


def windows_name(loader: WindowLoader) -> str:
    """Return what reports call the windows of a loader."""
    return "sliding" if loader.stride < loader.seq_len else "chunked"


def running_text(bpb: float) -> str:
    """Return what a progress bar says of a score that is being computed."""
    return "" if math.isnan(bpb) else f"{bpb:.4f} bits/byte"
