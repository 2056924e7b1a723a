"""Export: what calibrates GPTQ, the limit, the codec, and settings that are refused at once."""

import numpy as np
import pytest
import torch

from callbacks import GPTQExport, WallClockBudget
from pgl.artifact import ArtifactTooLarge, load
from pgl.data.stream import BatchLayout
from pgl.quant import QuantConfig, TensorRule


class Forbidden:
    """Stands for the validation tokens: whoever touches it fails."""

    def __getattr__(self, name):
        raise AssertionError(f"validation tokens were read: {name}")

    __len__ = __getitem__ = __iter__ = __array__ = __getattr__


def quant(method):
    rule = TensorRule(method=method)
    return QuantConfig(attention=rule, mlp=rule, passthrough_max_numel=0)


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
    assert gptq.errors[name].relative > 0

    for codec in ("zstd", "lzma", "rans"):
        exporter.codec = codec
        exporter.export(trainer, module, weights, tmp_path / f"{codec}.pgl")
        streams = load(tmp_path / f"{codec}.pgl").manifest["streams"]
        assert codec in {stream["codec"] for stream in streams.values()}

    metadata = load(tmp_path / "gptq.pgl").manifest["metadata"]
    assert metadata["training_steps"] == 2
    assert metadata["tokenizer_sha256"] == data.tokenizer_sha256

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_bytes": 0}, "artifact.limit_bytes"),
        ({"calibration_sequences": 0}, "artifact.calibration_sequences"),
        ({"codec": "zip"}, 'codec "zip" is unknown: choose one of'),
    ],
)
def test_bad_settings_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTQExport(**settings)
