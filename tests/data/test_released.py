"""Files of every released version are still read, and give what they gave."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pgl
from pgl.artifact import load
from pgl.artifact.manifest import VERSION
from pgl.module import CHECKPOINT_FORMAT, check_format

HERE = Path(__file__).resolve().parent
VERSIONS = sorted(path.name for path in (HERE / "released").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_released", HERE / "make_released.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["model.pgl", "last.ckpt"])
def test_a_released_file_still_gives_the_same_losses(version, name, maker):
    expected = json.loads((HERE / "released" / version / "expected.json").read_text())
    found = maker.losses(HERE / "released" / version / name, expected["ids"])
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected["losses"][name]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_file_says_who_wrote_it(version):
    folder = HERE / "released" / version
    assert load(folder / "model.pgl").manifest["writer"] == f"pgl {version}"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["pgl_version"] == version
    check_format(checkpoint)


def test_this_version_and_these_formats_have_their_files():
    expected = json.loads((HERE / "released" / pgl.__version__ / "expected.json").read_text())
    found = (expected["pgl"], expected["artifact_format"], expected["checkpoint_format"])
    # Raise the version and run make_released.py where a format has changed.
    assert found == (pgl.__version__, VERSION, CHECKPOINT_FORMAT)


@pytest.mark.parametrize("version", VERSIONS)
def test_released_files_are_small(version):
    for path in (HERE / "released" / version).iterdir():
        assert path.stat().st_size < 100_000


def test_the_maker_writes_what_it_expects(maker, tmp_path):
    maker.make(tmp_path / "again")
    expected = json.loads((tmp_path / "again" / "expected.json").read_text())
    for name, losses in expected["losses"].items():
        assert maker.losses(tmp_path / "again" / name, expected["ids"]) == losses
        assert 3 < sum(losses) / len(losses) < 9
