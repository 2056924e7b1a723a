import builtins
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.reporting import compare, group_runs, read_runs
from pgl.reporting.compare import notes, require_statistics, welch_t_test

SCORES = st.lists(st.floats(1.0, 1.5), min_size=2, max_size=6, unique=True)


@pytest.fixture
def two_recipes(make_run, tmp_path):
    for seed, bpb in enumerate([1.20, 1.22, 1.21]):
        make_run("base", seed, bpb)
    for seed, bpb in enumerate([1.10, 1.13]):
        make_run("better", seed, bpb)
    return group_runs(read_runs([tmp_path]))


@settings(max_examples=20, deadline=None)
@given(SCORES, SCORES)
def test_welch_is_its_formula(ours, theirs):
    test = welch_t_test(ours, theirs)
    a, b = (statistics.variance(x) / len(x) for x in (ours, theirs))
    t = (statistics.mean(ours) - statistics.mean(theirs)) / math.sqrt(a + b)
    degrees = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    assert test.statistic == pytest.approx(t, rel=1e-4, abs=1e-6)
    assert test.df == pytest.approx(degrees, rel=1e-4)
    # The area of Student's density beyond |t|, by the trapezoid rule over its quantile angle.
    assert test.pvalue == pytest.approx(2 * _tail(abs(t), degrees), abs=2e-3)


def _tail(t, degrees, points=4000):
    """P(T > t): with x = tan(angle), the integral over a bounded interval."""
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_norm -= 0.5 * math.log(degrees * math.pi)
    low, high = math.atan(t), math.pi / 2
    width = (high - low) / points
    total = 0.0
    for i in range(points):
        x = math.tan(low + (i + 0.5) * width)
        log_density = log_norm - (degrees + 1) / 2 * math.log1p(x * x / degrees)
        total += math.exp(log_density + math.log1p(x * x)) * width
    return total


def test_runs_of_a_name_are_a_group(two_recipes):
    base, better = two_recipes
    assert (base.label, better.label) == ("base", "better")
    bpb = base.statistic("bpb")
    assert bpb.mean == pytest.approx(1.21)
    assert bpb.std == pytest.approx(0.01)
    assert (bpb.least, bpb.most) == (1.20, 1.22)


def test_a_group_is_compared_with_the_baseline(two_recipes):
    base, better = two_recipes
    found = compare(better, base)
    assert found.bpb == pytest.approx(1.115 - 1.21)
    assert found.nats == pytest.approx(1.7 * (1.115 - 1.21))
    assert found.t < 0
    assert found.low < found.bpb < found.high
    assert 0 < found.p < 0.2
    assert found.p_margin is None


def test_the_margin_must_be_beaten(two_recipes):
    base, better = two_recipes
    by_nothing = compare(better, base, margin_nats=0.0).p_margin
    by_little = compare(better, base, margin_nats=0.005).p_margin
    by_too_much = compare(better, base, margin_nats=0.3).p_margin
    assert by_nothing < by_little < 0.5 < by_too_much
    assert by_nothing == pytest.approx(compare(better, base).p / 2)


def test_where_the_test_is_undefined_there_is_none(make_run, tmp_path):
    for seed in range(2):
        make_run("same", seed, 1.3)
        make_run("also_same", seed, 1.2)
        make_run("diverged", seed, float("nan"))
    make_run("alone", 1, 1.1)
    make_run("unscored", 1, None)
    groups = {group.label: group for group in group_runs(read_runs([tmp_path]))}
    for name in ("also_same", "diverged", "alone"):
        found = compare(groups[name], groups["same"])
        assert found.t is found.p is found.low is None
    assert compare(groups["unscored"], groups["same"]) is None
    assert groups["alone"].statistic("bpb").std is None
    assert groups["unscored"].statistic("bpb") is None


def test_groups_may_go_by_settings(make_run, tmp_path):
    for seed, rate in enumerate([0.1, 0.1, 0.2]):
        make_run("a", seed, settings={"model": {"rate": rate}, "trainer": {"logger": seed}})
    runs = read_runs([tmp_path])
    assert [(g.label, len(g.runs)) for g in group_runs(runs)] == [("a", 3)]
    by_rate = group_runs(runs, ["name", "model.rate"])
    labels = [("a, model.rate=0.1", 2), ("a, model.rate=0.2", 1)]
    assert [(g.label, len(g.runs)) for g in by_rate] == labels
    by_settings = group_runs(runs, ["settings"])
    assert [(g.label, len(g.runs)) for g in by_settings] == [("a", 2), ("a #2", 1)]
    assert len(group_runs(runs, ["folder"])) == 3
    with pytest.raises(ValueError, match=r"--group-by model\.rat: no run has such a setting"):
        group_runs(runs, ["model.rat"])


def test_notes_say_what_makes_a_comparison_doubtful(make_run, tmp_path):
    make_run("a", 1, settings={"model": {"rate": 0.1}})
    make_run("a", 2, settings={"model": {"rate": 0.2}})
    other = make_run("b", 1)
    again = other.parent / "version_9"
    again.mkdir()
    for name in ("config.yaml", "report.json"):
        text = (other / name).read_text().replace("sliding", "ttt")
        (again / name).write_text(text)
    said = notes(group_runs(read_runs([tmp_path])))
    assert said[0] == "a: its runs differ in more than the seed: model.rate."
    assert said[1].startswith("b: seed 1 is there more than once")
    assert said[2] == "The scores are of different kinds: quantised, sliding; quantised, ttt."
    assert len(said) == 3


def test_without_scipy_the_command_to_install_it_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[report\]'"):
        require_statistics()
