"""The report of a run, as plain values and as Markdown."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pgl
from pgl.legality import final_score, legality_line, legality_lines

PACKAGES = ("torch", "lightning", "torchmetrics", "sentencepiece", "zstandard", "numpy")


def environment(device_type: str, world_size: int) -> dict[str, Any]:
    """Return versions, hardware and the git revision of pgl's checkout, if it is one.

    The revision ends in ``-dirty`` if the checkout has changes that are not committed.

    Args:
        device_type: Type of the device that the run used, such as "cpu" or "cuda".
        world_size: Number of processes, each with one device.
    """
    return {
        "pgl": pgl.__version__,
        "git_revision": _git_revision(Path(pgl.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": f"{world_size} x {_device(device_type)}",
        "cpu_threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return a report as Markdown: scores, phases, size, techniques, data, environment."""
    training, data = report["training"], report["data"]
    lines = [
        f"# Run report: {report['name']}",
        "",
        f"{training['steps']:,} steps of {training['batch_tokens']:,} tokens "
        f"({training['tokens'] / 1e6:.2f} M) in {training['seconds']:.1f} s of training, "
        f"{training['tokens_per_second']:,.0f} tokens/s, {training['devices']} device(s).",
        "",
        "## Scores",
        "",
        "| weights | windows | bits per byte | nats per token | targets | bytes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {score['weights']} | {score['windows']} | {score['bpb']:.6f} | {score['loss']:.6f} | "
        f"{score['tokens']:,} | {score['bytes']:,} |"
        for score in report["scores"]
    ]
    lines += ["", *_compared_with_xz(report)]
    lines += legality_lines(report["legality"]) if "legality" in report else []
    lines += ["## Phases", ""]
    lines += ["| phase | seconds | counts as training |", "|---|---|---|"]
    lines += [
        f"| {name} | {phase['seconds']:.2f} | {'yes' if phase['counts'] else 'no'} |"
        for name, phase in report["budget"]["phases"].items()
    ]
    lines += ["", *_within_budget(report), *_replicas(report), *_size(report), "## Techniques", ""]
    lines += ["| technique | setting | acted |", "|---|---|---|"]
    lines += [
        f"| {row['technique']} | {row['setting']} | {row['acted']} |"
        for row in report["techniques"]
    ]
    lines += ["", "## Data", ""]
    lines += [f"- {key}: {_short(value)}" for key, value in data.items()]
    lines += ["", "## Environment", ""]
    lines += [f"- {key}: {_short(value)}" for key, value in report["environment"].items()]
    return "\n".join(lines) + "\n"


def summary(report: dict[str, Any]) -> str:
    """Return the few lines that a run prints when it ends."""
    lines = [""]
    for score in report["scores"]:
        lines.append(f"  {score['weights']:<10} {score['windows']:<8} {score['bpb']:.6f} bits/byte")
    lines += ["", *(f"  {line}" for line in _compared_with_xz(report) if line)]
    lines += [f"  {line}" for line in _within_budget(report) if line]
    artifact = report["artifact"]
    if artifact:
        limit = artifact["limit_bytes"]
        of_limit = f" of {limit:,}" if limit else ""
        lines.append(f"  artifact   {artifact['total_bytes']:,}{of_limit} bytes")
    lines += [f"  {line}" for line in [*_lost(report), *_replicas(report)]]
    if "legality" in report:
        lines.append(f"  score      {legality_line(report['legality'])}")
    return "\n".join(lines)


def _compared_with_xz(report: dict[str, Any]) -> list[str]:
    xz, score = report["data"].get("val_xz_bits_per_byte"), final_score(report["scores"])
    if xz is None or score is None:
        return []
    final = score["bpb"]
    verdict = "below" if final < xz else "NOT below"
    return [f"{final:.4f} is {verdict} the {xz:.4f} bits per byte of xz -9e on the same text.", ""]


def _within_budget(report: dict[str, Any]) -> list[str]:
    budget = report["budget"]
    if budget.get("within_budget") is None:
        return []
    verdict = "OVER budget"
    if budget["within_budget"]:
        past = budget["counted_seconds"] > budget["budget_seconds"]
        verdict = "within budget" + (" but for its last step" if past else "")
    return [
        f"{budget['counted_seconds']:.1f} s count against the budget of "
        f"{budget['budget_seconds']:.1f} s: {verdict}.",
        "",
    ]


def quantisation_loss(scores: list[dict[str, Any]], source: str) -> dict[str, float] | None:
    """Return the bits per byte before and after quantisation, on the same windows.

    Args:
        scores: Scores of a report, in order.
        source: Name of the weights that were exported.
    """
    for before in scores:
        for after in scores:
            same_windows = before["windows"] == after["windows"]
            if (before["weights"], after["weights"]) == (source, "quantised") and same_windows:
                return {
                    "bpb_before": before["bpb"],
                    "bpb_after": after["bpb"],
                    "bpb_lost": after["bpb"] - before["bpb"],
                }
    return None


def _size(report: dict[str, Any]) -> list[str]:
    artifact = report["artifact"]
    if not artifact:
        return []
    head = "| part | weights | bytes | bits per weight | stored as | error | error of outputs |"
    lines = ["## Artifact", "", head, "|---|---|---|---|---|---|---|"]
    for group in artifact["groups"]:
        bits = f"{group['bits_per_weight']:.3f}" if group["parameters"] else ""
        errors = (group.get("relative_error"), group.get("output_error"))
        relative, outputs = ("" if error is None else f"{error:.2%}" for error in errors)
        stored = f"{'+'.join(group.get('kinds', []))} {'+'.join(group.get('codecs', []))}"
        lines.append(
            f"| {group['name']} | {group['parameters']:,} | {group['packed_bytes']:,} | {bits} | "
            f"{stored} | {relative} | {outputs} |"
        )
    lines.append(f"| source code | | {artifact['code_bytes']:,} | | | | |")
    lines.append(f"| container | | {artifact['container_bytes']:,} | | | | |")
    lines.append(f"| **total** | | **{artifact['total_bytes']:,}** | | | | |")
    return [*lines, "", *_how_it_fits(artifact), *_lost(report), ""]


def _how_it_fits(artifact: dict[str, Any]) -> list[str]:
    factor = artifact.get("step_factor", 1.0)
    if factor == 1:
        return []
    planned = artifact["attempts"][0]["total_bytes"]
    over = artifact["limit_bytes"] is not None and planned > artifact["limit_bytes"]
    why = "did not fit" if over else "left bytes unused"
    return [f"The plan of {planned:,} bytes {why}: all steps were multiplied by {factor:.4f}."]


def _lost(report: dict[str, Any]) -> list[str]:
    lost = report.get("quantisation")
    if lost is None:
        return []
    return [
        f"Quantisation: {lost['bpb_before']:.6f} bits per byte before, {lost['bpb_after']:.6f} "
        f"after, {lost['bpb_lost']:+.6f}."
    ]


def _replicas(report: dict[str, Any]) -> list[str]:
    replicas = report.get("replicas")
    if replicas is None:
        return []
    different = replicas["different"]
    verdict = "identical to the last bit" if different is None else f"NOT identical: {different}"
    return [f"The weights of the {replicas['ranks']} replicas are {verdict}."]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {str(item)[:16]}" for key, item in value.items())
    return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device_type} ({platform.processor() or platform.machine()})"


def _git_revision(root: Path) -> str | None:
    try:
        # An installed package may lie inside the checkout of something else.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        revision = _git(root, "rev-parse", "HEAD")
        return f"{revision}-dirty" if _git(root, "status", "--porcelain") else revision
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
