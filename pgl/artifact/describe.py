"""What an artifact says about itself when it is run: ``python FILE``.

This module is also the artifact's ``__main__.py``, so it uses the standard library alone.
"""

import json
import os
import sys
import zipfile


def describe(path: str) -> str:
    """Return a few lines about an artifact: what it is, how large, and how to score it."""
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    packages = " and ".join(_packages(manifest))
    num_weights = 0
    for tensor in manifest["tensors"]:
        numel = 1
        for size in tensor["shape"]:
            numel *= size
        num_weights += numel
    lines = [
        f"{path}: a language model packed by {manifest['writer']}, "
        f"artifact format {manifest['version']}",
        f"  {num_weights:,} weights in {os.path.getsize(path):,} bytes, source code included",
    ]
    lines += [f"  {key}: {value}" for key, value in sorted(manifest["metadata"].items())]
    lines += [
        "Score it where parameter-golf-lightning is installed:",
        f"  pgl validate --config RECIPE.yaml --ckpt_path {path}",
        f"Or use the source it carries (needs Python 3.11, torch, {packages}):",
        f"  import sys; sys.path.insert(0, {os.path.join(path, 'source')!r})",
        "  from pgl.artifact import load",
        f"  model = load({path!r}).model()",
    ]
    return "\n".join(lines)


def _packages(manifest: dict) -> list[str]:
    codecs = {stream["codec"] for stream in manifest["streams"].values()}
    needed = {"zstd": "zstandard", "brotli": "brotli"}
    return ["numpy", *sorted(needed[codec] for codec in codecs & needed.keys())]


if __name__ == "__main__":
    print(describe(sys.path[0]))
