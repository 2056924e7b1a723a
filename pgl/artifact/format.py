"""Save a packed model to one file, load it back.

The file is a zip archive that ``python FILE`` can run: manifest, weight streams, and the source
that reads and runs them. Its length is the size that the challenge counts. Loading runs no code
from it, unpickles nothing, and allocates no more than the model that its manifest describes.
``docs/artifact.md`` has the layout.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pgl.artifact.codecs import compress_best, decompress
from pgl.artifact.container import looks_like_artifact, pack, read_file, unpack
from pgl.artifact.errors import ArtifactError, ArtifactTooLarge, CodecError
from pgl.artifact.manifest import (
    Manifest,
    StreamRecord,
    check_table,
    read_manifest,
    write_manifest,
)
from pgl.artifact.size import SizeReport, measure, order0_bytes
from pgl.artifact.source import code_only, source_files
from pgl.artifact.streams import code_layout, from_streams, make_table, plan_streams, to_streams
from pgl.challenge import ARTIFACT_LIMIT_BYTES
from pgl.io import atomic_write
from pgl.model import GPT, GPTConfig
from pgl.quant.stored import StoredTensor, dequantize_state


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact."""

    config: GPTConfig
    """Architecture of the model."""

    state_dict: dict[str, Tensor]
    """Dequantised weights, in the dtypes that the model keeps them in."""

    manifest: dict[str, Any]
    """The manifest as it stands in the file: writer, tensor table, streams, metadata."""

    def model(self) -> GPT:
        """Build the model with the artifact's weights, in evaluation mode."""
        model = GPT(self.config)
        model.load_state_dict(self.state_dict)
        return model.eval()


@dataclass(frozen=True)
class Packed:
    """A finished artifact in memory."""

    data: bytes
    size: SizeReport

    def write(self, path: str | os.PathLike[str]) -> SizeReport:
        """Write the file, whole or not at all, and return what its parts take.

        Raises:
            ArtifactTooLarge: It is longer than its limit; nothing is written.
        """
        total_bytes, limit_bytes = self.size.total_bytes, self.size.limit_bytes
        if limit_bytes is not None and total_bytes > limit_bytes:
            raise ArtifactTooLarge(
                f"{path} would be {total_bytes:,} bytes, {total_bytes - limit_bytes:,} more than "
                f"the limit of {limit_bytes:,}: nothing was written"
            )
        with atomic_write(path) as file:
            file.write(self.data)
        return self.size


def pack_model(
    config: GPTConfig,
    stored: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any] | None = None,
    codec: str = "zstd",
    limit_bytes: int | None = ARTIFACT_LIMIT_BYTES,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Packed:
    """Make an artifact in memory. The same input gives the same bytes.

    Args:
        config: Architecture of the model.
        stored: Its whole state dict as :func:`pgl.quant.quantize_state` returns it.
        metadata: JSON values to keep in the manifest, e.g. the tokenizer's SHA-256.
        codec: Name of the codec, see :data:`pgl.artifact.CODECS`.
        limit_bytes: Largest length of the file, None for any. It may still be longer: whoever
            writes it finds out.
        on_progress: Called after each stream with the share of all bytes that it was.

    Raises:
        ValueError: The tensors are not those of the model, the codec cannot be used, or the
            metadata are not JSON values.
    """
    # A kernel is a property of the machine that the model was trained on.
    config = replace(config, attention_backend="auto", kernels="auto")
    table = make_table(stored)
    try:
        check_table(table, config)
    except ArtifactError as error:
        raise ValueError(f"cannot pack this model: it {error}") from error
    records, packed = {}, {}
    raw = to_streams(table, stored)
    raw_bytes = max(sum(map(len, raw.values())), 1)
    for name, plan in plan_streams(table).items():
        used, packed[name] = compress_best(codec, raw[name], code_layout(plan))
        digest = hashlib.sha256(raw[name]).hexdigest()
        records[name] = StreamRecord(used, len(packed[name]), len(raw[name]), digest)
        on_progress(len(raw[name]) / raw_bytes)
    manifest = write_manifest(config, table, records, metadata or {})
    archive = pack(manifest, _main_source(), packed, source_files())
    order0 = {name: order0_bytes(data) for name, data in raw.items()}
    return Packed(archive.data, measure(archive, table, records, limit_bytes, order0))


def save(
    path: str | os.PathLike[str],
    config: GPTConfig,
    stored: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any] | None = None,
    codec: str = "zstd",
    limit_bytes: int | None = ARTIFACT_LIMIT_BYTES,
) -> SizeReport:
    """Write an artifact; see :func:`pack_model` for the arguments.

    Returns:
        What each part takes.

    Raises:
        ArtifactTooLarge: The file would be longer than `limit_bytes`; nothing is written.
        ValueError: As :func:`pack_model`.
    """
    return pack_model(config, stored, metadata, codec, limit_bytes).write(path)


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: The file is not an artifact, is damaged, was written by a newer pgl or does
            not describe a model; one sentence that names the file and says which.
    """
    data = read_file(path)
    try:
        manifest_json, packed = unpack(data)
        manifest = read_manifest(manifest_json)
        stored = from_streams(manifest.table, _decompress_all(manifest, packed))
    except ArtifactError as error:
        raise ArtifactError(f"{path} {error}") from error
    return Artifact(manifest.config, dequantize_state(stored), manifest.contents)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Tell from its first bytes whether a file is an artifact; it may still be damaged."""
    try:
        with open(path, "rb") as file:
            return looks_like_artifact(file.read(64))
    except OSError:
        return False


def _decompress_all(manifest: Manifest, packed: Mapping[str, bytes]) -> dict[str, bytes]:
    if packed.keys() != manifest.streams.keys():
        raise ArtifactError("has other weight streams than its manifest lists")
    raw = {}
    for name, record in manifest.streams.items():
        if len(packed[name]) != record.packed_bytes:
            raise ArtifactError(f"has a stream {name} of another size than its manifest says")
        layout = code_layout(manifest.plans[name])
        try:
            raw[name] = decompress(record.codec, packed[name], record.raw_bytes, layout)
        except CodecError as error:
            raise ArtifactError(f"cannot decompress its stream {name}: {error}") from error
        if hashlib.sha256(raw[name]).hexdigest() != record.raw_sha256:
            raise ArtifactError(f"has a damaged stream {name}: its checksum does not match")
    return raw


def _main_source() -> bytes:
    spec = importlib.util.find_spec("pgl.artifact.describe")
    assert spec is not None
    return code_only(spec.loader.get_source(spec.name)).encode()  # type: ignore[union-attr]
