"""What all processes of a run must have in common: settings, data, code, weights, as flat text."""

import hashlib
import inspect
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

import pgl

EDGE_BYTES = 65_536

Fingerprint = dict[str, str]


def settings_of(thing: Any, prefix: str) -> Fingerprint:
    """Return the constructor's arguments that an object keeps under their own names."""
    names = [name for name in inspect.signature(type(thing).__init__).parameters if name != "self"]
    values = {name: repr(getattr(thing, name)) for name in names if hasattr(thing, name)}
    # What has no text of its own has an address, which differs by nature.
    return {f"{prefix}.{name}": text for name, text in values.items() if " at 0x" not in text}


def files_fingerprint(paths: Iterable[Path]) -> Fingerprint:
    """Return length and SHA-256 of both ends of each file, by its name; reads 128 KiB of each."""
    return {path.name: _ends(path) for path in paths}


def weights_fingerprint(module: torch.nn.Module) -> Fingerprint:
    """Return a hash of each parameter's bytes, by its name."""
    fingerprint = {}
    for name, parameter in module.named_parameters():
        data = parameter.detach().cpu().flatten().view(torch.uint8).numpy()
        fingerprint[name] = hashlib.sha256(data).hexdigest()[:16]
    return fingerprint


def code_fingerprint() -> Fingerprint:
    """Return one hash of the source of ``pgl`` and ``callbacks``, and the versions they run on."""
    root = Path(pgl.__file__).resolve().parent.parent
    hasher = hashlib.sha256()
    for package in ("pgl", "callbacks"):
        for path in sorted((root / package).rglob("*.py")):
            hasher.update(str(path.relative_to(root)).encode())
            hasher.update(path.read_bytes())
    return {
        "source": hasher.hexdigest()[:16],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def disagreement(fingerprints: Sequence[dict[str, Fingerprint]]) -> str | None:
    """Say how ranks differ from rank 0; None if they do not.

    Args:
        fingerprints: Of each rank, by kind ("config", "data", "code", "weights").
    """
    first, found = fingerprints[0], []
    for kind in first:
        names = list(dict.fromkeys(name for f in fingerprints for name in f[kind]))
        for name in names:
            values = [f[kind].get(name, "nothing") for f in fingerprints]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                ranks = ", ".join(map(str, others))
                found.append(
                    f"{kind} {name}: {values[others[0]]} on rank {ranks}, {values[0]} on rank 0"
                )
    if not found:
        return None
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _ends(path: Path) -> str:
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        hasher = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(size_bytes - EDGE_BYTES, 0))
        hasher.update(file.read(EDGE_BYTES))
    return f"{size_bytes} bytes, {hasher.hexdigest()[:16]}"
