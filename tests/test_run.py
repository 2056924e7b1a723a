"""The whole path: train, average, quantise, pack, read back, score, report; and resume."""

import json
import random

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks import (
    EMAConfig,
    GPTQExport,
    RunCheckpoint,
    SlidingWindowBPB,
    SnapshotConfig,
    TrainingMetrics,
    WallClockBudget,
    WeightAveraging,
)
from pgl.artifact import is_artifact, load
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.data import Text, TokenDataModule
from pgl.module import GolfModule
from pgl.quant import QuantConfig
from pgl.trainer import GolfTrainer


@pytest.fixture
def finished(golf_run):
    return golf_run()


def test_a_run_leaves_exactly_these_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {name for name in names if "tfevents" not in name} == {
        "hparams.yaml",
        "last.ckpt",
        "model.pgl",
        "report.json",
        "report.md",
    }
    assert sum("tfevents" in name for name in names) == 1


def test_the_report_says_what_happened(finished):
    report = json.loads((finished.folder / "report.json").read_text())
    assert report["training"]["steps"] == 6
    assert report["training"]["tokens"] == 6 * 256
    stages = [(score["weights"], score["windows"]) for score in report["scores"]]
    assert stages == [
        ("raw", "chunked"),
        ("ema", "chunked"),
        ("quantised", "chunked"),
        ("quantised", "sliding"),
    ]
    assert {score["tokens"] for score in report["scores"]} == {399}
    assert report["artifact"]["total_bytes"] == (finished.folder / "model.pgl").stat().st_size
    counting = [n for n, phase in report["budget"]["phases"].items() if phase["counts"]]
    assert counting == ["train"]
    assert len(report["data"]["tokenizer_sha256"]) == 64
    markdown = (finished.folder / "report.md").read_text()
    assert f"{report['scores'][-1]['bpb']:.6f}" in markdown


def test_a_run_whose_weights_are_bfloat16_trains_exports_and_scores(golf_run):
    budget = WallClockBudget(seconds=None, steps=2, warmup_steps=0)
    run = golf_run(precision="bf16-true", budget=budget)
    assert run.module.gpt.bigram.scale.dtype == torch.bfloat16
    assert run.module.optimizer_config.grad_clip_norm is not None
    assert load(run.folder / "model.pgl").state_dict.keys() == run.module.gpt.state_dict().keys()
    raw, *others = [score.bpb for score in run.callback(SlidingWindowBPB).scores]
    assert others == pytest.approx([raw] * 3, rel=1e-2)


def test_validate_scores_the_artifact_as_the_run_did(finished, golf_run):
    again = golf_run("again", fit=False)
    score = again.trainer.validate(
        again.module, datamodule=again.data, ckpt_path=finished.folder / "model.pgl", verbose=False
    )
    reported = finished.callback(SlidingWindowBPB).scores[-1].bpb
    assert score[0]["val/bpb"] == pytest.approx(reported, rel=1e-9)


def test_validate_scores_the_average_of_a_checkpoint(finished, golf_run):
    again = golf_run("again", fit=False, validation=SlidingWindowBPB(stride_tokens=32))
    again.trainer.validate(
        again.module, datamodule=again.data, ckpt_path=finished.folder / "last.ckpt", verbose=False
    )
    ema = finished.callback(SlidingWindowBPB).scores[1]
    assert ema.weights == "ema"
    assert float(again.module.last_score["bpb"]) == pytest.approx(ema.bpb, rel=1e-9)


def test_a_checkpoint_holds_plain_values_and_rebuilds_the_module(finished):
    path = finished.folder / "last.ckpt"
    torch.load(path, weights_only=True)
    module = GolfModule.load_from_checkpoint(path, weights_only=True)
    assert module.gpt_config == finished.module.gpt_config


def test_resuming_an_interrupted_run_gives_the_same_result(golf_run):
    whole = golf_run("whole")
    part = golf_run("part", extra=(StopAfter(3),), checkpoint=RunCheckpoint(every_steps=3))
    assert part.trainer.global_step == 3
    resumed = golf_run("resumed", ckpt_path=part.folder / "last.ckpt")
    assert resumed.trainer.global_step == 6
    assert_same_state(whole, resumed)


def test_resuming_a_run_that_crashed_before_export_exports(golf_run):
    whole = golf_run("whole")
    (whole.folder / "model.pgl").rename(whole.folder / "kept.pgl")
    resumed = golf_run("resumed", ckpt_path=whole.folder / "last.ckpt")
    assert resumed.trainer.global_step == 6
    weights = load(resumed.folder / "model.pgl").state_dict
    for name, weight in load(whole.folder / "kept.pgl").state_dict.items():
        assert torch.equal(weights[name], weight)
    assert_same_state(whole, resumed)


def test_time_already_used_stays_used(golf_run):
    budget = WallClockBudget(seconds=1000, steps=2, warmup_steps=0)
    first = golf_run("first", budget=budget)
    used = first.callback(WallClockBudget).elapsed
    again = WallClockBudget(seconds=1000, steps=4, warmup_steps=0)
    golf_run("second", budget=again, ckpt_path=first.folder / "last.ckpt")
    assert used > 0
    assert again.elapsed > used


def test_an_artifact_cannot_be_resumed_from(finished, golf_run):
    with pytest.raises(ValueError, match=r"model\.pgl is an artifact.*last\.ckpt"):
        golf_run("again", ckpt_path=finished.folder / "model.pgl")


def test_export_makes_the_artifact_of_a_checkpoint(finished, golf_run, tmp_path, capsys):
    again = golf_run("again", fit=False)
    assert isinstance(again.trainer, GolfTrainer)
    out = tmp_path / "exported.pgl"
    again.trainer.export(again.module, again.data, finished.folder / "last.ckpt", str(out))
    assert is_artifact(out)
    assert "total" in capsys.readouterr().out
    exported = again.callback(GPTQExport).exported
    for name, weight in finished.callback(GPTQExport).exported.state_dict.items():
        torch.testing.assert_close(exported.state_dict[name], weight, rtol=0, atol=0)
    checkpoint = torch.load(finished.folder / "last.ckpt", weights_only=True)
    trained_seconds, *_ = checkpoint["callbacks"]["WallClockBudget"]["phases"]["train"]
    metadata = load(out).manifest["metadata"]
    assert metadata["training_steps"] == 6
    assert metadata["training_seconds"] == round(trained_seconds, 3) > 0


@pytest.mark.parametrize("source", ["raw", "ema", "swa"])
def test_export_takes_the_average_that_is_asked_for(golf_run, tmp_path, source):
    settings = {"ema": EMAConfig(decay=0.5), "swa": SnapshotConfig(1, start_scale=2.0)}
    first = golf_run(averaging=WeightAveraging(**settings, source="ema"))
    again = golf_run("again", fit=False, averaging=WeightAveraging(**settings, source=source))
    plain = GPTQExport(QuantConfig(passthrough_max_numel=10**9, small_dtype="float32"))
    again.trainer.callbacks[again.trainer.callbacks.index(again.callback(GPTQExport))] = plain
    out = tmp_path / "exported.pgl"
    again.trainer.export(again.module, again.data, first.folder / "last.ckpt", str(out))
    expected = first.callback(WeightAveraging).weights(first.module, source)
    name = "blocks.0.mlp.fc.weight"
    torch.testing.assert_close(load(out).state_dict[name], expected[name], rtol=0, atol=0)


def test_export_of_an_average_that_was_not_kept_is_refused(finished, golf_run):
    swa = WeightAveraging(EMAConfig(), SnapshotConfig(), source="swa")
    again = golf_run("again", fit=False, averaging=swa)
    with pytest.raises(ValueError, match=r"no swa average: set --averaging.source to raw or ema"):
        again.trainer.export(again.module, again.data, finished.folder / "last.ckpt")


def test_export_of_a_mean_of_one_snapshot_is_refused(golf_run):
    averages = {"ema": EMAConfig(), "swa": SnapshotConfig(6, start_scale=2.0)}
    first = golf_run(averaging=WeightAveraging(**averages, source="ema"))
    assert first.callback(WeightAveraging).averages["swa"].count == 1
    again = golf_run("again", fit=False, averaging=WeightAveraging(**averages, source="swa"))
    with pytest.raises(ValueError, match=r"no swa average: set --averaging.source to raw or ema$"):
        again.trainer.export(again.module, again.data, first.folder / "last.ckpt")


def test_export_with_another_tokenizer_is_refused(finished, golf_run, tmp_path):
    letters = "".join(random.Random(0).choices("abcdefghijklmnop. ", k=20_000))
    (tmp_path / "other.txt").write_text(letters)
    text = Text(
        [str(tmp_path)], str(tmp_path / "cache"), 320, val_fraction=0.1, document_separator="."
    )
    other = TokenDataModule(text, seq_len=32, batch_tokens=256, micro_batch_tokens=64)
    again = golf_run("again", fit=False, data=other)
    with pytest.raises(ValueError, match=r"trained with the tokenizer .* set data\.source to the"):
        again.trainer.export(again.module, again.data, finished.folder / "last.ckpt")
    assert other.vocab_size == finished.data.vocab_size


def test_export_with_another_data_module_is_refused(finished, golf_run, tiny_corpus):
    class OtherData(TokenDataModule):
        pass

    other = OtherData(tiny_corpus, seq_len=32, batch_tokens=256, micro_batch_tokens=64)
    again = golf_run("again", fit=False, data=other)
    with pytest.raises(ValueError, match=r"was not trained with .*OtherData: give the data"):
        again.trainer.export(again.module, again.data, finished.folder / "last.ckpt")


def test_export_on_several_devices_is_refused(golf_run):
    run = golf_run(fit=False, devices=2)
    with pytest.raises(ValueError, match=r"runs on one device: set trainer\.devices to 1"):
        run.trainer.export(run.module, run.data, "last.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pgl_format": 99}, "format 99.*upgrade pgl"),
        ({"callbacks": {}}, r"other\.ckpt is not a checkpoint of a pgl run"),
    ],
)
def test_export_of_another_programs_checkpoint_is_refused(
    finished, golf_run, tmp_path, change, message
):
    checkpoint = torch.load(finished.folder / "last.ckpt", weights_only=True)
    GolfCheckpointIO().save_checkpoint({**checkpoint, **change}, tmp_path / "other.ckpt")
    again = golf_run("again", fit=False)
    with pytest.raises(ValueError, match=message):
        again.trainer.export(again.module, again.data, tmp_path / "other.ckpt")


def test_warm_up_leaves_no_trace(golf_run):
    cold = golf_run("cold")
    warm = golf_run("warm", budget=WallClockBudget(seconds=None, steps=6, warmup_steps=2))
    assert_same_state(cold, warm)


class StopAfter(Callback):
    """Ends a run early, as a crash right after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.should_stop = True


def assert_same_state(expected, actual):
    """Weights, optimizer, averages and counters are equal bit for bit."""
    torch.testing.assert_close(
        actual.module.state_dict(), expected.module.state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(
        actual.trainer.optimizers[0].state_dict()["state"],
        expected.trainer.optimizers[0].state_dict()["state"],
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        actual.callback(WeightAveraging).state_dict(),
        expected.callback(WeightAveraging).state_dict(),
        rtol=0,
        atol=0,
    )
    assert actual.callback(TrainingMetrics).clipped_steps == (
        expected.callback(TrainingMetrics).clipped_steps
    )
    scores = [score.bpb for score in expected.callback(SlidingWindowBPB).scores]
    assert [score.bpb for score in actual.callback(SlidingWindowBPB).scores] == scores
