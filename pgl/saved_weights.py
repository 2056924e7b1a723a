"""The sets of weights that a checkpoint holds, by name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pgl.averaging import ExponentialAverage, LastAverage, UniformAverage, WeightAverage

GPT_PREFIX = "gpt."


def saved_weights(
    checkpoint: Mapping[str, Any], averaging_key: str, name: str
) -> dict[str, Tensor]:
    """Return one set of the GPT's weights.

    Args:
        checkpoint: A Lightning checkpoint of pgl, as loaded.
        averaging_key: Key of the averaging callback's state in ``checkpoint["callbacks"]``.
        name: ``raw``, or the name of an average such as ``ema``.

    Raises:
        ValueError: The checkpoint holds no such weights; the message names those it holds.
    """
    state = checkpoint.get("callbacks", {}).get(averaging_key, {})
    averages = {key: saved for key, saved in state.get("averages", {}).items() if saved["count"]}
    if name == "raw":
        saved = checkpoint.get("current_model_state", checkpoint["state_dict"])
        return {
            key.removeprefix(GPT_PREFIX): tensor
            for key, tensor in saved.items()
            if key.startswith(GPT_PREFIX)
        }
    if name not in averages:
        raise ValueError(
            f"validation.weights is {name} but the checkpoint holds {', '.join(['raw', *averages])}"
            ": choose one of them, or leave it unset for the weights that it was saved with"
        )
    return _average_of(name, averages[name]).average()


def _average_of(name: str, state: Mapping[str, Any]) -> WeightAverage:
    average: WeightAverage
    if "snapshots" in state:
        # A ring that is not full holds as many snapshots as there were updates.
        average = LastAverage(len(state["snapshots"]))
    else:
        average = ExponentialAverage() if name == "ema" else UniformAverage()
    average.load_state_dict(state)
    return average
