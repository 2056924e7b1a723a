"""Processes, with a stand-in for `pgl fit` that takes milliseconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pgl.ablation import Trial, runner
from pgl.ablation.runner import Runner, check_records, command, jobs, locked, shared_record

REPORT = {"scores": [{"bpb": 1.25}]}

# What the stand-in does in its folder; argv: folder, behaviour.
STAND_IN = f"""
import json, os, pathlib, signal, sys, time
folder, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
with open(folder / "starts", "a") as file:
    file.write("x")
if behaviour == "fail":
    print("first line")
    sys.exit("it broke")
if behaviour == "silent":
    sys.exit(0)
if behaviour == "wait":
    def stop(*_):
        (folder / "last.ckpt").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
time.sleep(0.3)
(folder / "report.json").write_text('{json.dumps(REPORT)}')
"""


def test_an_illegal_score_is_not_the_runs(tmp_path):
    (job,) = jobs([Trial("one", (), {})], [1], tmp_path)
    job.folder.mkdir(parents=True)
    illegal = {"bpb": 0.5, "legal": False}
    for scores, text in (
        ([{"bpb": 1.25, "legal": True}, illegal], "1.250000 BPB"),
        ([illegal], "no score"),
    ):
        (job.folder / "report.json").write_text(json.dumps({"scores": scores}))
        assert runner._bpb(job) == text


@pytest.fixture
def trials(monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(
        runner,
        "command",
        lambda job, options: [
            *(sys.executable, "-c", STAND_IN, str(job.folder), *job.trial.options)
        ],
    )
    return lambda *behaviours: [Trial(f"{b}_{i}", (b,), {}) for i, b in enumerate(behaviours)]


def run(planned, out, devices=(None,), record=None):
    said = []
    with locked(out) as lock:
        started = Runner([], record or {}, devices, lock, said.append)
        failures = started.run(planned)
    return failures, said


def test_every_job_runs_once_and_what_is_finished_is_skipped(trials, tmp_path):
    planned = jobs(trials("work", "work"), [1, 2], tmp_path)
    assert [(job.trial.name, job.seed) for job in planned] == [
        ("work_0", 1),
        ("work_1", 1),
        ("work_0", 2),
        ("work_1", 2),
    ]
    (tmp_path / "work_0" / "version_2").mkdir(parents=True)
    (tmp_path / "work_0" / "version_2" / "report.json").write_text(json.dumps(REPORT))
    failures, said = run(planned, tmp_path)
    assert failures == []
    assert said[0] == "4 runs: 1 finished before"
    assert sum("1.250000 BPB" in line for line in said) == 3
    assert not (tmp_path / "work_0" / "version_2" / "starts").exists()
    assert (tmp_path / "work_1" / "version_2" / "starts").read_text() == "x"
    failures, said = run(planned, tmp_path)
    assert said == ["4 runs: 4 finished before"]


def test_a_failure_is_recorded_and_the_others_go_on(trials, tmp_path):
    planned = jobs(trials("fail", "silent", "work"), [1], tmp_path)
    failures, _ = run(planned, tmp_path)
    assert [(failure.job.trial.name, failure.reason) for failure in failures] == [
        ("fail_0", "exit status 1: it broke"),
        ("silent_1", "no report.json was written: no output"),
    ]
    assert (planned[2].folder / "report.json").exists()
    # The next call tries again.
    run(planned, tmp_path)
    assert (planned[0].folder / "starts").read_text() == "xx"
    assert (planned[2].folder / "starts").read_text() == "x"


def test_each_gpu_has_one_trial_at_a_time(trials, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    planned = jobs(trials("work", "work", "work"), [1, 2], tmp_path)
    busy, most = set(), 0

    class Watched(Runner):
        def _start(self, job):
            nonlocal most
            before = set(self.running)
            super()._start(job)
            (process,) = set(self.running) - before
            device = self.running[process][1]
            assert device not in {self.running[other][1] for other in before}
            busy.add(device)
            most = max(most, len(self.running))

    with locked(tmp_path) as lock:
        Watched([], {}, ["0", "1"], lock, print).run(planned)
    assert busy == {"0", "1"}
    assert most == 2
    assert {(job.folder / "gpu").read_text() for job in planned} == {"0", "1"}


def test_without_gpus_the_environment_is_left_alone(trials, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    planned = jobs(trials("work"), [1], tmp_path)
    run(planned, tmp_path)
    assert (planned[0].folder / "gpu").read_text() == "3,5"


def test_an_interruption_lets_trials_save_and_is_passed_on(trials, tmp_path):
    planned = jobs(trials("wait"), [1], tmp_path)
    ready = planned[0].folder / "ready"

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(planned, tmp_path)
    thread.join()
    assert (planned[0].folder / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_command_names_the_folder_and_goes_on_from_a_checkpoint(tmp_path):
    (job,) = jobs([Trial("no_xsa", ("--model.gpt.xsa_last_layers", "0"), {})], [7], tmp_path)
    words = command(job, ["--config", "a.yaml"])
    assert words[1:6] == ["-m", "pgl", "fit", "--config", "a.yaml"]
    assert words[6:8] == ["--model.gpt.xsa_last_layers", "0"]
    assert words[8:] == [
        "--seed_everything=7",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.logger.init_args.name=no_xsa",
        "--trainer.logger.init_args.version=7",
    ]
    job.folder.mkdir(parents=True)
    (job.folder / "last.ckpt").touch()
    assert command(job, [])[-1] == f"--ckpt_path={job.folder}/last.ckpt"


def test_runs_of_another_recipe_are_not_mixed_in(trials, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("x: 1")
    planned = jobs(trials("work"), [1], tmp_path / "out")
    record = shared_record(["--budget.steps", "3"], [str(config)])
    run(planned, tmp_path / "out", record=record)
    check_records(planned, record)
    config.write_text("x: 2")
    with pytest.raises(ValueError, match="was run with other settings"):
        check_records(planned, shared_record(["--budget.steps", "3"], [str(config)]))
    with pytest.raises(ValueError, match="was run with other settings"):
        check_records(planned, {**record, "options": ["--budget.steps", "4"]})


def test_a_folder_has_one_ablation_at_a_time(tmp_path):
    message = "another pgl ablate, or a trial of one that was killed"
    with locked(tmp_path) as lock:
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with locked(tmp_path):
        pass
