"""What the tests of fits in several processes compare them with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Fit, fit, leaves

CLOSE = {"rtol": 1e-3, "atol": 2e-5}


def one_process(folder: Path, source: tuple[str, str], **settings: Any) -> Fit:
    """Fit in this process alone, on one thread as the ranks do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = fit(folder, source, **settings)
    finally:
        torch.set_num_threads(threads)
    return run


def results(folder: Path, name: str, ranks: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """Return what each rank has left of a fit."""
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in ranks]


def assert_close(actual: Any, expected: Any) -> None:
    """Nested containers hold the same numbers up to the rounding of another order of summation."""
    for (path, a), (expected_path, e) in zip(leaves(actual), leaves(expected), strict=True):
        assert path == expected_path
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(a, e, **CLOSE, msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert a == pytest.approx(e, rel=1e-3) if isinstance(e, float) else a == e, path
