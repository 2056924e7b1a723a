"""Random number generators in the checkpoint, which Lightning leaves out."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class RandomState(Callback):
    """Saves and restores the random number generators of Python, NumPy and torch.

    Note:
        The state is that of rank 0, as in every Lightning checkpoint. Training draws no random
        numbers of its own: data order and batches follow from the step alone.

    Example::

        Trainer(callbacks=[WallClockBudget(), RandomState()])
    """

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states as tensors and plain numbers."""
        name, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (name, [int(key) for key in keys], position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the generators back to where they were."""
        version, internal, gauss = state_dict["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state_dict["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state_dict["torch"].cpu())
        if torch.cuda.is_available() and len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda"]])
