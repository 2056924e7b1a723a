"""A run that dies at any moment goes on from last.ckpt to the same result, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import crashes
from runs import TIME_LIMIT_SECONDS, exit_codes, in_ranks, start

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tiny_corpus: Shards) -> tuple[str, str]:
    return str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source) -> dict[str, Any]:
    """What the run comes to if nothing interrupts it."""
    config = crashes.write_config(tmp_path_factory.mktemp("whole") / "run.yaml", source)
    assert run(config) == 0
    outcome = crashes.outcome(config)
    assert outcome["step"] == crashes.STEPS
    assert len(outcome["scores"]) == 4
    return outcome


@pytest.fixture
def config(tmp_path, source) -> Path:
    return crashes.write_config(tmp_path / "run.yaml", source)


def run(config: Path, *moment: Any) -> int | None:
    """Run the command line in a process of its own, resuming if it can; return its exit status."""
    return exit_codes([start(crashes.run, config, *moment)])[0]


def saved_step(config: Path) -> int:
    path = config.parent / config.stem / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (("in_step", 3, signal.SIGKILL), 2),
        pytest.param(("in_step", 5, signal.SIGKILL), 4, marks=pytest.mark.slow),
        # The run's second checkpoint, of step 4, does not come to be.
        (("in_write", 2), 2),
        (("in_quantising",), 8),
        pytest.param(("before_reading_back",), 8, marks=pytest.mark.slow),
        (("in_scoring",), 8),
        # After the checkpoint of the last step, before that of the end of training.
        (("at_phase", "checkpointing", 5), 8),
    ],
    ids=["step 3", "step 5", "half a checkpoint", "quantising", "read back", "scoring", "end"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(config, whole, moment, step):
    assert run(config, *moment) == -signal.SIGKILL
    assert saved_step(config) == step
    assert run(config) == 0
    assert crashes.outcome(config) == whole


def test_a_file_without_its_name_is_not_taken_for_the_checkpoint(config, whole):
    # The second file that a run writes is last.ckpt of step 4.
    assert run(config, "before_rename", 2) == -signal.SIGKILL
    folder = config.parent / config.stem
    complete = [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert [torch.load(path, weights_only=True)["global_step"] for path in complete] == [4]
    assert saved_step(config) == 2
    assert run(config) == 0
    assert crashes.outcome(config) == whole


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_saves_after_the_step_and_ends_the_run(tmp_path, source, whole, signum, status):
    config = crashes.write_config(tmp_path / "run.yaml", source, every=1000)
    assert run(config, "in_step", 4, signum) == status
    assert saved_step(config) == 5
    assert not (tmp_path / "run" / "model.pgl").exists()
    assert run(config) == 0
    assert crashes.outcome(config) == whole


def test_a_second_ctrl_c_does_not_wait_for_the_step(config):
    assert run(config, "in_step", 4, signal.SIGINT, signal.SIGINT) == 1
    assert saved_step(config) == 4


def test_sigterm_while_scoring_ends_the_run_at_once(config, whole):
    assert run(config, "in_scoring", signal.SIGTERM) == 143
    assert not (config.parent / config.stem / "report.json").exists()
    assert run(config) == 0
    assert crashes.outcome(config) == whole


def test_kill_minus_nine_from_outside(tmp_path, source):
    steps = 40
    expected = crashes.write_config(tmp_path / "expected.yaml", source, steps)
    config = crashes.write_config(tmp_path / "killed.yaml", source, steps)
    process = subprocess.Popen(
        [sys.executable, "-m", "pgl", *crashes.arguments(config)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        assert run(expected) == 0
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not (tmp_path / "killed" / "last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= saved_step(config) < steps
    assert run(config) == 0
    assert crashes.outcome(config) == crashes.outcome(expected)


KILLS = {1: 5, 2: 5}
"""Rounds of kills, one in each phase of a run, by the number of processes."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", KILLS)
def test_random_kills_in_every_phase(tmp_path, source, processes):
    def config_of(name: str) -> Path:
        return crashes.write_config(
            tmp_path / f"{name}.yaml",
            source,
            trainer=trainer_section(tmp_path / name, processes),
            artifact={
                "quant": {"mlp": {"method": "gptq"}, "attention": {"method": "gptq"}},
                "calibration_sequences": 8,
            },
            validation={"stride_tokens": 8, "every_n_steps": 3},
            ranks={"timeout_seconds": 30.0},
        )

    def attempt(config: Path, rank: int | None, *moment: Any) -> list[int | None]:
        return in_ranks(processes, crashes.run_killed, config, rank, *moment)

    whole = config_of("whole")
    assert attempt(whole, None, "training", 0, 0.0) == [0] * processes
    expected = crashes.outcome(whole)
    dice, killed = random.Random(processes), dict.fromkeys(crashes.PHASES, 0)
    for number in range(KILLS[processes]):
        config = config_of(f"run{number}")
        # In the order in which a run comes to them; the last three come again in each attempt.
        for phase in crashes.PHASES:
            entry = dice.randint(1, 10) if phase == "training" else 1
            rank = 0 if phase == "packing" else dice.randrange(processes)
            codes = attempt(config, rank, phase, entry, dice.uniform(0, 0.02))
            assert None not in codes, f"a process hangs after a kill in {phase}"
            killed[phase] += codes[rank] == -signal.SIGKILL
        assert attempt(config, None, "training", 0, 0.0) == [0] * processes
        assert crashes.outcome(config) == expected
        assert not list((tmp_path / f"run{number}").glob(".*.tmp"))
    assert sum(killed.values()) >= 5 * KILLS[processes], killed


def trainer_section(folder: Path, processes: int) -> dict[str, Any]:
    logger = {"save_dir": str(folder), "name": "", "version": "", "default_hp_metric": False}
    return {
        "accelerator": "cpu",
        "devices": processes,
        "strategy": "ddp" if processes > 1 else "auto",
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": logger,
        },
    }
