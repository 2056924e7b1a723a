"""Runs trials as processes of their own and takes up what an earlier call left."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl.ablation.trials import Trial
from pgl.io import atomic_write
from pgl.legality import final_score
from pgl.reporting.read import CHECKPOINT, REPORT

LOG, RECORD, LOCK = "log.txt", "trial.json", ".lock"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A trial with one seed."""

    trial: Trial
    seed: int
    folder: Path
    """The run's folder: ``OUT/TRIAL/version_SEED``."""

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.trial.name}, seed {self.seed}"


@dataclass(frozen=True)
class Failure:
    """A trial that did not come to its end."""

    job: Job
    reason: str


def jobs(trials: Sequence[Trial], seeds: Sequence[int], out: Path) -> list[Job]:
    """Return every trial with every seed; all trials of the first seed come first."""
    return [
        Job(trial, seed, out / trial.name / f"version_{seed}") for seed in seeds for trial in trials
    ]


def command(job: Job, options: Sequence[str]) -> list[str]:
    """Return the command line of a job; it goes on from the job's checkpoint if there is one.

    Args:
        job: The trial and its seed.
        options: Options of ``pgl fit`` that all trials share.
    """
    out = job.folder.parent.parent
    logger = "--trainer.logger.init_args"
    arguments = [*options, *job.trial.options]
    arguments += [f"--seed_everything={job.seed}", f"{logger}.save_dir={out}"]
    arguments += [f"{logger}.name={job.trial.name}", f"{logger}.version={job.seed}"]
    checkpoint = job.folder / CHECKPOINT
    if checkpoint.is_file():
        arguments.append(f"--ckpt_path={checkpoint}")
    return [sys.executable, "-m", "pgl", "fit", *arguments]


def check_records(jobs: Sequence[Job], record: dict[str, Any]) -> None:
    """Refuse to mix runs that were made with other settings.

    Args:
        jobs: What is to be run.
        record: What all of them share, see :func:`shared_record`.

    Raises:
        ValueError: If a folder holds a run of another recipe.
    """
    for job in jobs:
        path = job.folder / RECORD
        if path.is_file() and json.loads(path.read_text()) != _record(job, record):
            raise ValueError(
                f"{job.folder} was run with other settings (see {RECORD} there): choose another "
                "--out, or remove that folder"
            )


def shared_record(options: Sequence[str], configs: Sequence[str]) -> dict[str, Any]:
    """Return what identifies the recipe: its options, and hashes of its configuration files.

    Raises:
        OSError: If a configuration file cannot be read.
    """
    hashes = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in configs}
    return {"options": list(options), "configs": hashes}


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold a folder for one ablation, until it and every trial that inherits the lock has ended.

    Raises:
        ValueError: If another ablation, or a trial that outlived one, is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another pgl ablate, or a trial of one that was killed, is running in {out}: wait "
                "for it, or choose another --out"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Runs jobs on a number of slots, each with its own GPU or without a choice of devices.

    Args:
        options: Options of ``pgl fit`` that all jobs share.
        record: What the folders of the jobs remember of them.
        devices: CUDA_VISIBLE_DEVICES of each slot; ``[None]`` is one slot that leaves it alone.
        lock: Descriptor that the trials inherit.
        say: Prints a line of progress.
    """

    def __init__(
        self,
        options: Sequence[str],
        record: dict[str, Any],
        devices: Sequence[str | None],
        lock: int,
        say: Callable[[str], None],
    ) -> None:
        self.options = options
        self.record = record
        self.free = list(devices)
        self.lock = lock
        self.say = say
        self.running: dict[subprocess.Popen[bytes], tuple[Job, str | None, float]] = {}
        self.failures: list[Failure] = []

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Run what is not finished yet; return what failed.

        On SIGTERM or Ctrl-C every running trial is asked to save and end, once; the same call of
        ``pgl ablate`` takes them up again.

        Raises:
            KeyboardInterrupt: After SIGTERM or Ctrl-C, when all trials have ended.
        """
        waiting = [job for job in jobs if not (job.folder / REPORT).is_file()]
        self.say(f"{len(jobs)} runs: {len(jobs) - len(waiting)} finished before")
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or self.running:
                while waiting and self.free:
                    self._start(waiting.pop(0))
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, previous)
        return self.failures

    def _start(self, job: Job) -> None:
        device = self.free.pop(0)
        job.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(job.folder / RECORD) as file:
            file.write(json.dumps(_record(job, self.record), indent=2).encode())
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        arguments = command(job, self.options)
        resumed = " from last.ckpt" if arguments[-1].startswith("--ckpt_path") else ""
        on = "" if device is None else f" on GPU {device}"
        self.say(f"start  {job.label}{on}{resumed}; output in {job.folder / LOG}")
        with open(job.folder / LOG, "ab") as log:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(self.lock,),
                # Ctrl-C reaches this process alone, which passes it on once: a second one would
                # cut short the saving of the checkpoint.
                start_new_session=True,
            )
        self.running[process] = (job, device, time.monotonic())

    def _collect(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            job, device, since = self.running.pop(process)
            self.free.append(device)
            minutes = (time.monotonic() - since) / 60
            reason = _failure(job, process.returncode)
            if reason is None:
                self.say(f"done   {job.label}: {_bpb(job)}, {minutes:.1f} min")
            else:
                self.failures.append(Failure(job, reason))
                self.say(f"FAILED {job.label}: {reason}")

    def _stop(self) -> None:
        """Ask what still runs to save and end, and wait for it."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process, (job, _, _) in self.running.items():
            process.wait()
            self.say(f"ended  {job.label} before its end")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _record(job: Job, shared: dict[str, Any]) -> dict[str, Any]:
    return {**shared, "trial": list(job.trial.options), "seed": job.seed}


def _failure(job: Job, status: int) -> str | None:
    if status == 0 and (job.folder / REPORT).is_file():
        return None
    lines = (job.folder / LOG).read_text(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else "no output"
    ended = f"exit status {status}" if status else f"no {REPORT} was written"
    return f"{ended}: {last}"


def _bpb(job: Job) -> str:
    score = final_score(json.loads((job.folder / REPORT).read_text())["scores"])
    return "no score" if score is None else f"{score['bpb']:.6f} BPB"
