"""The size of the reference's machine: eight processes, then three, then one."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgl.cli import main
from pgl.data import Shards

sys.path.append(str(Path(__file__).parent))

import crashes
from compare import assert_close
from runs import in_ranks

pytestmark = pytest.mark.slow

PARALLEL = ["--trainer.strategy", "parallel_muon"]
DATA = ["--data.batch_tokens", "768", "--data.micro_batch_tokens", "32"]  # 24 sequences a step


def checkpoint(config: Path) -> dict[str, Any]:
    return torch.load(config.parent / config.stem / "last.ckpt", weights_only=True)


def test_eight_processes_are_continued_by_three_and_scored_by_one(
    tmp_path, tiny_corpus: Shards, capsys
):
    source = str(tiny_corpus.directory), str(tiny_corpus.tokenizer_path)
    config = crashes.write_config(tmp_path / "run.yaml", source, every=1000)
    warm_up = ["--budget.warmup_steps", "1"]

    command = [*crashes.arguments(config), *DATA, *warm_up, *PARALLEL, "--trainer.devices", "8"]
    signals = {5: (2, signal.SIGTERM)}  # rank 5, in the third step
    assert in_ranks(8, crashes.run_rank, command, signals) == [143] * 8
    assert checkpoint(config)["global_step"] == 3

    command = [*crashes.arguments(config), *DATA, *warm_up, *PARALLEL, "--trainer.devices", "3"]
    assert "--ckpt_path" in command
    assert in_ranks(3, crashes.run_rank, command, {}) == [0] * 3

    alone = crashes.write_config(tmp_path / "alone.yaml", source, every=1000)
    main([*crashes.arguments(alone), *DATA])
    ours, expected = checkpoint(config), checkpoint(alone)
    assert ours["global_step"] == expected["global_step"] == crashes.STEPS
    for part in ("current_model_state", "state_dict"):
        assert_close(ours[part], expected[part])
    assert_close(ours["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"])

    scores = [
        json.loads((path.parent / path.stem / "report.json").read_text())["scores"]
        for path in (config, alone)
    ]
    for score, expected_score in zip(*scores, strict=True):
        assert score["bpb"] == pytest.approx(expected_score["bpb"], rel=1e-3)
        assert score["tokens"] == expected_score["tokens"]

    saved = str(tmp_path / "run" / "last.ckpt")
    exported = tmp_path / "exported.pgl"
    main(["export", "-c", str(config), "--ckpt_path", saved, "--out", str(exported)])
    capsys.readouterr()
    main(["validate", "-c", str(config), "--ckpt_path", str(exported)])
    [bpb] = [
        score["bpb"]
        for score in scores[0]
        if (score["weights"], score["windows"]) == ("quantised", "sliding")
    ]
    assert f"{bpb:.4f}"[:-1] in capsys.readouterr().out
