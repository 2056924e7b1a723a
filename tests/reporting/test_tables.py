import json

import pytest

from pgl.reporting import group_runs, read_runs, to_json, to_markdown
from pgl.reporting.tables import build


@pytest.fixture
def report(make_run, tmp_path):
    for seed, bpb in enumerate([1.20, 1.22]):
        make_run("base", seed, bpb, legality={"legal": True, "verdict": "legal"})
        verdict = "legal" if seed == 0 else "not legal"
        reasons = [] if seed == 0 else ["size: too much"]
        make_run("other", seed, bpb + 0.1, legality={"verdict": verdict, "reasons": reasons})
    make_run("crashed", 3, finished=False)
    runs = read_runs([tmp_path])
    return build(group_runs(runs), runs, "base", margin_nats=0.005, remarks=["one more"])


def rows(markdown, section):
    """Return the cells of a section's table by its first column."""
    lines = markdown.split(f"## {section}\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(cells[0]) for row in cells)
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_markdown_has_groups_comparison_runs_and_unfinished(report):
    text = to_markdown(report)
    groups = rows(text, "Groups")
    assert groups["base"]["BPB"] == "1.21000"
    assert groups["base"]["std"] == "0.01414"
    assert groups["base"]["largest file, bytes"] == "1,000"
    assert groups["base"]["training, s"] == "10.0"
    assert groups["base"]["all phases, s"] == "12.5"
    assert groups["base"]["legal"] == "legal"
    assert groups["other"]["legal"] == "mixed"
    against = rows(text, "Against base")
    assert list(against) == ["other"]
    assert against["other"]["BPB"] == "+0.10000"
    assert against["other"]["Welch t"] == "7.07"
    assert float(against["other"]["p of better by > 0.005 nats"]) > 0.9
    assert rows(text, "Runs")["other"]["legal"] == "not legal"
    assert rows(text, "Unfinished")["crashed"]["can be resumed"] == "no checkpoint"
    assert "- other: not legal: size: too much.\n- one more" in text


def test_json_holds_the_same(report):
    content = json.loads(to_json(report))
    base, other = content["groups"]
    assert content["baseline"] == "base"
    assert base["against_baseline"] is None
    assert other["against_baseline"]["bpb"] == pytest.approx(0.1)
    assert other["bpb"]["mean"] == pytest.approx(1.31)
    assert [run["seed"] for run in other["runs"]] == [0, 1]
    assert content["unfinished"][0]["name"] == "crashed"


def test_json_stays_json_if_a_run_diverged(make_run, tmp_path):
    make_run("bad", 1, float("nan"))
    runs = read_runs([tmp_path])
    text = to_json(build(group_runs(runs), runs))
    group = json.loads(text, parse_constant=pytest.fail)["groups"][0]
    assert group["bpb"]["mean"] is None
    assert "| nan |" in to_markdown(build(group_runs(runs), runs))


def test_an_unknown_baseline_is_refused_with_the_names(make_run, tmp_path):
    make_run("base", 1)
    runs = read_runs([tmp_path])
    with pytest.raises(ValueError, match="--baseline basis is not one of the groups: base"):
        build(group_runs(runs), runs, "basis")
