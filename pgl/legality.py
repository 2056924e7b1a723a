"""Is a run's score one that the challenge would count? Judged from what the run did.

The conditions, and the tests behind them, are in docs/legality.md.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pgl.challenge import (
    ARTIFACT_LIMIT_BYTES,
    CHALLENGE_TEXT,
    EVALUATION_LIMIT_SECONDS,
    TRAINING_LIMIT_SECONDS,
)


@dataclass(frozen=True)
class Condition:
    """One condition on a run."""

    condition: str
    holds: bool | None
    """None: the run cannot tell."""
    evidence: str
    """What the run did, in numbers."""


@dataclass(frozen=True)
class Evidence:
    """What a run did, as far as the rules care; the parts come from the run's report."""

    data: dict[str, Any]
    """Names, counts and hashes of the data."""
    trained_tokens: int
    """Tokens of all optimizer steps."""
    steps: int
    """Optimizer steps."""
    calibration: dict[str, Any] | None
    """What was read to calibrate GPTQ, and whether the clock counted it; None: nothing was."""
    budget: dict[str, Any]
    """Limits and phases of the clock."""
    artifact: dict[str, Any]
    """Size of the artifact; empty without one."""
    score: dict[str, Any] | None
    """The last score; None if nothing was scored."""
    probes: dict[str, Any] | None
    """What :func:`pgl.evaluate.probe` found."""
    ttt: dict[str, Any]
    """What test-time training did; empty if it was off."""
    device: str
    """Number and type of the devices."""


def judge(evidence: Evidence) -> dict[str, Any]:
    """Return the verdict, its reasons and every condition, as plain values.

    ``legal`` is True if every condition holds and False if one is broken; ``reasons`` are the
    broken ones. It is None if none is broken and the run cannot tell of some (``holds`` is None),
    which ``not_judged`` lists.
    """
    conditions = [
        _training_tokens(evidence),
        _calibration(evidence),
        _clock(evidence),
        _evaluation_clock(evidence),
        _size(evidence),
        _text(evidence),
        _whole_split(evidence),
        _each_target_once(evidence),
        _causal(evidence),
        _normalised(evidence),
        _score_before_update(evidence),
    ]
    broken = [condition for condition in conditions if condition.holds is False]
    not_judged = [condition.condition for condition in conditions if condition.holds is None]
    return {
        "legal": False if broken else None if not_judged else True,
        "verdict": "not legal" if broken else verdict_without_breach(not_judged),
        "reasons": [f"{condition.condition}: {condition.evidence}" for condition in broken],
        "not_judged": not_judged,
        "conditions": [asdict(condition) for condition in conditions],
    }


def final_score(scores: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a report's last score that is legal, the one that the run is known by.

    Args:
        scores: Scores of a report, in order; one that does not say is legal.
    """
    return next((score for score in reversed(scores) if score.get("legal", True)), None)


def verdict_without_breach(not_judged: Sequence[str]) -> str:
    """Return the verdict on a run that broke no condition.

    Args:
        not_judged: The conditions that it cannot tell of.
    """
    return f"not judged: {'; '.join(not_judged)}" if not_judged else "legal"


def legality_lines(legality: dict[str, Any]) -> list[str]:
    """Return the section of the Markdown report."""
    words = {True: "yes", False: "**no**", None: "not judged"}
    lines = ["## Legality", "", f"The score is **{legality['verdict']}**.", ""]
    lines += ["| condition | holds | what the run did |", "|---|---|---|"]
    lines += [
        f"| {row['condition']} | {words[row['holds']]} | {row['evidence']} |"
        for row in legality["conditions"]
    ]
    return [*lines, ""]


def legality_line(legality: dict[str, Any]) -> str:
    """Return the line that a run prints."""
    if legality["legal"] is not False:
        return legality["verdict"]
    return f"NOT LEGAL ({'; '.join(legality['reasons'])})"


def _training_tokens(evidence: Evidence) -> Condition:
    train, val = evidence.data["train_shards"], evidence.data["val_shards"]
    shared = sorted(name for name, sha256 in train.items() if sha256 in val.values())
    text = f"{evidence.trained_tokens:,} tokens of {len(train)} training shard(s), none of which "
    text += f"has the SHA-256 of one of the {len(val)} validation shard(s)"
    if shared:
        text = f"{', '.join(shared)} hold(s) validation text and was trained on"
    return Condition("no training shard is a validation shard", not shared, text)


def _calibration(evidence: Evidence) -> Condition:
    name, calibration = "no training token is read after the budget", evidence.calibration
    if calibration is None:
        return Condition(name, True, "nothing is calibrated")
    if calibration["read"] == "samples":
        return Condition(name, True, "GPTQ on text that the model wrote")
    when = "while the clock ran" if calibration["counted"] else "after the clock had stopped"
    return Condition(name, calibration["counted"], f"GPTQ on {calibration['read']}, {when}")


def _clock(evidence: Evidence) -> Condition:
    name, budget = "training takes at most 600 s on 8 H100", evidence.budget
    phases = {name: phase for name, phase in budget["phases"].items() if phase["counts"]}
    seconds, in_time = budget["counted_seconds"], budget["budget_seconds"] is not None
    text = f"{seconds:.1f} s of {' and '.join(phases) or 'nothing'} count, on {evidence.device}"
    if not in_time:
        text += f"; the budget was {budget['budget_steps']:,} steps, not a time"
    # Training ends with a whole step, so the last one may end past the limit.
    train_seconds = phases.get("train", {"seconds": 0.0})["seconds"]
    if seconds > TRAINING_LIMIT_SECONDS + train_seconds / max(evidence.steps, 1):
        return Condition(name, False, text)
    return Condition(name, True if in_time and _on_8_h100(evidence) else None, text)


def _evaluation_clock(evidence: Evidence) -> Condition:
    name, phases = "evaluation takes at most 600 s on 8 H100", evidence.budget["phases"]
    score = evidence.score
    scoring = None if score is None else phases.get(f"score {score['weights']} {score['windows']}")
    if scoring is None:
        return Condition(name, None, "the last score was not timed")
    reading = phases.get("read back", {"seconds": 0.0})["seconds"]
    seconds = reading + scoring["seconds"]
    text = f"{reading:.1f} s of reading the artifact, {scoring['seconds']:.1f} s of the last score"
    text += f", on {evidence.device}"
    if not _on_8_h100(evidence):
        return Condition(name, None, text)
    return Condition(name, seconds <= EVALUATION_LIMIT_SECONDS, text)


def _on_8_h100(evidence: Evidence) -> bool:
    return evidence.device.startswith("8 x ") and "H100" in evidence.device


def _size(evidence: Evidence) -> Condition:
    total = evidence.artifact.get("total_bytes")
    holds = None if total is None else total <= ARTIFACT_LIMIT_BYTES
    text = "no artifact" if total is None else f"{total:,} of {ARTIFACT_LIMIT_BYTES:,} bytes"
    return Condition("the artifact, code included, fits", holds, text)


def _text(evidence: Evidence) -> Condition:
    source = evidence.data["source"]
    holds = True if source.startswith(CHALLENGE_TEXT) else None
    return Condition("the text is the challenge's", holds, f"the data call themselves {source}")


def _whole_split(evidence: Evidence) -> Condition:
    used, there = evidence.data["val_targets"], evidence.data["val_split_targets"]
    text = f"{used:,} of the {there:,} targets of the validation split were to be scored"
    return Condition("the whole split is scored", used == there, text)


def _each_target_once(evidence: Evidence) -> Condition:
    name, score = "each target is scored once", evidence.score
    if score is None or score["repeated"] is None:
        return Condition(name, None, "the targets of the last score were not counted")
    text = f"{score['tokens']:,} scores of {evidence.data['val_targets']:,} targets, "
    text += f"{score['repeated']:,} repeated, {score['missed']:,} missed"
    return Condition(name, not score["repeated"] and not score["missed"], text)


def _causal(evidence: Evidence) -> Condition:
    name, probes = "a score depends on earlier tokens only", evidence.probes
    if probes is None:
        return Condition(name, None, "not probed")
    text = f"in a window {_change(probes['window'])}"
    if probes["scored"] is not None:
        text += f"; in a batch as it is scored {_change(probes['scored'])}"
    return Condition(name, probes["causal"], text)


def _change(change: dict[str, Any]) -> str:
    return (
        f"reading other tokens from position {change['first']:,} on changed earlier scores by at "
        f"most {change['before']:.1e} nats and later ones by up to {change['after']:.1e}"
    )


def _normalised(evidence: Evidence) -> Condition:
    name, probes = "probabilities of all tokens sum to 1", evidence.probes
    if probes is None:
        return Condition(name, None, "not probed")
    text = f"off by at most {probes['probability_error']:.1e}"
    return Condition(name, probes["normalised"], text)


def _score_before_update(evidence: Evidence) -> Condition:
    name, ttt = "a target is scored before weights are trained on it", evidence.ttt
    if not ttt:
        return Condition(name, True, "no test-time training")
    trained = f"{ttt['trained_targets']:,} targets of the validation text were trained on"
    if ttt["method"] == "full":
        return Condition(name, False, f"{trained} before any was scored (ttt.method full)")
    text = f"{trained}, each after it was scored, in {ttt['chunks']:,} chunks"
    if not ttt["scored_first"]:
        text = f"{trained}, some before they were scored"
    return Condition(name, ttt["scored_first"], text)
