"""Two ranks: what the budget exchanges, late fake quantisation, averages scored in validation."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import budget_ranks
from runs import in_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_corpus: Shards) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("budget")
    source = str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)
    assert in_ranks(2, budget_ranks.budget, folder, source) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_step_exchanges_two_numbers_once_and_pickles_nothing(ranks):
    for rank in ranks:
        assert {numel for _, numel in rank["exchanges"]} == {2}
        for step in range(1, 6):
            assert [at for at, _ in rank["exchanges"]].count(step) == 1
        assert rank["broadcasts"] == 0


def test_ranks_switch_fake_quantisation_on_at_the_same_step(ranks):
    assert [rank["switched_at"] for rank in ranks] == [4, 4]
    assert ranks[0]["digest"] == ranks[1]["digest"]


def test_averages_are_scored_over_all_ranks(ranks):
    assert len(ranks[0]["logged"]) == 3
    for first, second in zip(*(rank["logged"] for rank in ranks), strict=True):
        assert first == second
        assert first["val/bpb_ema"] != first["val/bpb"]
