"""Runs as they lie on disk: folders with a report, and folders of runs that never wrote one."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pgl.legality import final_score, verdict_without_breach

REPORT, CONFIG, CHECKPOINT = "report.json", "config.yaml", "last.ckpt"
EVENTS = "events.out.tfevents."


@dataclass(frozen=True)
class Result:
    """What a finished run reported."""

    stages: dict[str, float]
    """Bits per byte of each score by its kind ("quantised, sliding"), in the order of scoring."""
    kind: str | None
    """Kind of the run's score: the last one whose weights had not seen the text before."""
    bpb: float | None
    """Bits per byte of that score; None if there is none."""
    nats: float | None
    """Nats per token."""
    total_bytes: int | None
    """Length of the artifact; None if none was written."""
    limit_bytes: int | None
    """Length that it was allowed."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens trained on."""
    train_seconds: float
    """Seconds of training, as the run's budget counts them."""
    total_seconds: float
    """Seconds of all phases together: compilation, training, validation, export, scoring."""
    tokens_per_second: float
    """Training speed."""
    device: str
    """Number and type of the devices."""
    legality: str | None
    """Verdict on the run; None if the report holds none."""
    reasons: list[str]
    """Conditions that the run broke."""


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path
    """Where it lies."""
    name: str
    """Recipe: the folder above ``version_N``, or the folder itself."""
    settings: dict[str, Any]
    """The resolved configuration, empty if the folder has no ``config.yaml``."""
    result: Result | None
    """What it reported; None if it never came to its end."""

    @property
    def seed(self) -> int | None:
        """Seed of the run, if its configuration was kept."""
        seed = self.settings.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.folder / CHECKPOINT).is_file()


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read every run at or below ``paths``, each once, in the order of its folder's name.

    Args:
        paths: Run folders, their ``report.json``, or folders that hold runs at any depth.

    Raises:
        ValueError: If a path does not exist, holds no run, or holds a file that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        found = list(_run_folders(path))
        if not found:
            raise ValueError(
                f"{path} holds no run: name folders with a {REPORT} or {CONFIG}, or folders of them"
            )
        folders |= {folder.resolve(): folder for folder in found}
    return [read_run(folder) for folder in sorted(folders.values(), key=_natural_order)]


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises:
        ValueError: If its report or configuration is not one of pgl's.
    """
    name = folder.resolve().name
    if name.startswith("version_"):
        name = folder.resolve().parent.name
    settings = _settings(folder / CONFIG)
    path = folder / REPORT
    if not path.is_file():
        return Run(folder, name, settings, None)
    try:
        report = json.loads(path.read_text())
        return Run(folder, str(report["name"]), settings, _result(report))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is not a run's report ({problem}): leave this folder out"
        ) from error


def holds_run(folder: Path) -> bool:
    """Whether a run has left anything in a folder."""
    return folder.is_dir() and _holds_run(file.name for file in folder.iterdir())


def _run_folders(path: Path) -> Iterator[Path]:
    if path.name == REPORT and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: name the folders of runs")
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if _holds_run(files):
            subfolders.clear()  # what lies in a run's folder belongs to the run
            yield Path(folder)


def _holds_run(files: Iterable[str]) -> bool:
    return any(name in (REPORT, CONFIG, CHECKPOINT) or name.startswith(EVENTS) for name in files)


def _natural_order(folder: Path) -> tuple[Any, ...]:
    stem, _, number = folder.name.rpartition("_")
    return (str(folder.parent), stem, int(number) if number.isdecimal() else 0, folder.name)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: leave this folder out") from error
    return settings if isinstance(settings, dict) else {}


def _result(report: dict[str, Any]) -> Result:
    training, artifact = report["training"], report["artifact"] or {}
    scores, legality = report["scores"], report.get("legality") or {}
    final = final_score(scores)
    phases = report["budget"]["phases"].values()
    return Result(
        stages={_kind(score): float(score["bpb"]) for score in scores},
        kind=None if final is None else _kind(final),
        bpb=None if final is None else float(final["bpb"]),
        nats=None if final is None else float(final["loss"]),
        total_bytes=artifact.get("total_bytes"),
        limit_bytes=artifact.get("limit_bytes"),
        steps=int(training["steps"]),
        tokens=int(training["tokens"]),
        train_seconds=float(training["seconds"]),
        total_seconds=sum(float(phase["seconds"]) for phase in phases),
        tokens_per_second=float(training["tokens_per_second"]),
        device=str(report["environment"]["device"]),
        legality=_verdict(legality),
        reasons=list(legality.get("reasons", [])),
    )


def _verdict(legality: dict[str, Any]) -> str | None:
    verdict, not_judged = legality.get("verdict"), legality.get("not_judged")
    # Reports of earlier versions called a run legal whatever was not judged.
    return verdict_without_breach(not_judged) if verdict == "legal" and not_judged else verdict


def _kind(score: dict[str, Any]) -> str:
    return f"{score['weights']}, {score['windows']}"
