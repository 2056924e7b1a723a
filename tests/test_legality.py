"""The verdict on a run: every condition can break it."""

import copy
import json
import shutil

import pytest
import torch

from callbacks import (
    GPTQExport,
    SlidingWindowBPB,
    TestTimeTraining,
    WallClockBudget,
    WeightAveraging,
)
from pgl.data import Shards, TokenDataModule
from pgl.data.shards import read_shard, write_shard
from pgl.evaluate import FullTTTConfig, TTTConfig
from pgl.legality import Evidence, judge, legality_line, legality_lines
from pgl.quant import QuantConfig, TensorRule

CLEAN = {
    "data": {"train_shards": {"t": "aa"}, "val_shards": {"v": "bb"}, "val_targets": 999},
    "trained_tokens": 4096,
    "calibration": "training",
    "budget": {
        "phases": {"train": {"counts": True}, "calibrate": {"counts": True}, "pack": {"counts": 0}},
        "counted_seconds": 599.0,
        "budget_seconds": 600.0,
        "budget_steps": None,
        "within_budget": True,
    },
    "artifact": {"total_bytes": 15_999_999},
    "score": {"tokens": 999, "repeated": 0, "missed": 0},
    "probes": {
        "changed_from": 17,
        "change_before": 0.0,
        "change_after": 2.0,
        "probability_error": 1e-7,
        "causal": True,
        "normalised": True,
    },
    "ttt": {},
    "device": "8 x H100",
}
SCORE_FIRST = {"method": "score_first", "trained_targets": 96, "chunks": 4, "scored_first": True}


def verdict(**changes):
    return judge(Evidence(**copy.deepcopy(CLEAN) | changes))


def test_a_clean_run_is_legal():
    legality = verdict(ttt=SCORE_FIRST)
    assert legality["legal"]
    assert legality["verdict"] == "legal"
    assert legality["reasons"] == legality["not_judged"] == []
    assert "96 targets" in legality["conditions"][-1]["evidence"]
    assert "train and calibrate count" in legality["conditions"][2]["evidence"]
    assert legality_line(legality) == "legal"
    json.dumps(legality, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {**CLEAN["data"], "train_shards": {"t": "bb"}}}, "t hold(s) validation text"),
        ({"calibration": "training_after_budget"}, "after the clock had stopped"),
        ({"budget": {**CLEAN["budget"], "within_budget": False}}, "599.0 s of train"),
        ({"artifact": {"total_bytes": 16_000_001}}, "16,000,001 of 16,000,000"),
        ({"score": {"tokens": 1000, "repeated": 1, "missed": 0}}, "1 repeated"),
        ({"score": {"tokens": 998, "repeated": 0, "missed": 1}}, "1 missed"),
        ({"probes": {**CLEAN["probes"], "causal": False}}, "earlier tokens only"),
        ({"probes": {**CLEAN["probes"], "normalised": False}}, "sum to 1"),
        ({"ttt": {**SCORE_FIRST, "scored_first": False}}, "some before they were scored"),
        ({"ttt": {**SCORE_FIRST, "method": "full"}}, "before any was scored"),
    ],
)
def test_every_condition_can_break_it(changes, reason):
    legality = verdict(**changes)
    assert not legality["legal"]
    assert len(legality["reasons"]) == 1
    assert reason in legality["reasons"][0]
    assert legality_line(legality).startswith("NOT LEGAL (")
    text = "\n".join(legality_lines(legality))
    assert "**not legal**" in text
    assert "| **no** |" in text


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        (
            {
                "budget": {**CLEAN["budget"], "budget_seconds": None, "budget_steps": 5}
                | {"within_budget": None}
            },
            "training stays within its time",
        ),
        ({"artifact": {}}, "the artifact, code included, fits"),
        ({"score": None}, "each target is scored once"),
        ({"score": {"tokens": 9, "repeated": None, "missed": None}}, "each target is scored once"),
        ({"calibration": "something new"}, "no training token is read after the budget"),
    ],
)
def test_what_a_run_cannot_tell_is_not_judged(changes, condition):
    legality = verdict(**changes)
    assert legality["legal"]
    assert legality["not_judged"] == [condition]
    assert "| not judged |" in "\n".join(legality_lines(legality))


def test_a_run_reports_its_legality(golf_run, capsys):
    run = golf_run(ttt=TestTimeTraining("score_first", score_first=TTTConfig(chunk_tokens=64)))

    legality = json.loads((run.folder / "report.json").read_text())["legality"]
    assert legality["legal"]
    assert legality["not_judged"] == ["training stays within its time"]
    once = next(c for c in legality["conditions"] if c["condition"] == "each target is scored once")
    assert once["evidence"] == "399 scores of 399 targets, 0 repeated, 0 missed"
    assert "## Legality" in (run.folder / "report.md").read_text()
    assert "score      legal" in capsys.readouterr().out


def test_training_before_scoring_is_marked_wherever_it_appears(golf_run, capsys):
    ttt = TestTimeTraining("full", allow_illegal=True, full=FullTTTConfig(epochs=1))
    run = golf_run(ttt=ttt)

    report = json.loads((run.folder / "report.json").read_text())
    assert not report["legality"]["legal"]
    assert "384 targets" in report["legality"]["reasons"][0]
    assert report["scores"][-1]["legal"] is False
    assert [score["legal"] for score in report["scores"][:-1]] == [True] * 4
    markdown = (run.folder / "report.md").read_text()
    assert "| quantised | sliding, TTT before scoring: not legal |" in markdown
    assert "The score is **not legal**." in markdown
    printed = capsys.readouterr().out
    assert "not legal" in printed
    assert "NOT LEGAL" in printed
    events = next(run.folder.glob("events.out.tfevents*")).read_bytes()
    assert b"final/bpb_quantised_sliding_TTT_before_scoring_not_legal" in events


@pytest.mark.parametrize("calibration", ["training", "samples"])
def test_validation_text_does_not_reach_training_calibration_or_export(
    golf_run, tiny_corpus, tmp_path, calibration
):
    # The same run with another validation text: everything but the scores is the same bit for bit.
    other = tmp_path / "other"
    shutil.copytree(tiny_corpus.directory, other)
    (val_shard,) = other.glob("*_val_*.bin")
    write_shard(val_shard, read_shard(val_shard)[::-1].copy())
    runs = []
    for folder in (tiny_corpus.directory, other):
        data = TokenDataModule(
            Shards(str(folder), tiny_corpus.tokenizer_path),
            seq_len=32,
            batch_tokens=256,
            micro_batch_tokens=64,
            spans_per_batch=4,
            max_val_tokens=400,
        )
        runs.append(
            golf_run(
                f"run_{len(runs)}",
                data=data,
                budget=WallClockBudget(seconds=None, steps=3, warmup_steps=0),
                artifact=GPTQExport(
                    QuantConfig(mlp=TensorRule(method="gptq"), passthrough_max_numel=64),
                    calibration=calibration,
                    calibration_sequences=4,
                ),
                validation=SlidingWindowBPB(stride_tokens=8, every_n_steps=1),
                ttt=TestTimeTraining("score_first", score_first=TTTConfig(chunk_tokens=64)),
            )
        )

    one, two = runs
    scores = [[score.bpb for score in r.callback(SlidingWindowBPB).scores] for r in runs]
    assert all(a != b for a, b in zip(*scores, strict=True))
    states = [
        {
            "weights": r.module.state_dict(),
            "optimizer": r.trainer.optimizers[0].state_dict()["state"],
            "averages": r.callback(WeightAveraging).state_dict(),
            "artifact": r.callback(GPTQExport).exported.state_dict,
        }
        for r in (one, two)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    legality = json.loads((one.folder / "report.json").read_text())["legality"]
    assert legality["legal"]
    assert "GPTQ on" in legality["conditions"][1]["evidence"]
