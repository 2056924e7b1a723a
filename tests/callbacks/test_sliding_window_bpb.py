"""When validation happens, which windows it reads, and that its scores are the naive ones."""

import json
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import BudgetProgress, GPTQExport, SlidingWindowBPB, WallClockBudget
from callbacks.sliding_window_bpb import _probe
from pgl.data import TokenDataModule
from pgl.evaluate import (
    BitsPerByte,
    CompiledScorer,
    ScoreMap,
    document_scores,
    evaluate_windows,
)
from pgl.model import GPT, GPTConfig
from pgl.model.rotary import rotary_table
from pgl.module import GolfModule
from pgl.warm_up import compiled_graphs


class Validations(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.bpb: list[float] = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.bpb.append(float(pl_module.last_score["bpb"]))


def naive(gpt, data, starts):
    """Score each target from the first of the given windows that holds it."""
    tokens = torch.from_numpy(data.val_tokens.astype("int64"))
    scored: dict[int, float] = {}
    for start in starts:
        window = tokens[start : start + data.seq_len + 1]
        with torch.no_grad():
            nats = gpt.token_losses(window[None, :-1], window[None, 1:])[0]
        for offset, value in enumerate(nats.tolist()):
            scored.setdefault(start + offset, value)
    assert sorted(scored) == list(range(len(tokens) - 1))
    num_bytes = int(data.byte_table.target_bytes(tokens[:-1], tokens[1:]).sum())
    return sum(scored.values()) / math.log(2) / num_bytes


def test_steps_and_scores(golf_run, monkeypatch):
    validations, scored = Validations(), []
    score = SlidingWindowBPB._score

    def counted(self, trainer, pl_module, weights, name, loader):
        scored.append(name)
        score(self, trainer, pl_module, weights, name, loader)

    monkeypatch.setattr(SlidingWindowBPB, "_score", counted)
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=5, warmup_steps=0),
        validation=SlidingWindowBPB(stride_tokens=8, every_n_steps=2),
        extra=(validations,),
    )
    # Optimizer steps, not micro-batches; the last one is Lightning's at the end of training.
    assert validations.steps == [2, 4, 5]
    assert scored == ["ema", "quantised", "quantised"]  # raw is known from the last validation
    scores = {(s.weights, s.windows): s.bpb for s in run.callback(SlidingWindowBPB).scores}
    assert scores["raw", "chunked"] == validations.bpb[-1]

    data, module = run.data, run.module.eval()
    chunks = [*range(0, 399 - 32, 32), 399 - 32]
    sliding = [*range(0, 399 - 32, 8), 399 - 32]
    assert scores["raw", "chunked"] == pytest.approx(naive(module.gpt, data, chunks), rel=1e-6)
    with module.with_weights(run.callback(GPTQExport).exported.state_dict):
        quantised = [naive(module.gpt, data, starts) for starts in (chunks, sliding)]
    assert scores["quantised", "chunked"] == pytest.approx(quantised[0], rel=1e-6)
    assert scores["quantised", "sliding"] == pytest.approx(quantised[1], rel=1e-6)


def test_validate_reads_sliding_windows_and_fit_reads_chunks(tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("fit")
    trainer = SimpleNamespace(
        datamodule=tiny_data,
        callbacks=[WallClockBudget(seconds=None, steps=9)],
        check_val_every_n_epoch=1,
        val_check_interval=1.0,
    )
    SlidingWindowBPB(stride_tokens=16, seq_len=24, batch_windows=3).setup(trainer, None, "validate")
    loader = tiny_data.val_dataloader()
    assert (loader.seq_len, loader.stride, loader.batch_windows) == (24, 16, 3)
    SlidingWindowBPB(stride_tokens=16, every_n_steps=3).setup(trainer, None, "fit")
    loader = tiny_data.val_dataloader()
    assert (loader.seq_len, loader.stride, loader.batch_windows) == (32, 32, 8)
    assert trainer.val_check_interval == 3 * tiny_data.layout.accumulate
    assert trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize("given", [None, 1, 500, "00:00:01:00"])
def test_an_interval_of_the_trainers_own_is_warned_of(golf_run, given):
    run = golf_run(fit=False, val_check_interval=given)
    run.trainer.datamodule = run.data
    run.data.setup("fit")
    validation = run.callback(SlidingWindowBPB)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validation.setup(run.trainer, run.module, "fit")
    said = ["trainer.val_check_interval is not used: set validation.every_n_steps"]
    assert [str(warning.message) for warning in caught] == (said if given else [])
    validation.every_n_steps = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the Trainer now has what an earlier fit set
        validation.setup(run.trainer, run.module, "fit")
    assert run.trainer.val_check_interval == 3 * run.data.layout.accumulate
    assert run.trainer._val_check_time_interval is None


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    "settings", [{"tail": "pr324"}, {"tail": "pr236", "stride_tokens": 500}], ids=str
)
def test_a_text_without_a_window_is_refused_when_a_run_begins(golf_run, settings, stage):
    run = golf_run(fit=False, validation=SlidingWindowBPB(seq_len=512, **settings))
    begin = run.trainer.fit if stage == "fit" else run.trainer.validate
    message = (
        r"validation\.tail pr\d+ makes no window of 399 targets: .* validation\.seq_len \(now 512"
    )
    with pytest.raises(ValueError, match=message):
        begin(run.module, datamodule=run.data)
    assert run.trainer.global_step == 0


def test_the_tail_reaches_the_windows(tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("validate")
    trainer = SimpleNamespace(datamodule=tiny_data)
    counts = {
        tail: sum(
            int((batch.stop_scored_B - batch.first_scored_B).sum())
            for batch in SlidingWindowBPB(stride_tokens=16, tail=tail).sliding_loader(trainer)
        )
        for tail in ("exact", "pr324")
    }
    assert counts["exact"] == 399
    assert counts["pr324"] < 399


def test_validate_scores_the_weights_that_are_named(golf_run):
    run = golf_run(budget=WallClockBudget(seconds=None, steps=3, warmup_steps=0))
    scores = {
        s.weights: s.bpb for s in run.callback(SlidingWindowBPB).scores if s.windows[0] == "c"
    }
    assert scores["raw"] != scores["ema"]
    for weights, expected in (("raw", "raw"), ("ema", "ema"), (None, "ema")):
        again = golf_run(
            f"again_{weights}",
            fit=False,
            validation=SlidingWindowBPB(stride_tokens=32, weights=weights),
        )
        (logged,) = again.trainer.validate(
            again.module, datamodule=again.data, ckpt_path=run.folder / "last.ckpt", verbose=False
        )
        assert logged["val/bpb"] == pytest.approx(scores[expected], rel=1e-9)


@pytest.mark.parametrize(
    ("file", "weights", "message"),
    [
        ("last.ckpt", "swa", r"validation\.weights is swa but the checkpoint holds raw, ema"),
        ("model.pgl", "ema", r"an artifact holds one set of weights"),
    ],
)
def test_weights_that_are_not_there_are_refused(golf_run, file, weights, message):
    run = golf_run(budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0))
    validation = SlidingWindowBPB(stride_tokens=32, weights=weights)
    again = golf_run("again", fit=False, validation=validation)
    with pytest.raises(ValueError, match=message):
        again.trainer.validate(
            again.module, datamodule=again.data, ckpt_path=run.folder / file, verbose=False
        )


def test_fit_does_not_choose(golf_run):
    with pytest.raises(ValueError, match=r"validation\.weights .* leave it unset"):
        golf_run(validation=SlidingWindowBPB(stride_tokens=8, weights="ema"))


def events(folder):
    accumulator = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0, "histograms": 0})
    return accumulator.Reload()


def test_the_analysis_is_written(golf_run):
    budget = {"seconds": None, "steps": 1, "warmup_steps": 0}
    run = golf_run(budget=WallClockBudget(**budget))
    logged, data, name = events(run.folder), run.data, "analysis/quantised_chunked"
    loader = data.chunk_loader()
    score_map = ScoreMap(399, 32)
    with run.module.with_weights(run.callback(GPTQExport).exported.state_dict):
        metric = BitsPerByte(data.byte_table)
        evaluate_windows(run.module.gpt, loader, metric, on_scores=score_map.add)

    curve = logged.Scalars(f"{name}/loss_by_position")
    assert [point.step for point in curve] == list(range(32))
    expected = score_map.nats_by_position().tolist()
    assert [point.value for point in curve] == pytest.approx(expected, rel=1e-5)
    documents = document_scores(score_map.nats(), data.val_tokens, data.byte_table)
    assert logged.Histograms(f"{name}/document_bpb")[0].histogram_value.num == len(documents)
    (text,) = logged.Tensors(f"{name}/worst_documents/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    worst = max(documents, key=lambda document: document.bpb)
    assert f"| {worst.bpb:.3f} | {worst.bytes:,} | {worst.index} | " in table
    assert "the" in table

    off = golf_run(
        "off",
        budget=WallClockBudget(**budget),
        validation=SlidingWindowBPB(stride_tokens=8, analysis=False),
    )
    assert not [tag for tag in events(off.folder).Tags()["scalars"] if "analysis" in tag]


def test_validate_analyses_what_it_scores(golf_run):
    run = golf_run(budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0))
    again = golf_run("again", fit=False)
    again.trainer.validate(
        again.module, datamodule=again.data, ckpt_path=run.folder / "model.pgl", verbose=False
    )
    curves = [events(folder) for folder in (run.folder, again.folder)]
    names = [f"analysis/{name}/loss_by_position" for name in ("quantised_sliding", "saved")]
    points = [[p.value for p in c.Scalars(n)] for c, n in zip(curves, names, strict=True)]
    assert points[0] == pytest.approx(points[1], rel=1e-6)


@pytest.mark.parametrize("stride", [16, 64])
def test_longer_windows_than_in_training_are_scored_with_rescaled_rope(golf_run, tiny_gpt, stride):
    config = GPTConfig(**{**vars(tiny_gpt), "rope_train_len": 32})
    run = golf_run(
        module=GolfModule(config),
        budget=WallClockBudget(seconds=None, steps=2, warmup_steps=0),
        validation=SlidingWindowBPB(stride_tokens=stride, seq_len=64),
    )
    # The same weights in a model whose frequencies are those of 64 tokens by themselves.
    base = 10_000.0 * 2 ** (16 / 14)
    longer = GPT(GPTConfig(**{**vars(config), "rope_train_len": 64, "rope_base": base}))
    longer.load_state_dict(run.callback(GPTQExport).exported.state_dict)
    loader = run.data.window_loader(64, stride)
    expected = evaluate_windows(longer.eval(), loader, BitsPerByte(run.data.byte_table))

    score = run.callback(SlidingWindowBPB).scores[-1]
    assert (score.seq_len, score.stride_tokens) == (64, stride)
    assert score.windows == ("sliding" if stride == 16 else "chunked")
    assert score.bpb == pytest.approx(float(expected["bpb"]), rel=1e-6)
    assert score.tokens == 399


def test_the_rope_table_of_4096_tokens_is_the_published_one(golden):
    reference = golden("rope")
    form = "324_full64_trainlen2048_4096"
    cos_TR, sin_TR = rotary_table(4096, 10_000.0, 64, 2048, torch.device("cpu"))
    rows = reference["positions_4096"]
    np.testing.assert_allclose(cos_TR[rows], reference[f"cos_{form}"], atol=1e-6)
    np.testing.assert_allclose(sin_TR[rows], reference[f"sin_{form}"], atol=1e-6)


def test_the_progress_bar_shows_the_running_score(golf_run, capsys):
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        progress=BudgetProgress(line_every_seconds=0),
    )
    printed = capsys.readouterr().out
    assert re.search(r"score quantised sliding +\d+%  \d\.\d{4} bits/byte", printed)
    again = golf_run("again", fit=False, progress=BudgetProgress(line_every_seconds=0))
    again.trainer.validate(
        again.module, datamodule=again.data, ckpt_path=run.folder / "model.pgl", verbose=False
    )
    assert re.search(r"validate +\d+%  \d\.\d{4} bits/byte", capsys.readouterr().out)


@pytest.mark.slow
def test_a_compiled_run_probes_the_graph_that_scored(golf_run, tiny_gpt):
    run = golf_run(
        module=GolfModule(tiny_gpt, compile=True),
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=1),
    )
    assert isinstance(run.module.score_batch, CompiledScorer)
    validation, graphs = run.callback(SlidingWindowBPB), compiled_graphs()
    assert validation.probes.scored.first == 32 - 8 + 4
    assert validation.probes.causal
    # Nothing is compiled for it: it is the graph of the shape that has been scored.
    with run.trainer.precision_plugin.val_step_context():
        again = _probe(run.module, validation.sliding_loader(run.trainer))
    assert again.causal
    assert compiled_graphs() == graphs


@pytest.mark.parametrize("settings", [{"seq_len": 1}, {"seq_len": 32, "max_val_tokens": 2}])
def test_windows_of_one_target_are_scored_and_not_probed(golf_run, tiny_corpus, settings):
    data = TokenDataModule(
        tiny_corpus, batch_tokens=128, spans_per_batch=4, **{"max_val_tokens": 60, **settings}
    )
    run = golf_run(
        data=data,
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        validation=SlidingWindowBPB(stride_tokens=1),
    )
    assert run.callback(SlidingWindowBPB).probes is None
    report = json.loads((run.folder / "report.json").read_text())
    assert report["scores"][-1]["tokens"] == len(data.val_tokens) - 1
    assert {
        "a score depends on earlier tokens only",
        "probabilities of all tokens sum to 1",
    } < set(report["legality"]["not_judged"])


@pytest.mark.parametrize("name", ["stride_tokens", "seq_len", "batch_windows", "every_n_steps"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=f"validation.{name} must be positive"):
        SlidingWindowBPB(**{name: 0})


def test_a_stride_longer_than_the_window_is_refused(tiny_data, tiny_gpt):
    with pytest.raises(ValueError, match="stride_tokens=64 must not exceed"):
        SlidingWindowBPB(stride_tokens=64, seq_len=32)
    trainer = SimpleNamespace(datamodule=tiny_data)
    with pytest.raises(ValueError, match="stride_tokens=64 must not exceed the window of 32"):
        SlidingWindowBPB(stride_tokens=64).setup(trainer, GolfModule(tiny_gpt), "validate")
