import json

import pytest

from pgl.reporting import read_runs


def test_a_run_has_its_figures(make_run):
    folder = make_run("base", 7, bpb=1.25)
    (run,) = read_runs([folder])
    assert (run.name, run.seed, run.folder) == ("base", 7, folder)
    assert run.result.bpb == 1.25
    assert run.result.nats == pytest.approx(1.7 * 1.25)
    assert run.result.kind == "quantised, sliding"
    assert run.result.stages == {"raw, chunked": 1.5, "quantised, sliding": 1.25}
    assert (run.result.total_bytes, run.result.limit_bytes) == (1000, 16000)
    assert (run.result.train_seconds, run.result.total_seconds) == (10.0, 12.5)
    assert run.result.legality is None


def test_the_verdict_is_that_of_the_report(make_run):
    early = {"legal": True, "verdict": "legal", "not_judged": ["a", "b"]}
    (run,) = read_runs([make_run("early", 1, legality=early)])
    assert run.result.legality == "not judged: a; b"
    legality = {"legal": False, "verdict": "not legal", "reasons": ["a: b"]}
    (run,) = read_runs([make_run("base", 1, legality=legality)])
    assert run.result.legality == "not legal"
    assert run.result.reasons == ["a: b"]


def test_a_score_of_weights_that_knew_the_text_is_not_the_runs_score(make_run):
    scores = [
        {"weights": "quantised", "windows": "sliding", "bpb": 1.2, "loss": 2.0, "legal": True},
        {"weights": "quantised", "windows": "ttt", "bpb": 1.1, "loss": 1.9, "legal": False},
    ]
    (run,) = read_runs([make_run("base", 1, scores=scores)])
    assert (run.result.bpb, run.result.nats) == (1.2, 2.0)
    assert run.result.kind == "quantised, sliding"
    assert run.result.stages["quantised, ttt"] == 1.1


def test_parents_of_runs_are_searched_and_each_run_is_read_once(make_run, tmp_path):
    folders = [make_run("a", 2), make_run("a", 10), make_run("b", 1)]
    # What lies inside a run is no run of its own.
    (folders[0] / "nested").mkdir()
    (folders[0] / "nested" / "report.json").write_text("{}")
    runs = read_runs([tmp_path, folders[1], folders[2] / "report.json"])
    assert [run.folder for run in runs] == folders


def test_an_unfinished_run_is_kept(make_run):
    folder = make_run("a", 1, finished=False)
    (run,) = read_runs([folder])
    assert run.result is None
    assert run.name == "a"
    assert not run.can_resume
    (folder / "last.ckpt").touch()
    assert read_runs([folder])[0].can_resume


def test_a_run_that_scored_nothing_has_no_score(make_run):
    (run,) = read_runs([make_run("a", 1, bpb=None, artifact={})])
    assert run.result.bpb is None
    assert run.result.kind is None
    assert run.result.total_bytes is None


def test_a_run_without_its_configuration_has_no_seed(make_run):
    folder = make_run("a", 1)
    (folder / "config.yaml").unlink()
    assert read_runs([folder])[0].seed is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "indices must be"),
        (json.dumps({"name": "x", "artifact": {}}), "lacks 'training'"),
    ],
)
def test_a_broken_report_is_named(make_run, content, problem):
    folder = make_run("a", 1)
    (folder / "report.json").write_text(content)
    with pytest.raises(ValueError, match=problem) as caught:
        read_runs([folder])
    assert str(folder / "report.json") in str(caught.value)


def test_a_broken_configuration_is_named(make_run):
    folder = make_run("a", 1)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not a YAML file"):
        read_runs([folder])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="is not a folder"):
        read_runs([tmp_path / "absent"])
