"""Bombs and members that do not belong end in an ArtifactError before they are unpacked."""

import io
import tracemalloc
import zipfile

import pytest

from pgl.artifact.container import unpack
from tests.artifact.archives import rebuild, refuse, reseal


def craft(whole, extra, method=zipfile.ZIP_STORED, skip=()):
    """Copy the archive with members added, keeping the order and the seal."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            if info.filename not in skip:
                new.writestr(info, old.read(info))
        for name, data in extra:
            new.writestr(name, data, compress_type=method)
        new.comment = b"sha256:" + bytes(64)
    return reseal(buffer.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("weights/scales", "two members"),
        ("weights/../../etc/passwd", "no artifact has"),
        ("/etc/passwd", "no artifact has"),
        ("source/pgl\\x.py", "no artifact has"),
        ("source//x.py", "no artifact has"),
        ("other", "no artifact has"),
    ],
)
def test_members_that_do_not_belong(whole, tmp_path, name, match):
    refuse(craft(whole, [(name, b"x")]), tmp_path / "m", match)


def test_bombs_in_the_archive(whole, tmp_path):
    zeros = bytes(20_000_000)
    bomb = craft(whole, [("weights/bomb", zeros)], zipfile.ZIP_DEFLATED)
    refuse(bomb, tmp_path / "m", "not stored plainly")
    manifest, streams = unpack(whole)
    padded = manifest + b" " * 20_000_000
    refuse(rebuild(padded, streams), tmp_path / "m", "too large")
    many = craft(whole, [(f"source/{i}.py", b"") for i in range(5000)])
    refuse(many, tmp_path / "m", "too many")


def lie_about_first_size(data, num_bytes):
    """Announce another size of the first member, in its own header and in the directory."""
    data = bytearray(data)
    for position in (22, data.index(b"PK\x01\x02") + 24):
        data[position : position + 4] = num_bytes.to_bytes(4, "little")
    return reseal(data)


@pytest.mark.parametrize("claimed_bytes", [100, 50_000_000])
@pytest.mark.parametrize(
    ("method", "match"),
    [
        (zipfile.ZIP_BZIP2, "neither stored nor deflated"),
        (zipfile.ZIP_LZMA, "neither stored nor deflated"),
        (zipfile.ZIP_DEFLATED, "not a readable archive|too large"),
    ],
)
def test_bombs_in_the_manifest(tmp_path, method, match, claimed_bytes):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("manifest.json", bytes(50_000_000), method, compresslevel=1)
        archive.comment = b"sha256:" + bytes(64)
    bomb = lie_about_first_size(buffer.getvalue(), claimed_bytes)
    assert len(bomb) < 300_000
    tracemalloc.start()
    refuse(bomb, tmp_path / "m", match)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


def test_other_zip_files_are_not_artifacts(tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a", b"b")
    refuse((tmp_path / "z").read_bytes(), tmp_path / "m", "is not a pgl artifact")
