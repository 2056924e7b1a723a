"""Checkpoints that are whole or not there, and artifacts wherever a checkpoint is taken."""

import os
import pickle
import zipfile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from pgl.artifact import is_artifact, load
from pgl.artifact.model_config import config_to_dict
from pgl.io import atomic_write

# What torch.load raises for damaged files.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    zipfile.BadZipFile,
)


class GolfCheckpointIO(TorchCheckpointIO):
    """Writes Lightning checkpoints atomically; reads them and pgl artifacts alike.

    Loading never unpickles arbitrary objects: only tensors and plain containers are taken.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; a crash leaves the file that was there before."""
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self,
        path: str | os.PathLike,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint or an artifact.

        Raises:
            FileNotFoundError: If there is no such file.
            ArtifactError: If the artifact is damaged.
            ValueError: If the file is neither, or holds anything but tensors and plain values.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"ckpt_path {path} does not exist")
        if is_artifact(path):
            return _as_checkpoint(path)
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"ckpt_path {path} is neither a whole Lightning checkpoint of plain values nor a "
                "pgl artifact"
            ) from error


def _as_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    artifact = load(path)
    return {
        "state_dict": {f"gpt.{name}": weight for name, weight in artifact.state_dict.items()},
        "hyper_parameters": {"gpt": config_to_dict(artifact.config)},
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
        "pgl_artifact": artifact.manifest.get("metadata", {}),
    }
