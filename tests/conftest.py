"""Fixtures that every test may use: golden vectors and clean process state."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("PGL_GOLDEN", REPOSITORY.parent / "shared" / "golden"))


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Load one file of golden vectors, e.g. ``golden("xsa")``; skip where the directory is absent."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden vectors not found: {path} (set PGL_GOLDEN to their directory)")
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(autouse=True)
def clean_process_state() -> Iterator[None]:
    """Leave no process group, default dtype, RNG seed variable or compile cache behind."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)
