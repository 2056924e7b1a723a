"""Export: what calibrates GPTQ, the limit, the codec, and settings that are refused at once."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from callbacks import GPTQExport, WallClockBudget
from pgl.artifact import ArtifactTooLarge, load
from pgl.data.stream import BatchLayout
from pgl.quant import GPTQConfig, QuantConfig, TensorRule


class Forbidden:
    """Stands for the validation tokens: whoever touches it fails."""

    def __getattr__(self, name):
        raise AssertionError(f"validation tokens were read: {name}")

    __len__ = __getitem__ = __iter__ = __array__ = __getattr__


def quant(method, steps="grid"):
    rule = TensorRule(method=method)
    gptq = GPTQConfig(steps=steps)
    return QuantConfig(attention=rule, mlp=rule, passthrough_max_numel=0, gptq=gptq)


def weights_of(run):
    return {name: p.detach() for name, p in run.module.gpt.named_parameters()}


def test_calibration_limit_and_codec(golf_run, tmp_path, monkeypatch):
    exporter = GPTQExport(quant("gptq"), calibration_sequences=6)
    run = golf_run(budget=WallClockBudget(seconds=None, steps=2, warmup_steps=0), artifact=exporter)
    phases = run.callback(WallClockBudget).report()["phases"]
    assert phases["calibrate"]["counts"], "calibration is part of the budget"
    trainer, module, data = run.trainer, run.module, run.data
    weights = {name: p.detach() for name, p in module.gpt.named_parameters()}

    # GPTQ reads the first training sequences and nothing of the validation text.
    data.val_tokens = Forbidden()
    seen = []
    read = BatchLayout.read_micro_batch

    def recorded(self, stream, step, micro_step):
        assert stream is data.stream
        seen.append(read(self, stream, step, micro_step))
        return seen[-1]

    monkeypatch.setattr(BatchLayout, "read_micro_batch", recorded)
    gptq = exporter.export(trainer, module, weights, tmp_path / "gptq.pgl")
    tokens = data.stream.read(0, 6 * 32)
    np.testing.assert_array_equal(np.concatenate(seen)[:, :-1].ravel(), tokens)
    after = {name: p.detach() for name, p in module.gpt.named_parameters()}
    torch.testing.assert_close(after, weights, rtol=0, atol=0)

    # Rounding needs no tokens at all, and gives other weights.
    exporter.quant = quant("round")
    seen.clear()
    rounded = exporter.export(trainer, module, weights, tmp_path / "round.pgl")
    assert not seen
    name = "blocks.0.mlp.fc.weight"
    assert not torch.equal(gptq.state_dict[name], rounded.state_dict[name])
    assert gptq.losses[name].relative > 0

    for codec in ("zstd", "lzma", "rans"):
        exporter.codec = codec
        exporter.export(trainer, module, weights, tmp_path / f"{codec}.pgl")
        streams = load(tmp_path / f"{codec}.pgl").manifest["streams"]
        assert codec in {stream["codec"] for stream in streams.values()}

    metadata = load(tmp_path / "gptq.pgl").manifest["metadata"]
    assert metadata["training_steps"] == 2
    assert metadata["tokenizer_sha256"] == data.tokenizer_sha256

    # Without its source, manifest and values the file cannot be.
    exporter.limit_bytes = 10_000
    with pytest.raises(ArtifactTooLarge, match="10,000"):
        exporter.export(trainer, module, weights, tmp_path / "large.pgl")
    assert not [path for path in tmp_path.iterdir() if "large" in path.name]


def test_a_run_without_room_for_its_artifact_says_so_and_keeps_its_checkpoint(golf_run, tmp_path):
    with pytest.raises(ArtifactTooLarge):
        golf_run(
            budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
            artifact=GPTQExport(limit_bytes=1000),
        )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "last.ckpt" in names
    assert not [name for name in names if "pgl" in name]


def test_every_calibration_acts_and_none_reads_validation_tokens(golf_run, tmp_path):
    exporter = GPTQExport(quant("gptq", steps="balanced"), calibration_sequences=4)
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0),
        artifact=GPTQExport(),
    )
    # Whoever opens a validation shard, or looks at the tokens that are open, fails.
    data = run.data
    data.val_tokens = Forbidden()
    data.corpus = replace(data.corpus, val_shards=Forbidden())
    weights, budget = weights_of(run), run.callback(WallClockBudget)
    found = {}
    for calibration in ("training", "samples", "training_after_budget"):
        exporter.calibration = calibration
        before = budget.phases.phases.pop("calibrate", None)
        assert before is None or before.counts == (calibration == "samples")
        path = tmp_path / calibration
        exporter.exported = exporter.export(run.trainer, run.module, weights, path)
        found[calibration] = exporter.exported.state_dict
        report = exporter.report()["calibration"]
        assert report["source"] == calibration
        assert report["record_legal"] == (calibration != "training_after_budget")
        assert report["read"] == ("samples" if calibration == "samples" else "training tokens")
        assert report["counted"] == (calibration == "training")
        assert report["tokens_read_on_rank_0"] > 0
    assert not budget.phases.phases["calibrate"].counts
    same = found["training_after_budget"]
    again = exporter.export(run.trainer, run.module, weights, tmp_path / "again").state_dict
    for name, weight in found["training"].items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, again[name])
    assert any(not torch.equal(found["samples"][name], weight) for name, weight in same.items())


def test_calibration_after_the_budget_is_warned_of(golf_run):
    exporter = GPTQExport(quant("gptq"), calibration="training_after_budget")
    run = golf_run(fit=False, artifact=exporter)
    run.trainer.datamodule = run.data
    with pytest.warns(UserWarning, match="the challenge does not allow"):
        exporter.setup(run.trainer, run.module, "fit")


@pytest.fixture
def exported(golf_run, tmp_path):
    """Export one trained model with the settings of a callback."""
    run = golf_run(
        budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0), artifact=GPTQExport()
    )

    def export(**settings):
        exporter = GPTQExport(quant("round"), **{"codec": "rans", **settings})
        path = tmp_path / "searched.pgl"
        exporter.exported = exporter.export(run.trainer, run.module, weights_of(run), path)
        assert path.stat().st_size == exporter.exported.size.total_bytes
        return exporter.report()

    return export


def test_a_plan_over_the_limit_is_made_coarser_and_says_so(exported, capsys):
    plan = exported()
    limit_bytes = plan["total_bytes"] - 1500
    coarser = exported(limit_bytes=limit_bytes)
    assert plan["step_factor"] == 1 < coarser["step_factor"]
    assert coarser["total_bytes"] <= limit_bytes
    assert coarser["attempts"][0]["total_bytes"] == plan["total_bytes"]
    assert f"{plan['total_bytes']:,} bytes is over the limit" in capsys.readouterr().out


def test_the_search_uses_the_bytes_that_the_plan_leaves(exported):
    plan = exported()
    limit_bytes = plan["total_bytes"] + 1500
    finer = exported(limit_bytes=limit_bytes, search="step")
    assert finer["step_factor"] < 1
    assert plan["total_bytes"] < finer["total_bytes"] <= limit_bytes
    rows = {name: {row["name"]: row for row in r["groups"]} for name, r in
            (("plan", plan), ("finer", finer))}  # fmt: skip
    assert finer["headroom_bytes"] < 500
    errors = {name: groups["mlp"]["relative_error"] for name, groups in rows.items()}
    assert 0 < errors["finer"] < errors["plan"]
    assert set(rows["plan"]["mlp"]["kinds"]) == {"int6"}
    assert rows["finer"]["mlp"]["codecs"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "step", "limit_bytes": None}, "artifact.search is step"),
        ({"limit_bytes": 0}, "artifact.limit_bytes"),
        ({"calibration_sequences": 0}, "artifact.calibration_sequences"),
        ({"codec": "zip"}, 'codec "zip" is unknown: choose one of'),
    ],
)
def test_bad_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTQExport(**settings)


def test_the_report_says_what_quantisation_lost(golf_run):
    run = golf_run(artifact=GPTQExport(quant("gptq"), codec="rans", calibration_sequences=4))
    report = json.loads((run.folder / "report.json").read_text())
    scores = {(s["weights"], s["windows"]): s["bpb"] for s in report["scores"]}
    lost = report["quantisation"]
    assert lost["bpb_before"] == scores["ema", "chunked"]
    assert lost["bpb_after"] == scores["quantised", "chunked"]
    assert lost["bpb_lost"] == lost["bpb_after"] - lost["bpb_before"]
    text = (run.folder / "report.md").read_text()
    assert f"{lost['bpb_lost']:+.6f}" in text
    [mlp] = [line for line in text.splitlines() if line.startswith("| mlp ")]
    [row] = [row for row in report["artifact"]["groups"] if row["name"] == "mlp"]
    assert row["kinds"] == ["int6"]
    assert 0 < row["output_error"] < 1
    assert f"int6 {'+'.join(row['codecs'])} | {row['relative_error']:.2%}" in mlp


def test_export_without_a_clock_counts_nothing_and_warns(golf_run, tmp_path, recwarn):
    exporter = GPTQExport(quant("gptq"), calibration_sequences=4)
    run = golf_run(budget=WallClockBudget(seconds=None, steps=1, warmup_steps=0), artifact=exporter)
    [kept] = run.folder.glob("*.pgl")
    metadata = load(kept).manifest["metadata"]["calibration"]
    assert metadata["source"] == "training"
    assert metadata["sequences"] == 4
    assert metadata["counted"]
    for source in ("training", "samples"):
        exporter.calibration = source
        recwarn.clear()
        path = tmp_path / f"{source}.pgl"
        run.trainer.export(run.module, run.data, str(run.folder / "last.ckpt"), str(path))
        warned = [w for w in recwarn if "no training budget runs" in str(w.message)]
        assert bool(warned) == (source == "training")
        metadata = load(path).manifest["metadata"]["calibration"]
        assert metadata["source"] == source
        assert not metadata["counted"]
        assert metadata["record_legal"] == (source == "samples")
    phase = run.callback(WallClockBudget).phases.phases["calibrate on no clock"]
    assert phase.seconds > 0
    assert not phase.counts


def test_sequences_that_the_devices_cannot_share_are_refused_when_fit_begins(golf_run):
    run = golf_run(fit=False, artifact=GPTQExport(quant("gptq"), calibration_sequences=5))
    run.trainer.datamodule = run.data
    run.data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    exporter = run.callback(GPTQExport)
    with pytest.raises(ValueError, match="calibration_sequences=5 must be a multiple of the 2"):
        exporter.setup(run.trainer, run.module, "fit")
    exporter.setup(run.trainer, run.module, "validate")
    exporter.quant = quant("round")
    exporter.setup(run.trainer, run.module, "fit")


def test_many_samples_are_warned_of(golf_run):
    exporter = GPTQExport(quant("gptq"), calibration="samples", calibration_sequences=512)
    run = golf_run(fit=False, artifact=exporter)
    run.trainer.datamodule = run.data
    tokens = 512 * sum(range(1, 33))  # each token reads all before it
    with pytest.warns(UserWarning, match=f"512 calibration samples takes {tokens:,} tokens"):
        exporter.setup(run.trainer, run.module, "fit")


def test_the_report_has_the_error_of_the_chosen_factor(exported):
    assert exported()["output_error"] is None  # rounding has no Hessians


def test_the_artifact_has_the_configured_name_and_codec(golf_run):
    run = golf_run(artifact=GPTQExport(quant("round"), codec="lzma", file_name="small.pgl"))
    assert list(run.folder.glob("*.pgl")) == [run.folder / "small.pgl"]
    streams = load(run.folder / "small.pgl").manifest["streams"].values()
    assert "lzma" in {stream["codec"] for stream in streams}
    assert "zstd" not in {stream["codec"] for stream in streams}
