"""Tables and plots over finished runs. Imports neither torch nor Lightning."""

from pgl.reporting.compare import Comparison, Group, Statistic, compare, group_runs
from pgl.reporting.read import Result, Run, read_runs
from pgl.reporting.tables import to_json, to_markdown

__all__ = [
    "Comparison",
    "Group",
    "Result",
    "Run",
    "Statistic",
    "compare",
    "group_runs",
    "read_runs",
    "to_json",
    "to_markdown",
]
