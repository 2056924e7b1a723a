"""Test-time training around a run: off, legal, illegal; the weights and the files stay."""

import inspect
import json
import math

import pytest
import torch

from callbacks import GPTQExport, SlidingWindowBPB, TestTimeTraining, WallClockBudget
from pgl.evaluate import (
    BitsPerByte,
    FullTTTConfig,
    TTTConfig,
    WindowLoader,
    evaluate_windows,
    score_first_ttt,
    train_on_all,
)
from pgl.model import GPT
from pgl.module import GolfModule

FIRST = TTTConfig(chunk_tokens=64, lr=0.05, epochs=2, batch_seqs=2)
FULL = FullTTTConfig(lr=0.05, epochs=3, batch_seqs=4)
BUDGET = {"seconds": None, "steps": 3, "warmup_steps": 0}


def short(golf_run, **changes):
    return golf_run(budget=WallClockBudget(**BUDGET), **changes)


def twin(run) -> GPT:
    gpt = GPT(run.module.gpt_config)
    gpt.load_state_dict(run.callback(GPTQExport).exported.state_dict)
    return gpt


def test_it_is_off_unless_asked_for(golf_run):
    run = short(golf_run)
    ttt = run.callback(TestTimeTraining)
    assert ttt.method == "off"
    assert ttt.report() == {}
    assert len(run.callback(SlidingWindowBPB).scores) == 4


def test_score_first_scores_the_quantised_weights(golf_run):
    plain = short(golf_run, folder="plain")
    run = short(golf_run, ttt=TestTimeTraining("score_first", score_first=FIRST))
    expected = score_first_ttt(
        twin(run),
        run.data.val_tokens,
        BitsPerByte(run.data.byte_table),
        FIRST,
        seq_len=32,
        stride=8,
        batch_windows=8,
    )

    score = run.callback(SlidingWindowBPB).scores[-1]
    assert (score.weights, score.windows) == ("quantised", "sliding, TTT score-first")
    assert score.bpb == pytest.approx(float(expected["bpb"]), rel=1e-9)
    assert (score.tokens, score.repeated, score.missed, score.legal) == (399, 0, 0, True)
    assert score.bpb != run.callback(SlidingWindowBPB).scores[-2].bpb
    evidence = run.callback(TestTimeTraining).report()
    assert evidence == {
        "method": "score_first",
        "trained_targets": 384,
        "chunks": 7,
        "scored_first": True,
    }
    # Neither the weights nor the artifact know of it.
    torch.testing.assert_close(run.module.state_dict(), plain.module.state_dict(), rtol=0, atol=0)
    artifacts = [r.callback(GPTQExport).exported.state_dict for r in (run, plain)]
    torch.testing.assert_close(*artifacts, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in run.module.parameters())


def test_full_scores_what_was_trained_on(golf_run):
    run = short(golf_run, ttt=TestTimeTraining("full", allow_illegal=True, full=FULL))
    gpt, data = twin(run), run.data
    train_on_all(gpt, data.val_tokens, FULL, seq_len=32, allow_illegal=True)
    loader = WindowLoader(data.val_tokens, seq_len=32, stride=8, batch_windows=8)
    expected = evaluate_windows(gpt, loader, BitsPerByte(data.byte_table))

    *_, before, score = run.callback(SlidingWindowBPB).scores
    assert score.bpb == pytest.approx(float(expected["bpb"]), rel=1e-9)
    assert score.bpb < before.bpb
    assert score.legal is False
    assert score.windows == "sliding, TTT before scoring: not legal"
    assert run.callback(SlidingWindowBPB).final_score() is before


def test_full_must_be_allowed():
    with pytest.raises(ValueError, match=r"set ttt\.allow_illegal to true"):
        TestTimeTraining("full")


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize(
    ("ttt", "key"),
    [
        (TestTimeTraining("score_first", score_first=FIRST), "bpb_ttt_score_first"),
        (TestTimeTraining("full", allow_illegal=True, full=FULL), "bpb_ttt_full_not_legal"),
    ],
    ids=["score_first", "full"],
)
@pytest.mark.parametrize("split", ["val", "test"])
def test_after_validate_and_test(golf_run, capsys, split, ttt, key, inference_mode):
    if inference_mode and split == "test":
        pytest.skip("the same code")
    run = short(golf_run)
    path = run.folder / "model.pgl"
    before = path.read_bytes()
    again = short(golf_run, folder="again", fit=False, ttt=ttt, inference_mode=inference_mode)
    evaluate = {"val": again.trainer.validate, "test": again.trainer.test}[split]

    (logged,) = evaluate(again.module, datamodule=again.data, ckpt_path=path, verbose=False)

    sliding = run.callback(SlidingWindowBPB).scores[-1].bpb
    assert logged[f"{split}/bpb"] == pytest.approx(sliding, rel=1e-9)
    assert not math.isclose(logged[f"{split}/{key}"], sliding, rel_tol=1e-6)
    assert ttt.report()["trained_targets"] == 384
    assert path.read_bytes() == before
    exported = run.callback(GPTQExport).exported.state_dict
    for name, parameter in again.module.gpt.named_parameters():
        assert torch.equal(parameter, exported[name]), name
    assert f"{logged[f'{split}/{key}']:.6f} bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("ttt", "message"),
    [
        (
            TestTimeTraining("score_first", score_first=TTTConfig(chunk_tokens=511)),
            r"ttt\.score_first\.chunk_tokens is 511 but a training sequence has 512 tokens",
        ),
        (
            TestTimeTraining("full", allow_illegal=True),
            r"ttt\.method full: 399 targets do not fill a training sequence of 512",
        ),
    ],
    ids=["score_first", "full"],
)
def test_lengths_that_do_not_fit_are_refused_when_a_run_begins(golf_run, ttt, message, stage):
    run = golf_run(fit=False, ttt=ttt, validation=SlidingWindowBPB(seq_len=512))
    begin = run.trainer.fit if stage == "fit" else run.trainer.validate
    with pytest.raises(ValueError, match=message):
        begin(run.module, datamodule=run.data)
    assert run.trainer.global_step == 0


def test_validation_during_training_does_not_adapt(golf_run):
    ttt = TestTimeTraining("score_first", score_first=FIRST)
    seen = []
    run_ttt = ttt._run
    ttt._run = lambda trainer, *rest: seen.append(trainer.global_step) or run_ttt(trainer, *rest)
    short(golf_run, ttt=ttt, validation=SlidingWindowBPB(stride_tokens=8, every_n_steps=1))
    assert seen == [3]


def test_without_an_artifact_the_averaging_source_is_adapted(golf_run, monkeypatch):
    monkeypatch.setattr(GPTQExport, "on_train_end", lambda *_: None)
    run = short(golf_run, ttt=TestTimeTraining("score_first", score_first=FIRST))
    score = run.callback(SlidingWindowBPB).scores[-1]
    assert (score.weights, score.windows) == ("ema", "sliding, TTT score-first")


def test_the_settings_are_those_of_the_published_runs():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(TestTimeTraining).parameters.items()
    }
    first, full = defaults["score_first"], defaults["full"]
    assert (first.chunk_tokens, first.lr, first.epochs, first.batch_seqs) == (32768, 0.002, 3, 32)
    assert (full.lr, full.epochs, full.batch_seqs) == (0.008, 25, 256)
    assert first.momentum == 0.9
    assert full.momentum == 0.9
    assert first.grad_clip_norm == 1.0


@pytest.mark.slow
def test_a_compiled_module_adapts_as_an_eager_one(golf_run, tiny_gpt):
    bpb = []
    for compile in (False, True):
        run = short(
            golf_run,
            folder=f"compile_{compile}",
            module=GolfModule(tiny_gpt, compile=compile),
            ttt=TestTimeTraining("score_first", score_first=FIRST),
        )
        compiled = run.callback(TestTimeTraining)._loss
        assert hasattr(compiled, "_torchdynamo_orig_callable") == compile
        bpb.append(run.callback(SlidingWindowBPB).scores[-1].bpb)
    assert bpb[1] == pytest.approx(bpb[0], rel=0.05)


def test_the_report_lists_it_only_if_it_is_on(golf_run):
    found = []
    for method in ("off", "score_first"):
        run = short(golf_run, folder=method, ttt=TestTimeTraining(method, score_first=FIRST))
        report = json.loads((run.folder / "report.json").read_text())
        found.append([row for row in report["techniques"] if row["technique"].startswith("test-")])
    assert found[0] == []
    assert found[1][0]["setting"] == "score-first"
    assert found[1][0]["acted"] == "on 384 validation targets"
