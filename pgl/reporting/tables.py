"""A comparison of runs as Markdown and as JSON."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pgl.reporting.compare import Comparison, Group, Statistic, compare, notes
from pgl.reporting.read import Result, Run

FIGURES = (
    "bpb",
    "nats",
    "total_bytes",
    "steps",
    "tokens",
    "train_seconds",
    "total_seconds",
    "tokens_per_second",
)
EMPTY = "-"


@dataclass(frozen=True)
class Report:
    """Everything that is printed."""

    groups: list[Group]
    unfinished: list[Run]
    baseline: Group | None
    comparisons: dict[str, Comparison]
    margin_nats: float | None
    notes: list[str]


def build(
    groups: list[Group],
    runs: Iterable[Run],
    baseline: str | None = None,
    margin_nats: float | None = None,
    remarks: Sequence[str] = (),
) -> Report:
    """Compare groups with the baseline and gather what the tables need.

    Args:
        groups: Groups of finished runs.
        runs: All runs, for the unfinished ones.
        baseline: Label of a group. None: no comparison.
        margin_nats: Also test whether a group is better by more than this many nats per token.
        remarks: Notes of the caller, behind those on the groups.

    Raises:
        ValueError: If there is no such group, or the t-test needs scipy and it is missing.
    """
    unfinished = [run for run in runs if run.result is None]
    reference = None
    if baseline is not None:
        reference = next((group for group in groups if group.label == baseline), None)
        if reference is None:
            known = ", ".join(group.label for group in groups) or "none that finished"
            raise ValueError(f"--baseline {baseline} is not one of the groups: {known}")
    comparisons = {}
    for group in groups:
        if reference is not None and group is not reference:
            comparison = compare(group, reference, margin_nats)
            if comparison is not None:
                comparisons[group.label] = comparison
    remarks = [*notes(groups), *remarks]
    return Report(groups, unfinished, reference, comparisons, margin_nats, remarks)


def to_markdown(report: Report) -> str:
    """Return the tables: groups, comparison, single runs, unfinished runs, notes."""
    sections = ["## Groups", *_groups(report.groups)]
    if report.baseline is not None and report.comparisons:
        sections += ["", f"## Against {report.baseline.label}", *_comparisons(report)]
    sections += ["", "## Runs", *_runs(report.groups)]
    if report.unfinished:
        sections += ["", "## Unfinished", *_unfinished(report.unfinished)]
    if report.notes:
        sections += ["", "## Notes", *(f"- {note}" for note in report.notes)]
    return "\n".join(sections) + "\n"


def to_json(report: Report) -> str:
    """Return the same as JSON; figures that are not finite become null."""
    content = {
        "baseline": None if report.baseline is None else report.baseline.label,
        "margin_nats": report.margin_nats,
        "groups": [_group_values(group, report) for group in report.groups],
        "unfinished": [_run_values(run) for run in report.unfinished],
        "notes": report.notes,
    }
    return json.dumps(_finite(content), indent=2) + "\n"


def _groups(groups: Sequence[Group]) -> list[str]:
    rows = []
    for group in groups:
        size = group.statistic("total_bytes")
        seconds, total = group.statistic("train_seconds"), group.statistic("total_seconds")
        rows.append(
            [
                group.label,
                len(group.runs),
                _mean(group.statistic("bpb"), ".5f"),
                _std(group.statistic("bpb"), ".5f"),
                _mean(group.statistic("nats"), ".5f"),
                EMPTY if size is None else f"{size.most:,.0f}",
                _mean(group.statistic("steps"), ",.0f"),
                _mean(group.statistic("tokens"), ",.0f"),
                _range(seconds),
                _range(total),
                _mean(group.statistic("tokens_per_second"), ",.0f"),
                group.verdict() or EMPTY,
            ]
        )
    return _table(
        "group | runs | BPB | std | nats | largest file, bytes | steps | tokens | training, s | "
        "all phases, s | tokens/s | legal",
        rows,
    )


def _comparisons(report: Report) -> list[str]:
    heading = "group | BPB | nats | 95 % interval of BPB | Welch t | df | p"
    if report.margin_nats is not None:
        heading += f" | p of better by > {report.margin_nats:g} nats"
    rows = []
    for label, c in report.comparisons.items():
        interval = EMPTY if c.low is None else f"{c.low:+.5f} to {c.high:+.5f}"
        row = [label, f"{c.bpb:+.5f}", f"{c.nats:+.5f}", interval]
        row += [_number(c.t, ".2f"), _number(c.degrees, ".1f"), _number(c.p, ".2g")]
        if report.margin_nats is not None:
            row.append(_number(c.p_margin, ".2g"))
        rows.append(row)
    return _table(heading, rows)


def _runs(groups: Sequence[Group]) -> list[str]:
    rows = []
    for group in groups:
        for run in group.runs:
            result = run.result
            assert result is not None, "groups hold finished runs"
            rows.append(
                [
                    group.label,
                    EMPTY if run.seed is None else run.seed,
                    _number(result.bpb, ".6f"),
                    _number(result.nats, ".6f"),
                    result.kind or EMPTY,
                    _stages(result),
                    _bytes(result),
                    f"{result.steps:,}",
                    f"{1000 * result.train_seconds / max(result.steps, 1):,.1f}",
                    result.device,
                    result.legality or EMPTY,
                    run.folder,
                ]
            )
    return _table(
        "group | seed | BPB | nats | score of | other scores | bytes (of limit) | steps | "
        "ms/step | device | legal | folder",
        rows,
    )


def _unfinished(runs: Sequence[Run]) -> list[str]:
    rows = [
        [
            run.name,
            EMPTY if run.seed is None else run.seed,
            "yes, from last.ckpt" if run.can_resume else "no checkpoint",
            run.folder,
        ]
        for run in runs
    ]
    return _table("run | seed | can be resumed | folder", rows)


def _table(heading: str, rows: Sequence[Sequence[Any]]) -> list[str]:
    columns = heading.count("|") + 1
    lines = [f"| {heading} |", "|---" * columns + "|"]
    # A bar inside a cell would start another one.
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
    return [*lines, *(f"| {' | '.join(row)} |" for row in cells)]


def _stages(result: Result) -> str:
    others = ((kind, bpb) for kind, bpb in result.stages.items() if kind != result.kind)
    return "; ".join(f"{kind} {bpb:.6f}" for kind, bpb in others) or EMPTY


def _bytes(result: Result) -> str:
    if result.total_bytes is None:
        return EMPTY
    limit = "" if result.limit_bytes is None else f" ({result.limit_bytes:,})"
    return f"{result.total_bytes:,}{limit}"


def _mean(statistic: Statistic | None, form: str) -> str:
    return EMPTY if statistic is None else format(statistic.mean, form)


def _std(statistic: Statistic | None, form: str) -> str:
    return EMPTY if statistic is None else _number(statistic.std, form)


def _range(statistic: Statistic | None) -> str:
    if statistic is None:
        return EMPTY
    least, most = f"{statistic.least:,.1f}", f"{statistic.most:,.1f}"
    return least if least == most else f"{least} to {most}"


def _number(value: float | None, form: str) -> str:
    return EMPTY if value is None else format(value, form)


def _group_values(group: Group, report: Report) -> dict[str, Any]:
    statistics = {figure: group.statistic(figure) for figure in FIGURES}
    comparison = report.comparisons.get(group.label)
    return {
        "label": group.label,
        "legality": group.verdict(),
        **{name: None if s is None else asdict(s) for name, s in statistics.items()},
        "against_baseline": None if comparison is None else asdict(comparison),
        "runs": [_run_values(run) for run in group.runs],
    }


def _run_values(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "name": run.name,
        "seed": run.seed,
        "can_resume": run.can_resume,
        "result": None if run.result is None else asdict(run.result),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
