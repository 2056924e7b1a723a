"""Curves of several runs in one picture, read from their TensorBoard events."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl.io import atomic_write
from pgl.reporting.compare import Group
from pgl.reporting.read import EVENTS, Run

AXES = {"steps": "optimizer steps", "seconds": "training seconds", "tokens": "million tokens"}
CURVES = {"loss": ("train/loss", "training loss"), "bpb": ("val/bpb", "validation bits per byte")}


@dataclass(frozen=True)
class Curve:
    """One metric of one run against one axis."""

    x: list[float]
    y: list[float]


def write_plots(groups: Sequence[Group], unfinished: Sequence[Run], folder: Path) -> list[Path]:
    """Draw loss and bits per byte against steps, seconds and tokens, a PNG for each.

    Runs of a group share a colour; unfinished runs are dashed. A metric that no run logged gives no
    picture.

    Raises:
        ValueError: If matplotlib is missing, or no run has TensorBoard events.
    """
    figure_class = _figure_class()
    series = [(group.label, list(group.runs), "-") for group in groups]
    series += [(f"{run.name} (unfinished)", [run], "--") for run in unfinished]
    scalars = {run.folder: _scalars(run) for _, runs, _ in series for run in runs}
    if not any(scalars.values()):
        raise ValueError(
            "--plots: no run has TensorBoard events; run `pgl fit` with a TensorBoardLogger"
        )
    written = []
    for metric, (tag, title) in CURVES.items():
        for axis, axis_title in AXES.items():
            figure = figure_class(figsize=(8, 5), layout="constrained")
            axes = figure.add_subplot(xlabel=axis_title, ylabel=title)
            curves = [
                (label, style, [_curve(run, scalars[run.folder], tag, axis) for run in runs])
                for label, runs, style in series
            ]
            if _draw(axes, curves):
                path = folder / f"{metric}_by_{axis}.png"
                with atomic_write(path) as file:
                    figure.savefig(file, format="png", dpi=120)
                written.append(path)
    return written


def _figure_class() -> Any:
    # The class alone: no window system and no global state.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--plots needs matplotlib: pip install 'parameter-golf-lightning[report]' "
            "(in a checkout: pip install -e '.[report]')"
        ) from error
    return Figure


def _draw(axes: Any, curves: Sequence[tuple[str, str, list[Curve]]]) -> bool:
    drawn = False
    for index, (label, style, members) in enumerate(curves):
        for curve in members:
            if curve.x:
                axes.plot(
                    curve.x,
                    curve.y,
                    style,
                    color=f"C{index % 10}",
                    label=label,
                    linewidth=1,
                    marker="o" if len(curve.x) < 20 else None,
                    markersize=3,
                )
                drawn, label = True, "_"  # one entry of the legend for each group
    if drawn:
        axes.legend()
        axes.grid(alpha=0.3)
    return drawn


def _curve(run: Run, scalars: dict[str, list[tuple[int, float]]], tag: str, axis: str) -> Curve:
    points = scalars.get(f"by_seconds/{tag}" if axis == "seconds" else tag, [])
    scale = 1.0
    if axis == "tokens":
        batch = run.settings.get("data", {}).get("batch_tokens")
        if batch is None:
            return Curve([], [])
        scale = batch / 1e6
    return Curve([x * scale for x, _ in points], [y for _, y in points])


def _scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each tag that is drawn, in order."""
    if not any(run.folder.glob(f"{EVENTS}*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for curve, _ in CURVES.values() for tag in (curve, f"by_seconds/{curve}")]
    return {
        tag: without_replays([(event.step, event.value) for event in events.Scalars(tag)])
        for tag in tags
        if tag in events.Tags()["scalars"]
    }


def without_replays(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Drop what a run logged between its last checkpoint and a crash, and then logged again."""
    kept: list[tuple[int, float]] = []
    for step, value in points:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept
