import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch

import pgl.artifact.format
from pgl.artifact import (
    CODECS,
    ArtifactError,
    ArtifactTooLarge,
    describe,
    is_artifact,
    load,
    save,
)
from pgl.model import GPT, GPTConfig
from pgl.quant import QuantConfig, dequantize_state, quantize_state


@pytest.fixture
def path(tmp_path, tiny_config, tiny_stored):
    save(tmp_path / "model.pgl", tiny_config, tiny_stored, {"tokenizer_sha256": "4f5e"})
    return tmp_path / "model.pgl"


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip(codec, tmp_path, tiny_config, tiny_stored, tiny_state):
    report = save(tmp_path / "m", tiny_config, tiny_stored, {"note": [1, "a"]}, codec)
    assert report.total_bytes == os.path.getsize(tmp_path / "m")
    artifact = load(tmp_path / "m")
    assert artifact.config == tiny_config
    assert artifact.manifest["metadata"] == {"note": [1, "a"]}
    expected = dequantize_state(tiny_stored)
    assert artifact.state_dict.keys() == tiny_state.keys()
    for name, tensor in artifact.state_dict.items():
        assert tensor.dtype == tiny_state[name].dtype
        assert torch.equal(tensor, expected[name])


def test_model_runs_as_the_dequantised_one(path, tiny_config, tiny_stored):
    reference = GPT(tiny_config)
    reference.load_state_dict(dequantize_state(tiny_stored))
    ids = torch.randint(40, (2, 7))
    model = load(path).model()
    assert not model.training
    torch.testing.assert_close(model(ids), reference(ids), rtol=0, atol=0)


def test_same_input_same_bytes(tmp_path, tiny_config, tiny_stored):
    for name, stored in (("a", tiny_stored), ("b", dict(reversed(tiny_stored.items())))):
        save(tmp_path / name, tiny_config, stored)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_too_large_says_by_how_much_and_leaves_nothing(tmp_path, tiny_config, tiny_stored):
    size = save(tmp_path / "fits", tiny_config, tiny_stored).total_bytes
    save(tmp_path / "fits", tiny_config, tiny_stored, limit_bytes=size)
    before = (tmp_path / "fits").read_bytes()
    for name in ("fits", "new"):
        with pytest.raises(ArtifactTooLarge, match=r" 7 more than the limit"):
            save(tmp_path / name, tiny_config, tiny_stored, limit_bytes=size - 7)
    assert os.listdir(tmp_path) == ["fits"]
    assert (tmp_path / "fits").read_bytes() == before


@pytest.mark.slow
def test_a_full_size_artifact_loads_in_seconds(tmp_path):
    config = GPTConfig(
        num_layers=11,
        mlp_hidden=1536,
        bigram_buckets=1536,
        value_embedding_layers=[9, 10],
        embedding_dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = GPT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in shapes.items():
        weight = torch.randn(tensor.shape, generator=generator)
        if weight.ndim == 2:  # rows of trained matrices spread over octaves
            weight *= 0.07 * torch.exp2(0.7 * torch.randn(len(weight), 1, generator=generator))
        state[name] = weight.to(tensor.dtype)
    report = save(tmp_path / "m", config, quantize_state(state, QuantConfig()), codec="rans")
    assert report.parameters > 26_000_000
    mlp = next(group for group in report.groups if group.name == "mlp")
    assert mlp.codecs == ("rans",)
    assert mlp.bits_per_weight < mlp.order0_bits_per_weight
    start = time.process_time()
    load(tmp_path / "m")
    assert time.process_time() - start < 5


def test_python_runs_it(path):
    done = subprocess.run(
        [sys.executable, "-I", "-S", path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == describe(str(path))
    assert "tokenizer_sha256: 4f5e" in done.stdout
    assert "--ckpt_path" in done.stdout
    assert "numpy and zstandard" in done.stdout
    assert f"{os.path.getsize(path):,} bytes" in done.stdout


RUN_FROM_WITHIN = """
import sys
import time
sys.path.insert(0, sys.argv[1] + "/source")
import pgl, torch
assert pgl.__file__.startswith(sys.argv[1]), pgl.__file__
from pgl.artifact import load, save
from pgl.quant import QuantConfig, quantize_state
artifact = load(sys.argv[1])
print(artifact.model()(torch.arange(6)[None]).double().sum().item())
stored = quantize_state(artifact.state_dict, QuantConfig(passthrough_max_numel=150))
save(sys.argv[1] + ".again", artifact.config, stored)
"""


def test_the_file_alone_is_enough(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN_FROM_WITHIN, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = load(path).model()(torch.arange(6)[None]).double().sum().item()
    assert float(done.stdout) == pytest.approx(expected)
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(f"{path}.again") as two:
        sources = [n for n in one.namelist() if n.startswith("source/")]
        assert [one.read(n) for n in sources] == [two.read(n) for n in sources]


def test_loading_runs_no_code_from_the_file(path, tmp_path):
    target = tmp_path / "evil"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    evil = b"raise SystemExit('ran')"
    manifest = members.pop("manifest.json")
    streams = {
        n.removeprefix("weights/"): d for n, d in members.items() if n.startswith("weights/")
    }
    source = {n.removeprefix("source/"): evil for n in members if n.startswith("source/")}
    packed = pgl.artifact.format.pack(manifest, evil, streams, source)
    target.write_bytes(packed.data)
    load(target)


def test_is_artifact(path, tmp_path, tiny_state):
    assert is_artifact(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:100])
    assert is_artifact(tmp_path / "cut")
    torch.save(tiny_state, tmp_path / "checkpoint")
    (tmp_path / "empty").touch()
    for name in ("checkpoint", "empty", "absent", "."):
        assert not is_artifact(tmp_path / name)
        with pytest.raises(ArtifactError, match=name):
            load(tmp_path / name)


def test_wrong_tensors_are_refused_when_saving(tmp_path, tiny_config, tiny_stored):
    lacking = dict(tiny_stored)
    del lacking["smear.gate"]
    with pytest.raises(ValueError, match=r"lacks the tensor smear.gate"):
        save(tmp_path / "m", tiny_config, lacking)
    with pytest.raises(ValueError, match="'extra'"):
        save(tmp_path / "m", tiny_config, {**tiny_stored, "extra": tiny_stored["smear.gate"]})
    with pytest.raises(ValueError, match="shape"):
        save(tmp_path / "m", replace(tiny_config, mlp_hidden=32), tiny_stored)
    with pytest.raises(ValueError, match="metadata"):
        save(tmp_path / "m", tiny_config, tiny_stored, {"bad": object()})
    with pytest.raises(ValueError, match='"7z" is unknown'):
        save(tmp_path / "m", tiny_config, tiny_stored, codec="7z")
    assert not os.listdir(tmp_path)


def test_manifest_is_readable_by_anyone(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["format"] == "parameter-golf-artifact"
    assert manifest["writer"] == f"pgl {pgl.__version__}"
    assert manifest["config"]["num_layers"] == 2
    rows = {row["name"]: row for row in manifest["tensors"]}
    assert rows["tok_emb.weight"]["dtype"] == "bfloat16"
    assert rows["blocks.0.mlp.fc.weight"]["kind"] == "int6"
