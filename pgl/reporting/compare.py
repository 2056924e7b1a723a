"""Statistics over the seeds of a recipe, and Welch's t-test between recipes."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl.reporting.read import Result, Run

# Settings that say where a run writes or prints, not what it computes.
NOT_THE_RECIPE = (
    "seed_everything",
    "ckpt_path",
    "checkpoint.",
    "generation.",
    "progress.",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.logger",
)


@dataclass(frozen=True)
class Statistic:
    """Mean and spread of one figure over the runs of a group."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for a single run."""
    least: float
    most: float


@dataclass(frozen=True)
class Group:
    """Finished runs that count as repetitions of each other."""

    label: str
    runs: tuple[Run, ...]

    @property
    def results(self) -> list[Result]:
        """Results of its runs, all of which have one."""
        return [run.result for run in self.runs if run.result is not None]

    def statistic(self, figure: str) -> Statistic | None:
        """Return mean and spread of a field of :class:`Result`; None if no run has it."""
        values = self.values(figure)
        if not values:
            return None
        return Statistic(
            sum(values) / len(values), _standard_deviation(values), min(values), max(values)
        )

    def values(self, figure: str) -> list[float]:
        """Return a field of each result that has it."""
        values = (getattr(result, figure) for result in self.results)
        return [float(value) for value in values if value is not None]

    def kinds(self) -> set[str]:
        """Which weights were scored, and how."""
        return {result.kind for result in self.results if result.kind is not None}

    def verdict(self) -> str | None:
        """Legality of its scores, if the runs agree."""
        verdicts = {result.legality for result in self.results}
        return "mixed" if len(verdicts) > 1 else next(iter(verdicts), None)


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline: differences are group minus baseline, so below 0 is better."""

    bpb: float
    nats: float
    t: float | None
    """Welch's t on BPB; None where a group has a single run or neither varies at all."""
    degrees: float | None
    """Degrees of freedom (Welch and Satterthwaite)."""
    p: float | None
    """Two-sided."""
    low: float | None
    """95 % confidence interval of the difference in BPB."""
    high: float | None
    p_margin: float | None = None
    """One-sided p of "better than the baseline by more than the margin in nats"."""


def group_runs(runs: Iterable[Run], keys: Sequence[str] = ("name",)) -> list[Group]:
    """Put finished runs that agree in ``keys`` into groups, in the order of their first run.

    Args:
        runs: Runs; unfinished ones are left out.
        keys: "name", "folder", "settings" (all but the seed), or a key of the configuration such
            as "model.optimizer.matrix_lr".

    Raises:
        ValueError: If no run's configuration has such a key.
    """
    finished = [run for run in runs if run.result is not None]
    flat = {run.folder: flatten(run.settings) for run in finished}
    for key in keys:
        if key not in ("name", "folder", "settings") and not any(key in f for f in flat.values()):
            raise ValueError(
                f"--group-by {key}: no run has such a setting; use name, folder, settings or a key "
                "of config.yaml such as model.optimizer.matrix_lr"
            )
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in finished:
        values = tuple(_group_value(run, key, flat[run.folder]) for key in keys)
        groups.setdefault(values, []).append(run)
    labels = _numbered([_label(members[0], keys, flat) for members in groups.values()])
    members_of = (tuple(members) for members in groups.values())
    return [Group(*pair) for pair in zip(labels, members_of, strict=True)]


def compare(group: Group, baseline: Group, margin_nats: float | None = None) -> Comparison | None:
    """Compare a group with the baseline; None if one of them has no score.

    Raises:
        ValueError: If the test needs scipy and it is not installed.
    """
    ours, theirs = group.values("bpb"), baseline.values("bpb")
    if not ours or not theirs:
        return None
    bpb = _mean(ours) - _mean(theirs)
    nats = _mean(group.values("nats")) - _mean(baseline.values("nats"))
    test = welch_t_test(ours, theirs)
    if test is None:
        return Comparison(bpb, nats, None, None, None, None, None)
    interval = test.confidence_interval(0.95)
    p_margin = None
    if margin_nats is not None:
        to_beat = [value - margin_nats for value in baseline.values("nats")]
        one_sided = welch_t_test(group.values("nats"), to_beat, alternative="less")
        p_margin = None if one_sided is None else float(one_sided.pvalue)
    return Comparison(
        bpb,
        nats,
        float(test.statistic),
        float(test.df),
        float(test.pvalue),
        float(interval.low),
        float(interval.high),
        p_margin,
    )


def welch_t_test(
    ours: Sequence[float], theirs: Sequence[float], alternative: str = "two-sided"
) -> Any:
    """Return scipy's result of Welch's t-test; None where it is undefined.

    It is undefined for a single run, for scores that are not numbers, and where all runs of both
    groups are equal.

    Raises:
        ValueError: If scipy is not installed.
    """
    if min(len(ours), len(theirs)) < 2 or not all(map(math.isfinite, [*ours, *theirs])):
        return None
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        return None
    require_statistics()
    from scipy import stats

    return stats.ttest_ind(ours, theirs, equal_var=False, alternative=alternative)


def require_statistics() -> None:
    """Raise a ValueError with the command that installs scipy, if it is missing."""
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "a t-test over seeds needs scipy: pip install 'parameter-golf-lightning[report]' "
            "(in a checkout: pip install -e '.[report]')"
        ) from error


def notes(groups: Sequence[Group]) -> list[str]:
    """Return what a reader must know before comparing the groups."""
    found = []
    for group in groups:
        seeds = Counter(run.seed for run in group.runs if run.seed is not None)
        twice = sorted(seed for seed, count in seeds.items() if count > 1)
        if twice:
            found.append(
                f"{group.label}: seed {', '.join(map(str, twice))} is there more than once, so the "
                "runs are not independent and the spread is too small."
            )
        different = differing_settings(group.runs)
        if different:
            found.append(
                f"{group.label}: its runs differ in more than the seed: {', '.join(different)}."
            )
        broken = dict.fromkeys(reason for result in group.results for reason in result.reasons)
        found += [f"{group.label}: not legal: {reason}." for reason in broken]
    kinds = set().union(*(group.kinds() for group in groups))
    if len(kinds) > 1:
        found.append(f"The scores are of different kinds: {'; '.join(sorted(kinds))}.")
    return found


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the keys, the seed apart, in which configurations of the runs differ."""
    configs = [recipe_settings(run) for run in runs if run.settings]
    keys = sorted(set().union(*configs)) if configs else []
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


def recipe_settings(run: Run) -> dict[str, Any]:
    """Return the flat settings that say what a run computes."""
    flat = flatten(run.settings)
    return {key: value for key, value in flat.items() if not key.startswith(NOT_THE_RECIPE)}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _group_value(run: Run, key: str, flat: dict[str, Any]) -> str:
    if key == "name":
        return run.name
    if key == "folder":
        return str(run.folder)
    if key == "settings":
        return repr((run.name, sorted(recipe_settings(run).items())))
    return f"{key}={flat.get(key)}"


def _label(run: Run, keys: Sequence[str], flat: dict[Path, dict[str, Any]]) -> str:
    # A whole configuration is no label: the recipe's name stands for it.
    shown = ["name" if key == "settings" else key for key in keys]
    return ", ".join(_group_value(run, key, flat[run.folder]) for key in dict.fromkeys(shown))


def _numbered(labels: list[str]) -> list[str]:
    """Make labels unique: the second "x" becomes "x #2"."""
    seen: Counter[str] = Counter()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return unique


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
