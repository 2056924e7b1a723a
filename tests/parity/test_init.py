"""Initialisation against the references' full-size models: counts, constants, statistics."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgl.model import GPT
from tests.parity.recipes import PRS, RECIPES

Golden = Callable[[str], dict[str, np.ndarray]]


def reference_table(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics by parameter name; the banked file of PR #703 has them per layer too."""
    prefix, names = "", arrays["name"]
    if "unbanked_shape" in arrays:
        prefix, names = "unbanked_", arrays["storage_name"]
    columns = ("shape", "mean", "std", "min", "max", "frobenius_norm", "gram_diag_mean",
               "gram_diag_spread", "gram_offdiag_absmax")  # fmt: skip
    return {
        str(name): {column: arrays[prefix + column][row] for column in columns}
        for row, name in enumerate(names)
    }


def sizes(table: dict[str, dict[str, np.ndarray]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(n) for n in row["shape"] if n) for name, row in table.items()}


def full_size(pr: str, table: dict[str, dict[str, np.ndarray]]) -> GPT:
    """The recipe with the bigram table of the reference file."""
    torch.manual_seed(1)
    rows = int(table["bigram.embed.weight"]["shape"][0])
    return GPT(replace(RECIPES[pr], bigram_buckets=rows))


def gram(weight: Tensor) -> Tensor:
    return weight @ weight.T if weight.size(0) <= weight.size(1) else weight.T @ weight


@pytest.mark.parametrize("pr", PRS)
def test_starts_like_the_reference(golden: Golden, pr: str) -> None:
    arrays = golden(f"init_stats_{pr}")
    table = reference_table(arrays)
    gpt = full_size(pr, table)
    # The references cast everything to bfloat16 once, then most of it back: compare rounded values.
    weights = {name: p.detach().bfloat16().double() for name, p in gpt.named_parameters()}
    assert {name: tuple(w.shape) for name, w in weights.items()} == sizes(table)
    assert sum(p.numel() for p in gpt.parameters()) == int(arrays["total_params"])

    for name, row in table.items():
        weight = weights[name]
        if row["min"] == row["max"]:
            assert (weight == float(row["min"])).all(), name
        elif name.endswith("resid_mix"):
            assert weight.min() == row["min"], name
            assert weight.max() == row["max"], name
        else:
            assert weight.std(correction=0).item() == pytest.approx(row["std"], rel=0.02), name
            mean_error = 6 * row["std"] / math.sqrt(weight.numel())
            assert abs(weight.mean().item()) <= mean_error, name
        if not np.isnan(row["gram_diag_mean"]):
            gram_matrix, gain2 = gram(weight), float(row["gram_diag_mean"])
            expected = torch.eye(len(gram_matrix), dtype=torch.float64) * gain2
            torch.testing.assert_close(gram_matrix, expected, atol=1.5e-3 * gain2, rtol=0)
            norm = weight.norm().item()
            assert norm == pytest.approx(row["frobenius_norm"], rel=1e-4), name


def test_stored_dtypes(golden: Golden) -> None:
    for pr in PRS:
        arrays = golden(f"init_stats_{pr}")
        names, dtypes = unbank_names(arrays)
        gpt = full_size(pr, reference_table(arrays))
        actual = {name: str(p.dtype).removeprefix("torch.") for name, p in gpt.named_parameters()}
        assert {name: actual[name] for name in names} == dict(zip(names, dtypes, strict=True))


def unbank_names(arrays: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    pairs = [
        (str(name), str(dtype))
        for name, dtype in zip(arrays["name"], arrays["dtype"], strict=True)
        if not str(name).endswith("_bank")
    ]
    return [name for name, _ in pairs], [dtype for _, dtype in pairs]


def test_parameter_count_of_703_with_1536_bigram_rows(golden: Golden) -> None:
    arrays = golden("init_stats_703")
    gpt = GPT(replace(RECIPES["703"], bigram_buckets=1536, init="default"))
    count = sum(p.numel() for p in gpt.parameters())
    assert count == int(arrays["total_params_bigram1536"])


@pytest.mark.parametrize("pr", PRS)
def test_first_loss_is_that_of_guessing(golden: Golden, pr: str) -> None:
    arrays = golden(f"init_stats_{pr}")
    gpt = full_size(pr, reference_table(arrays))
    ids = torch.randint(gpt.config.vocab_size, (2, 65))
    with torch.no_grad():
        loss = F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(float(arrays["init_loss_random_tokens"]), abs=0.05)
