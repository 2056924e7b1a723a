"""Write the small artifact and checkpoint that a version of pgl leaves to all later ones.

``python tests/data/make_released.py`` after the version in ``pgl/__init__.py`` was raised; commit
what it writes to ``tests/data/released/VERSION/``. It refuses to overwrite: files of a version that
has been released are what they are. ``--again`` is for a version that has not been yet.
"""

import argparse
import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

import pgl
from pgl.artifact import save
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.artifact.manifest import VERSION
from pgl.model import GPT, GPTConfig
from pgl.module import CHECKPOINT_FORMAT, GolfModule
from pgl.quant import QuantConfig, RowGrid, TensorRule, quantize_state

RELEASED = Path(__file__).resolve().parent / "released"
CONFIG = GPTConfig(
    vocab_size=270,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_hidden=32,
    smear_gate=True,
    bigram_buckets=16,
    bigram_dim=8,
    value_embedding_layers=[1],
    value_embedding_dim=8,
)


def make(folder: Path) -> None:
    """Write ``model.pgl``, ``last.ckpt`` and what both must give when they are read."""
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # All kinds of streams: 5 and 8 bits, and every floating-point type.
    quant = QuantConfig(
        mlp=TensorRule(grid=RowGrid(bits=5, scale_floor=None)),
        bigram=TensorRule(store="bfloat16"),
        passthrough_max_numel=64,
        control_dtype="float32",
    )
    folder.mkdir(parents=True)
    save(folder / "model.pgl", CONFIG, quantize_state(model.state_dict(), quant), codec="lzma")
    module = GolfModule(CONFIG)
    module.gpt.load_state_dict(model.state_dict())
    checkpoint = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    module.on_save_checkpoint(checkpoint)
    GolfCheckpointIO().save_checkpoint(checkpoint, folder / "last.ckpt")
    expected = {
        "pgl": pgl.__version__,
        "artifact_format": VERSION,
        "checkpoint_format": CHECKPOINT_FORMAT,
        "ids": (ids := [[1, *range(40, 71)]]),
        "losses": {name: losses(folder / name, ids) for name in ("model.pgl", "last.ckpt")},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


@torch.no_grad()
def losses(path: Path, ids: list[list[int]]) -> list[float]:
    """Return the loss of each target under the weights of an artifact or a checkpoint."""
    loaded = GolfCheckpointIO().load_checkpoint(path, map_location="cpu")
    model = GPT(GPTConfig(**loaded["hyper_parameters"]["gpt"])).eval()
    prefix = "gpt."
    model.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in loaded["state_dict"].items()
            if name.startswith(prefix)
        }
    )
    tokens = torch.tensor(ids)
    return model.token_losses(tokens[:, :-1], tokens[:, 1:]).flatten().tolist()


def main() -> int:
    """Write the files of this version."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="replace those of this version")
    again = parser.parse_args().again
    folder = RELEASED / pgl.__version__
    if folder.exists():
        if not again:
            print(f"{folder} is there already: its files stay as that version wrote them")
            return 2
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    make(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
