"""Test-time training in two processes gives the score that it gives in one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import scenarios
from compare import results
from runs import TARGETS, in_ranks

from callbacks import TestTimeTraining
from pgl.evaluate import TTTConfig

# 3 sequences of 32 in a chunk of 100: a step of 2, one for each rank, and one of 1.
CONFIG = TTTConfig(chunk_tokens=100, lr=0.05, epochs=2, batch_seqs=2)


def test_two_ranks_adapt_as_one_process(tiny_corpus, tmp_path):
    source = str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)
    folders = {world_size: tmp_path / str(world_size) for world_size in (1, 2)}
    artifact = folders[1] / "adapted" / "model.pgl"
    for world_size, folder in folders.items():
        folder.mkdir()
        ttt = TestTimeTraining("score_first", score_first=CONFIG)
        arguments = (folder, source, artifact, ttt)
        assert in_ranks(world_size, scenarios.adapted, *arguments) == [0] * world_size
    (alone,) = results(folders[1], "adapted", ranks=(0,))
    ranks = results(folders[2], "adapted")

    key, plain = "val/bpb_ttt_score_first", "val/bpb"
    for rank in ranks:
        assert rank["validated"][key] == ranks[0]["validated"][key]
        # The same artifact, so the same weights: only the order of sums differs.
        for name in (key, plain):
            assert rank["validated"][name] == pytest.approx(alone["validated"][name], rel=1e-6)
        assert rank["evidence"] == alone["evidence"]
        assert rank["scores"][-1] == ranks[0]["scores"][-1]
        assert rank["scores"][-1]["bpb"] == pytest.approx(alone["scores"][-1]["bpb"], rel=1e-4)
        assert (rank["scores"][-1]["tokens"], rank["scores"][-1]["missed"]) == (TARGETS, 0)
    assert alone["evidence"]["trained_targets"] == 3 * 96
    assert abs(alone["validated"][key] - alone["validated"][plain]) > 1e-3
    # Neither the weights nor their replicas are left adapted.
    torch.testing.assert_close(ranks[0]["state"]["weights"], ranks[1]["state"]["weights"])
    assert ranks[0]["digest"] == ranks[1]["digest"]
