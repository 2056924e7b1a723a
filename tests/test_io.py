import os

import pytest

from pgl.io import atomic_write, sha256_file


def test_file_appears_whole(tmp_path):
    with atomic_write(tmp_path / "a" / "x.bin") as file:
        file.write(b"abc")
        assert not (tmp_path / "a" / "x.bin").exists()
    assert (tmp_path / "a" / "x.bin").read_bytes() == b"abc"
    assert os.listdir(tmp_path / "a") == ["x.bin"]


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")

    def fail():
        with atomic_write(tmp_path / "x.bin") as file:
            file.write(b"new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert (tmp_path / "x.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")
