"""A fit in two processes is the fit of one, and ends on both when one has a reason to."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pgl.artifact import is_artifact
from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import scenarios
from compare import assert_close, one_process, results
from runs import TARGETS, digest, in_ranks

RANKS = (0, 1)


@pytest.fixture(scope="module")
def source(tiny_corpus: Shards) -> tuple[str, str]:
    return str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, source) -> dict[str, Any]:
    """The uninterrupted run of one process."""
    return one_process(tmp_path_factory.mktemp("alone") / "whole", source).summary()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, source) -> Path:
    """The folder in which two ranks have left the results of all their fits."""
    folder = tmp_path_factory.mktemp("ddp")
    part = one_process(
        folder / "part_of_one", source, expected=(scenarios.Crashed,), **scenarios.CRASHING
    )
    checkpoint = part.folder / "last.ckpt"
    assert in_ranks(len(RANKS), scenarios.ddp, folder, source, checkpoint) == [0, 0]
    return folder


@pytest.mark.parametrize(
    "name", ["whole", "part", "resumed_from_one", "signalled", "after_signal", "seconds"]
)
def test_replicas_are_bit_identical(ddp, name):
    first, second = results(ddp, name)
    assert first["digest"] == second["digest"]
    assert digest(first["state"]) == first["digest"]


def test_each_step_reads_the_tokens_of_one_process(ddp, alone):
    ranks = results(ddp, "whole")
    assert len(alone["rows"]) == 6
    for step, rows in enumerate(alone["rows"]):
        assert sorted(row for rank in ranks for row in rank["rows"][step]) == sorted(rows)
        assert all(len(rank["rows"][step]) == len(rows) // 2 for rank in ranks)


def test_losses_and_weights_are_those_of_one_process(ddp, alone):
    for rank in results(ddp, "whole"):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_close(rank["state"], alone["state"])


def test_scores_are_those_of_one_process(ddp, alone):
    for rank in results(ddp, "whole"):
        for score, expected in zip(rank["scores"][:2], alone["scores"][:2], strict=True):
            assert score["bpb"] == pytest.approx(expected["bpb"], rel=1e-6)
        for score, expected in zip(rank["scores"], alone["scores"], strict=True):
            # A weight at the edge between two codes may round to the other one.
            assert score["bpb"] == pytest.approx(expected["bpb"], rel=1e-4)
            for key in ("weights", "windows", "tokens", "bytes"):
                assert score[key] == expected[key]
            assert score["tokens"] == TARGETS


def test_every_target_is_scored_once_over_the_ranks(ddp):
    first, second = results(ddp, "whole")
    for windows, counts in first["times_scored"].items():
        assert (counts + second["times_scored"][windows] == 1).all()
        assert counts.any()
        assert second["times_scored"][windows].any()


def test_the_artifact_is_written_once_and_read_by_all(ddp):
    first, second = results(ddp, "whole")
    assert (first["artifacts_written"], second["artifacts_written"]) == (1, 0)
    assert first["read_back"] == second["read_back"] is not None
    assert is_artifact(ddp / "whole" / "model.pgl")


def test_the_report_names_two_devices(ddp):
    report = results(ddp, "whole")[0]["report"]
    assert report["training"]["devices"] == 2
    assert report["training"]["accumulate"] == 2
    assert report["training"]["tokens"] == 6 * 256


def test_the_report_says_that_the_replicas_are_identical(ddp):
    assert results(ddp, "whole")[0]["report"]["replicas"] == {"ranks": 2, "different": None}
    assert "replicas are identical to the last bit" in (ddp / "whole" / "report.md").read_text()


def test_ranks_share_clock_and_learning_rates(ddp):
    for name in ("whole", "seconds"):
        first, second = results(ddp, name)
        assert first["steering"] == second["steering"]
        assert first["elapsed"] == second["elapsed"] > 0


def test_steps_broadcast_nothing(ddp):
    for name in ("whole", "seconds"):
        assert [rank["broadcasts"] for rank in results(ddp, name)] == [0, 0]


def test_a_checkpoint_of_two_resumes_on_one(ddp, source, alone, tmp_path):
    resumed = one_process(tmp_path / "resumed", source, ckpt_path=ddp / "part" / "last.ckpt")
    assert resumed.trainer.global_step == 6
    assert resumed.recorder.rows == alone["rows"][3:]
    assert_close(resumed.state(), alone["state"])


def test_a_checkpoint_of_one_resumes_on_two(ddp, alone):
    ranks = results(ddp, "resumed_from_one")
    assert [len(rank["rows"]) for rank in ranks] == [3, 3]
    for step, rows in enumerate(alone["rows"][3:]):
        assert sorted(row for rank in ranks for row in rank["rows"][step]) == sorted(rows)
    for rank in ranks:
        assert rank["step"] == 6
        assert_close(rank["state"], alone["state"])


def test_sigterm_on_one_rank_stops_all_at_the_same_step(ddp):
    for rank in results(ddp, "signalled"):
        assert rank["error"] == "SIGTERMException: 143"
        assert rank["step"] == 3
        assert rank["artifacts_written"] == 0
        assert len(rank["rows"]) == 3, "the step under way was finished"


def test_a_run_stopped_by_sigterm_resumes_exactly(ddp):
    whole = results(ddp, "whole")
    for rank, expected in zip(results(ddp, "after_signal"), whole, strict=True):
        assert rank["step"] == 6
        assert rank["rows"] == expected["rows"][3:]
        assert digest(rank["state"]) == expected["digest"]
        assert rank["scores"] == expected["scores"]


def test_an_error_in_export_ends_both_ranks(ddp):
    errors = [rank["error"] for rank in results(ddp, "too_large")]
    assert errors[0].startswith("ArtifactTooLarge: ")
    assert "1000" in errors[0].replace(",", "")
    assert errors[1] == errors[0]
    assert not (ddp / "too_large" / "model.pgl").exists()


def test_rank_zeros_clock_ends_training(ddp):
    first, second = results(ddp, "seconds")
    assert first["step"] == second["step"] > 1, "the other clock would have stopped after a step"
    assert first["steering"][-2][-2] < 0.4 <= first["steering"][-1][-2]


@pytest.mark.slow
def test_three_processes(source, tmp_path):
    settings = {"batch_tokens": 384}
    expected = one_process(tmp_path / "alone", source, **settings).summary()
    assert in_ranks(3, scenarios.one_fit, tmp_path, source, settings) == [0, 0, 0]
    ranks = results(tmp_path, "whole", (0, 1, 2))
    assert len({rank["digest"] for rank in ranks}) == 1
    assert_close(ranks[0]["state"], expected["state"])
    for windows in ("chunked", "sliding"):
        assert (sum(rank["times_scored"][windows] for rank in ranks) == 1).all()
