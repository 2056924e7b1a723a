"""Is a run's score one that the challenge would count? Judged from what the run did.

The conditions, and the tests behind them, are in docs/legality.md.
"""

from dataclasses import asdict, dataclass
from typing import Any

ARTIFACT_LIMIT_BYTES = 16_000_000


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
    calibration: str | None
    """What GPTQ was calibrated on: training, samples, training_after_budget; None: nothing."""
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

    ``legal`` is False if a condition is broken; ``reasons`` are the broken ones. A condition that
    the run cannot tell (``holds`` is None) breaks nothing, and is listed in ``not_judged``.
    """
    conditions = [
        _training_tokens(evidence),
        _calibration(evidence),
        _clock(evidence),
        _size(evidence),
        _each_target_once(evidence),
        _causal(evidence),
        _normalised(evidence),
        _score_before_update(evidence),
    ]
    broken = [condition for condition in conditions if condition.holds is False]
    return {
        "legal": not broken,
        "verdict": "not legal" if broken else "legal",
        "reasons": [f"{condition.condition}: {condition.evidence}" for condition in broken],
        "not_judged": [c.condition for c in conditions if c.holds is None],
        "conditions": [asdict(condition) for condition in conditions],
    }


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
    if legality["legal"]:
        return "legal"
    return f"NOT LEGAL ({'; '.join(legality['reasons'])})"


def _training_tokens(evidence: Evidence) -> Condition:
    train, val = evidence.data["train_shards"], evidence.data["val_shards"]
    shared = sorted(name for name, sha256 in train.items() if sha256 in val.values())
    text = f"{evidence.trained_tokens:,} tokens of {len(train)} training shard(s), none of which "
    text += f"is one of the {len(val)} validation shard(s)"
    if shared:
        text = f"{', '.join(shared)} hold(s) validation text and was trained on"
    return Condition("no validation token is trained on", not shared, text)


def _calibration(evidence: Evidence) -> Condition:
    known = {
        None: (True, "nothing is calibrated"),
        "training": (True, "GPTQ on training tokens, while the clock ran"),
        "samples": (True, "GPTQ on text that the model wrote"),
        "training_after_budget": (False, "GPTQ on training tokens after the clock had stopped"),
    }
    holds, text = known.get(evidence.calibration, (None, f"GPTQ on {evidence.calibration}"))
    return Condition("no training token is read after the budget", holds, text)


def _clock(evidence: Evidence) -> Condition:
    budget = evidence.budget
    counted = [name for name, phase in budget["phases"].items() if phase["counts"]]
    text = f"{budget['counted_seconds']:.1f} s of {' and '.join(counted) or 'nothing'} count"
    if budget["budget_seconds"] is None:
        text += f"; the budget was {budget['budget_steps']:,} steps, not a time"
    else:
        text += f" against {budget['budget_seconds']:.1f} s"
    text += f", on {evidence.device} (the challenge: 600 s on 8 H100)"
    return Condition("training stays within its time", budget["within_budget"], text)


def _size(evidence: Evidence) -> Condition:
    total = evidence.artifact.get("total_bytes")
    holds = None if total is None else total <= ARTIFACT_LIMIT_BYTES
    text = "no artifact" if total is None else f"{total:,} of {ARTIFACT_LIMIT_BYTES:,} bytes"
    return Condition("the artifact, code included, fits", holds, text)


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
    text = (
        f"other tokens from {probes['changed_from']:,} on changed earlier scores by at most "
        f"{probes['change_before']:.1e} nats and later ones by up to {probes['change_after']:.1e}"
    )
    return Condition(name, probes["causal"], text)


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
