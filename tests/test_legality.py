"""The verdict on a run: every condition can break it."""

import copy
import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    "data": {
        "source": "fineweb10B_sp1024",
        "train_shards": {"t": "aa"},
        "val_shards": {"v": "bb"},
        "val_targets": 999,
        "val_split_targets": 999,
    },
    "trained_tokens": 4096,
    "steps": 59,
    "calibration": {"read": "training tokens", "counted": True},
    "budget": {
        "phases": {
            "train": {"counts": True, "seconds": 590.0},
            "calibrate": {"counts": True, "seconds": 9.0},
            "pack": {"counts": False, "seconds": 20.0},
            "read back": {"counts": False, "seconds": 5.0},
            "score quantised sliding": {"counts": False, "seconds": 590.0},
        },
        "counted_seconds": 599.0,
        "budget_seconds": 600.0,
        "budget_steps": None,
        "within_budget": True,
    },
    "artifact": {"total_bytes": 15_999_999},
    "score": {
        "weights": "quantised",
        "windows": "sliding",
        "tokens": 999,
        "repeated": 0,
        "missed": 0,
    },
    "probes": {
        "window": {"first": 16, "before": 0.0, "after": 2.0},
        "scored": {"first": 24, "before": 0.0, "after": 1.0},
        "probability_error": 1e-7,
        "causal": True,
        "normalised": True,
    },
    "ttt": {},
    "device": "8 x NVIDIA H100 80GB HBM3",
}
SCORE_FIRST = {"method": "score_first", "trained_targets": 96, "chunks": 4, "scored_first": True}


def verdict(**changes):
    return judge(Evidence(**copy.deepcopy(CLEAN) | changes))


def part(key, **changes):
    return {key: {**copy.deepcopy(CLEAN[key]), **changes}}


def scoring_took(seconds):
    phases = copy.deepcopy(CLEAN["budget"]["phases"])
    phases["score quantised sliding"]["seconds"] = seconds
    return part("budget", phases=phases)


TRAINING = "training takes at most 600 s on 8 H100"
EVALUATION = "evaluation takes at most 600 s on 8 H100"
STEPS = {"budget_seconds": None, "budget_steps": 5, "within_budget": None}


def test_a_clean_run_is_legal():
    legality = verdict(ttt=SCORE_FIRST)
    assert legality["legal"] is True
    assert legality["verdict"] == "legal"
    assert legality["reasons"] == legality["not_judged"] == []
    assert "96 targets" in legality["conditions"][-1]["evidence"]
    assert "train and calibrate count" in legality["conditions"][2]["evidence"]
    assert legality_line(legality) == "legal"
    json.dumps(legality, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (part("data", train_shards={"t": "bb"}), "t hold(s) validation text"),
        (part("data", val_targets=998), "998 of the 999 targets"),
        (part("calibration", counted=False), "after the clock had stopped"),
        (part("budget", counted_seconds=610.1), "610.1 s of train"),
        (part("budget", counted_seconds=3600.0, budget_seconds=3600.0), "3600.0 s of train"),
        (part("budget", counted_seconds=610.1, **STEPS), "the budget was 5 steps"),
        (scoring_took(595.1), "595.1 s of the last score"),
        ({"artifact": {"total_bytes": 16_000_001}}, "16,000,001 of 16,000,000"),
        (part("score", tokens=1000, repeated=1), "1 repeated"),
        (part("score", tokens=998, missed=1), "1 missed"),
        (part("probes", causal=False), "earlier tokens only"),
        (part("probes", normalised=False), "sum to 1"),
        ({"ttt": {**SCORE_FIRST, "scored_first": False}}, "some before they were scored"),
        ({"ttt": {**SCORE_FIRST, "method": "full"}}, "before any was scored"),
    ],
)
def test_every_condition_can_break_it(changes, reason):
    legality = verdict(**changes)
    assert legality["legal"] is False
    assert len(legality["reasons"]) == 1
    assert reason in legality["reasons"][0]
    assert legality_line(legality).startswith("NOT LEGAL (")
    text = "\n".join(legality_lines(legality))
    assert "**not legal**" in text
    assert "| **no** |" in text


@pytest.mark.parametrize(
    ("changes", "conditions"),
    [
        (part("budget", **STEPS), [TRAINING]),
        ({"device": "8 x NVIDIA H200"}, [TRAINING, EVALUATION]),
        ({"device": "1 x NVIDIA H100 80GB HBM3"}, [TRAINING, EVALUATION]),
        ({"device": "18 x NVIDIA H100"}, [TRAINING, EVALUATION]),
        # Slower than the challenge's machine, so it says nothing.
        ({"device": "1 x cpu (x86_64)", **scoring_took(4000.0)}, [TRAINING, EVALUATION]),
        (part("data", source="stdlib"), ["the text is the challenge's"]),
        ({"artifact": {}}, ["the artifact, code included, fits"]),
        ({"score": None}, [EVALUATION, "each target is scored once"]),
        (part("score", windows="chunked"), [EVALUATION]),
        (part("score", repeated=None, missed=None), ["each target is scored once"]),
        (
            {"probes": None},
            ["a score depends on earlier tokens only", "probabilities of all tokens sum to 1"],
        ),
    ],
)
def test_what_a_run_cannot_tell_is_not_judged_and_not_called_legal(changes, conditions):
    legality = verdict(**changes)
    assert legality["legal"] is None
    assert legality["not_judged"] == conditions
    assert legality["verdict"] == f"not judged: {'; '.join(conditions)}"
    assert legality_line(legality) == legality["verdict"]
    text = "\n".join(legality_lines(legality))
    assert "| not judged |" in text
    assert f"**{legality['verdict']}**" in text


def test_a_broken_condition_outweighs_what_is_not_judged():
    legality = verdict(device="1 x cpu", artifact={"total_bytes": 16_000_001})
    assert legality["legal"] is False
    assert legality["verdict"] == "not legal"
    assert legality["not_judged"] == [TRAINING, EVALUATION]


def test_the_last_step_may_end_past_the_limit():
    assert verdict(**part("budget", counted_seconds=609.9))["legal"] is True


def test_conditions_on_what_did_not_happen_hold():
    assert verdict(calibration=None)["legal"] is True
    assert verdict(calibration={"read": "samples", "counted": False})["legal"] is True
    assert verdict(**part("probes", scored=None))["legal"] is True


def test_a_run_reports_its_legality(golf_run, capsys):
    run = golf_run(ttt=TestTimeTraining("score_first", score_first=TTTConfig(chunk_tokens=64)))

    legality = json.loads((run.folder / "report.json").read_text())["legality"]
    # The fixture's split is cut to 400 tokens.
    assert legality["legal"] is False
    (reason,) = legality["reasons"]
    assert reason.startswith("the whole split is scored: 399 of the ")
    assert legality["not_judged"] == [TRAINING, EVALUATION, "the text is the challenge's"]
    rows = {row["condition"]: row["evidence"] for row in legality["conditions"]}
    assert "s of the last score" in rows[EVALUATION]
    assert "in a batch as it is scored" in rows["a score depends on earlier tokens only"]
    once = next(c for c in legality["conditions"] if c["condition"] == "each target is scored once")
    assert once["evidence"] == "399 scores of 399 targets, 0 repeated, 0 missed"
    assert "## Legality" in (run.folder / "report.md").read_text()
    assert "score      NOT LEGAL (the whole split" in capsys.readouterr().out


def test_a_run_on_the_whole_split_of_another_text_is_not_judged(golf_run, tiny_data, capsys):
    tiny_data.max_val_tokens = None
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        averaging=WeightAveraging(None, source="raw"),
        validation=SlidingWindowBPB(stride_tokens=32),
    )

    legality = json.loads((run.folder / "report.json").read_text())["legality"]
    assert legality["legal"] is None
    assert legality["reasons"] == []
    assert f"score      {legality['verdict']}" in capsys.readouterr().out
    assert legality["verdict"].startswith("not judged: training takes")


def test_training_before_scoring_is_marked_wherever_it_appears(golf_run, capsys):
    ttt = TestTimeTraining("full", allow_illegal=True, full=FullTTTConfig(epochs=1))
    run = golf_run(ttt=ttt)

    report = json.loads((run.folder / "report.json").read_text())
    assert not report["legality"]["legal"]
    assert "384 targets" in report["legality"]["reasons"][-1]
    assert report["scores"][-1]["legal"] is False
    assert [score["legal"] for score in report["scores"][:-1]] == [True] * 4
    markdown = (run.folder / "report.md").read_text()
    assert "| quantised | sliding, TTT before scoring: not legal |" in markdown
    assert "The score is **not legal**." in markdown
    printed = capsys.readouterr().out
    assert "not legal" in printed
    assert "NOT LEGAL" in printed
    reader = EventAccumulator(str(run.folder)).Reload()
    logged = {tag: reader.Scalars(tag)[-1].value for tag in reader.Tags()["scalars"]}
    illegal, legal = report["scores"][-1]["bpb"], report["scores"][-2]["bpb"]
    key = "final/bpb_quantised_sliding_TTT_before_scoring_not_legal"
    assert logged[key] == pytest.approx(illegal, rel=1e-6)
    # What hparams, and every other sentence about the run's score, call the run's score is legal.
    assert logged["final/bpb"] == pytest.approx(legal, rel=1e-6)
    assert logged["final/bpb"] != pytest.approx(illegal, rel=1e-6)


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
    read = {"training": "training tokens, while the clock ran", "samples": "text that the model"}
    assert f"GPTQ on {read[calibration]}" in legality["conditions"][1]["evidence"]
