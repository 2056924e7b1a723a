"""``pgl report``: tables and plots over runs and seeds."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pgl.io import atomic_write
from pgl.reporting.compare import group_runs
from pgl.reporting.plots import write_plots
from pgl.reporting.read import read_runs
from pgl.reporting.tables import build, to_json, to_markdown
from pgl.tools import OneLineParser

DESCRIPTION = """Mean and standard deviation over seeds, Welch's t-test against a baseline, sizes,
times and legality of runs; curves as PNG. Unfinished runs are listed, not dropped."""


def parser() -> OneLineParser:
    """Return the parser of ``pgl report``."""
    parser = OneLineParser(prog="pgl report", description=DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, or a folder that holds runs at any depth, such as checkpoints/pr703",
    )
    parser.add_argument(
        "--baseline", metavar="GROUP", help="label of the group that the others are compared with"
    )
    parser.add_argument(
        "--group-by",
        default="name",
        metavar="KEY[,KEY]",
        help="what repetitions share: name (of the recipe), settings (all but the seed), folder, "
        "or keys of config.yaml such as model.optimizer.matrix_lr (default: %(default)s)",
    )
    parser.add_argument(
        "--margin-nats",
        type=float,
        metavar="X",
        help="also test (one-sided) whether a group beats the baseline by more than X nats per "
        "token; the challenge asks for 0.005 at p < 0.01",
    )
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, not to stdout")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write curves as PNG into DIR")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run ``pgl report``; return the exit status.

    Raises:
        ValueError: For whatever the user can mend, in one sentence.
    """
    options = parser().parse_args(arguments)
    if options.margin_nats is not None and options.baseline is None:
        raise ValueError("--margin-nats needs --baseline, the group that must be beaten")
    runs = read_runs(options.runs)
    groups = group_runs(runs, [key for key in options.group_by.split(",") if key])
    report = build(groups, runs, options.baseline, options.margin_nats)
    text = to_json(report) if options.format == "json" else to_markdown(report)
    pictures = (
        [] if options.plots is None else write_plots(groups, report.unfinished, options.plots)
    )
    if options.output is None:
        sys.stdout.write(text)
    else:
        with atomic_write(options.output) as file:
            file.write(text.encode())
        pictures.insert(0, options.output)
    for path in pictures:
        sys.stderr.write(f"wrote {path}\n")
    return 0
