"""The outer shell of an artifact: a zip archive that ends in a checksum of all that precedes it."""

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from pgl.artifact.errors import ArtifactError

MANIFEST = "manifest.json"
MAIN = "__main__.py"
WEIGHTS = "weights/"
SOURCE = "source/"

MAX_FILE_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 1 << 24
MAX_MEMBERS = 4096

_SEAL_MARK = b"sha256:"
_SEAL_BYTES = 64
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # zip's zero: the same model gives the same bytes
_START = struct.Struct("<4s22xHH")  # signature and the lengths of name and extra field
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError,
    NotImplementedError, RuntimeError, ValueError, KeyError, IndexError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class PackedArchive:
    """A finished archive and what its members take in it."""

    data: bytes
    member_bytes: dict[str, int]


def pack(
    manifest: bytes, main: bytes, streams: Mapping[str, bytes], source: Mapping[str, bytes]
) -> PackedArchive:
    """Build an archive in memory. Weight streams are stored as they are, text is deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        _add(archive, MANIFEST, manifest, zipfile.ZIP_DEFLATED)
        _add(archive, MAIN, main, zipfile.ZIP_DEFLATED)
        for name, data in streams.items():
            _add(archive, WEIGHTS + name, data, zipfile.ZIP_STORED)
        for name, data in source.items():
            _add(archive, SOURCE + name, data, zipfile.ZIP_DEFLATED)
        archive.comment = _SEAL_MARK + bytes(_SEAL_BYTES)
        infos = archive.infolist()
    body = buffer.getvalue()[:-_SEAL_BYTES]
    return PackedArchive(seal(body), {info.filename: info.compress_size for info in infos})


def seal(body: bytes) -> bytes:
    """Append the checksum of an archive's bytes to them."""
    return body + hashlib.sha256(body).hexdigest().encode()


def looks_like_artifact(start: bytes) -> bool:
    """Tell from its first bytes whether a file is an artifact, whole or not."""
    if len(start) < _START.size:
        return False
    signature, name_bytes, _ = _START.unpack_from(start)
    name = start[_START.size : _START.size + name_bytes]
    return signature == b"PK\x03\x04" and name == MANIFEST.encode()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read an artifact whole and check its checksum.

    Raises:
        ArtifactError: It is not an artifact, is too large or is damaged.
    """
    try:
        num_bytes = os.path.getsize(path)
        if num_bytes > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} is {num_bytes:,} bytes, too large for an artifact")
        with open(path, "rb") as file:
            data = file.read(num_bytes)  # Python allocates what it is asked for, not what it gets
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if not looks_like_artifact(data[:64]):
        raise ArtifactError(f"{path} is not a pgl artifact")
    body = data[:-_SEAL_BYTES]
    if not body.endswith(_SEAL_MARK) or seal(body) != data:
        raise ArtifactError(
            f"{path} is damaged: its checksum does not match, copy or download it again"
        )
    return data


def unpack(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Return the manifest and the weight streams of an archive; nothing else is decompressed.

    Raises:
        ArtifactError: A member is not one of an artifact's, appears twice, lies about its size or
            cannot be read. The message has no file name; the caller adds it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_members(infos)
            members = {
                info.filename: _read(archive, info)
                for info in infos
                if info.filename == MANIFEST or info.filename.startswith(WEIGHTS)
            }
    except ArtifactError:
        raise
    except _UNREADABLE as error:
        raise ArtifactError(f"is not a readable archive: {error!s:.80}") from error
    if MANIFEST not in members:
        raise ArtifactError(f"has no {MANIFEST}")
    manifest = members.pop(MANIFEST)
    return manifest, {name.removeprefix(WEIGHTS): stream for name, stream in members.items()}


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a member; a directory that lies about its size costs no more than that size."""
    with archive.open(info) as file:
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise ArtifactError(f"has a member of another size than it says: {info.filename!r:.80}")
    return data


def _add(archive: zipfile.ZipFile, name: str, data: bytes, method: int) -> None:
    info = zipfile.ZipInfo(name, _TIMESTAMP)
    info.compress_type = method
    info.create_system = 3  # the same on every platform
    info.external_attr = 0o644 << 16
    archive.writestr(info, data, compresslevel=9)


def _check_members(infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if len(names) > MAX_MEMBERS:
        raise ArtifactError(f"has {len(names)} members, too many for an artifact")
    if len(set(names)) != len(names):
        raise ArtifactError("has two members of one name")
    for info in infos:
        name = info.filename
        parts = name.split("/")
        is_known = name in (MANIFEST, MAIN) or (
            name.startswith((WEIGHTS, SOURCE)) and not {"", ".", ".."} & set(parts)
        )
        if not is_known or "\\" in name:
            raise ArtifactError(f"has a member that no artifact has: {name!r:.80}")
        # Python inflates what other methods hold without a bound.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArtifactError(f"has a member that is neither stored nor deflated: {name!r:.80}")
        if name.startswith(WEIGHTS) and (
            info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
        ):
            raise ArtifactError(f"has a weight stream that is not stored plainly: {name!r:.80}")
        if name == MANIFEST and info.file_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"has a {MANIFEST} of {info.file_size:,} bytes, too large")
