"""What goes wrong on one rank ends, or is skipped on, all of them, and is named."""

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from pgl.data import Shards
from pgl.data.shards import read_shard, write_shard

sys.path.append(str(Path(__file__).parent))

import faults
from compare import results
from runs import digest, in_ranks


@pytest.fixture(scope="module")
def source(tiny_corpus: Shards) -> tuple[str, str]:
    return str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)


@pytest.fixture(scope="module", params=["ddp", "parallel_muon"])
def diverged(tmp_path_factory, source, request) -> Path:
    folder = tmp_path_factory.mktemp("diverged")
    assert in_ranks(2, faults.diverging, folder, source, request.param) == [0, 0]
    return folder


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_ranks_agree_on_a_loss_that_only_one_has(diverged, action):
    first, second = results(diverged, action)
    assert first["digest"] == second["digest"]
    assert first["step"] == second["step"] == 6
    assert all(t.isfinite().all() for t in first["state"]["weights"].values())
    assert first["report"]["divergence"]["bad_steps"] == [2, 5]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_ranks_resume_exactly_after_a_bad_step(diverged, action):
    for again, whole in zip(
        results(diverged, f"{action}_again"), results(diverged, action), strict=True
    ):
        assert digest(again["state"]) == whole["digest"]
        assert again["scores"] == whole["scores"]


def test_both_ranks_stop_at_the_bad_step(diverged):
    for rank in results(diverged, "stop"):
        assert rank["error"].startswith("DivergenceError: training diverged: optimizer step 2 ")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("die", "rank 1 died or lost its connection"),
        ("fail", "rank 1 failed with LookupError: no such luck"),
    ],
)
def test_a_rank_that_dies_is_named_by_the_other(tmp_path, source, act, says):
    times = {"timeout_seconds": 30.0, "collective_timeout_seconds": 60.0}
    codes = in_ranks(2, faults.faulty, tmp_path, source, act, times)
    assert codes == [7, -signal.SIGKILL if act == "die" else 7]
    text = (tmp_path / "rank0.txt").read_text()
    assert says in text
    assert "The last good checkpoint is of step 2" in text


def test_a_rank_that_hangs_ends_the_collective(tmp_path, source):
    times = {"timeout_seconds": 10.0, "collective_timeout_seconds": 5.0}
    assert in_ranks(2, faults.faulty, tmp_path, source, "hang", times)[0] == 7
    text = (tmp_path / "rank0.txt").read_text()
    assert "one does not take part (rank 0: step 3, rank 1: step 3)" in text


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("config", "config WallClockBudget.steps: 7 on rank 1, 6 on rank 0"),
        ("data", "data fineweb_train_000000.bin: "),
        ("code", "code source: another on rank 1"),
    ],
)
def test_ranks_that_differ_refuse_to_start(tmp_path, source, what, says):
    if what == "data":
        shutil.copytree(source[0], tmp_path / "other")
        [shard, *_] = sorted((tmp_path / "other").glob("fineweb_train_*.bin"))
        tokens = np.array(read_shard(shard))
        tokens[:10] = tokens[10:20]
        write_shard(shard, tokens)
        says = f"data {shard.name}: "
    assert in_ranks(2, faults.differing, tmp_path, source, what) == [0, 0]
    for rank in (0, 1):
        text = (tmp_path / f"rank{rank}.txt").read_text()
        assert says in text
        assert "on rank 1" in text
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_replicas_that_drifted_apart_are_reported(tmp_path, source):
    assert in_ranks(2, faults.drifting, tmp_path, source) == [0, 0]
    replicas = results(tmp_path, "drifting")[0]["report"]["replicas"]
    assert replicas["ranks"] == 2
    assert "weights gpt.smear.gate" in replicas["different"]
    assert "on rank 1" in replicas["different"]
    assert "NOT identical" in (tmp_path / "run" / "report.md").read_text()
