"""A fit under Parallel Muon is the fit of one process, and of DDP."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import crashes
import scenarios
from compare import assert_close, one_process, results
from runs import TARGETS, digest, in_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = (0, 1, 2)
SETTINGS = {"batch_tokens": 384}  # 12 sequences, which 1, 2 and 3 processes can share


@pytest.fixture(scope="module")
def source(tiny_corpus: Shards) -> tuple[str, str]:
    return str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, source) -> dict[str, Any]:
    """The uninterrupted run of one process."""
    return one_process(tmp_path_factory.mktemp("alone") / "whole", source, **SETTINGS).summary()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory, source) -> Path:
    """The folder in which three ranks have left the results of all their fits."""
    folder = tmp_path_factory.mktemp("parallel")
    assert in_ranks(3, scenarios.parallel_muon, folder, source, SETTINGS) == [0, 0, 0]
    return folder


@pytest.mark.parametrize("name", ["whole", "part", "resumed", "signalled", "after_signal"])
def test_replicas_are_bit_identical(parallel, name):
    digests = {rank["digest"] for rank in results(parallel, name, RANKS)}
    assert len(digests) == 1


def test_losses_weights_and_scores_are_those_of_one_process(parallel, alone):
    """Two warm-up steps on each rank, undone, are part of the run that is compared."""
    for rank in results(parallel, "whole", RANKS):
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_close(rank["state"], alone["state"])
        for score, expected in zip(rank["scores"], alone["scores"], strict=True):
            # A weight at the edge between two codes may round to the other one.
            assert score["bpb"] == pytest.approx(expected["bpb"], rel=1e-4)
            assert score["tokens"] == TARGETS


def test_steps_broadcast_nothing(parallel):
    assert [rank["broadcasts"] for rank in results(parallel, "whole", RANKS)] == [0, 0, 0]


def test_a_checkpoint_holds_the_whole_state(parallel, alone):
    checkpoint = torch.load(parallel / "whole" / "last.ckpt", weights_only=True)
    [optimizer] = checkpoint["optimizer_states"]
    assert_close(optimizer["state"], alone["state"]["optimizer"]["state"])


def test_a_crashed_run_resumes(parallel, alone):
    for rank in results(parallel, "resumed", RANKS):
        assert rank["step"] == 6
        assert_close(rank["state"], alone["state"])


def test_a_run_stopped_by_sigterm_resumes_exactly(parallel):
    whole = results(parallel, "whole", RANKS)
    for rank, expected in zip(results(parallel, "after_signal", RANKS), whole, strict=True):
        assert rank["step"] == 6
        assert digest(rank["state"]) == expected["digest"]


def test_a_checkpoint_of_three_resumes_on_one(parallel, source, alone, tmp_path):
    checkpoint = parallel / "part" / "last.ckpt"
    resumed = one_process(tmp_path / "resumed", source, ckpt_path=checkpoint, **SETTINGS)
    assert resumed.trainer.global_step == 6
    assert_close(resumed.state(), alone["state"])


def test_a_checkpoint_of_three_resumes_on_two_under_ddp(parallel, source, alone, tmp_path):
    settings = {**SETTINGS, "ckpt_path": parallel / "part" / "last.ckpt"}
    assert in_ranks(2, scenarios.one_fit, tmp_path, source, settings) == [0, 0]
    for rank in results(tmp_path, "whole"):
        assert rank["step"] == 6
        assert_close(rank["state"], alone["state"])


def command_line(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgl", *crashes.arguments(config), *options],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_starts_the_processes(tmp_path, source):
    config = crashes.write_config(tmp_path / "run.yaml", source, steps=4)
    options = ("--trainer.strategy", "parallel_muon", "--trainer.devices", "2")
    ended = command_line(config, *options, "--model.optimizer.clip", "local")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["devices"] == 2
    assert report["training"]["steps"] == 4
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["clip"] == "local"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.strategy", "ddp", "--model.optimizer.clip", "local"), "parallel_muon, or"),
        (("--trainer.strategy", "parallel_muon", "--trainer.gradient_clip_val", "1"), "clip_norm"),
    ],
    ids=["local clip under DDP", "Trainer's clip"],
)
def test_what_would_clip_wrong_gradients_is_refused(tmp_path, source, options, message):
    config = crashes.write_config(tmp_path / "run.yaml", source)
    ended = command_line(config, "--trainer.devices", "2", *options)
    assert ended.returncode == 2
    assert message in ended.stderr
