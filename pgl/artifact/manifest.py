"""The manifest: what the weight streams hold, as JSON, and the checks before it is believed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pgl
from pgl.artifact.errors import ArtifactError
from pgl.artifact.model_config import config_from_dict, config_to_dict, expected_shapes
from pgl.artifact.streams import StreamPlan, TableEntry, plan_streams
from pgl.model import GPTConfig
from pgl.model.config import MAX_PARAMETERS
from pgl.quant.groups import tensor_group
from pgl.quant.stored import CODE_KINDS, DTYPES

FORMAT = "parameter-golf-artifact"
VERSION = 1
MAX_TENSORS = 16_384
TENSORS_PER_LAYER = 6  # four projections of attention, two of the MLP; a layer has more


@dataclass(frozen=True)
class StreamRecord:
    """What the manifest says about one stream."""

    codec: str
    packed_bytes: int
    raw_bytes: int
    raw_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked against itself and against the model it describes."""

    config: GPTConfig
    table: list[TableEntry]
    plans: dict[str, StreamPlan]
    streams: dict[str, StreamRecord]
    contents: dict[str, Any]
    """The JSON as it stands in the file."""


def write_manifest(
    config: GPTConfig,
    table: Sequence[TableEntry],
    streams: Mapping[str, StreamRecord],
    metadata: Mapping[str, Any],
) -> bytes:
    """Return the manifest as JSON.

    Raises:
        ValueError: The metadata are not JSON values.
    """
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "writer": f"pgl {pgl.__version__}",
        "config": config_to_dict(config),
        "tensors": [asdict(entry) for entry in table],
        "streams": {name: asdict(record) for name, record in streams.items()},
        "metadata": dict(metadata),
    }
    try:
        return json.dumps(contents, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the artifact's metadata must be plain JSON values: {error}") from error


def read_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest; no weight is touched and nothing large is allocated.

    Raises:
        ArtifactError: Anything is missing, unknown, contradictory or absurd. The message has no
            file name; the caller adds it.
    """
    try:
        contents = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"has a manifest that is not JSON: {error!s:.80}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ArtifactError("has the manifest of another format")
    _check_version(contents)
    for name, kind in (("tensors", list), ("streams", dict), ("metadata", dict)):
        if not isinstance(contents.get(name), kind):
            raise ArtifactError(f'has a manifest without "{name}"')
    table = _read_table(contents["tensors"])
    config = config_from_dict(contents.get("config"))
    check_table(table, config)
    plans = plan_streams(table)
    streams = _read_streams(contents["streams"], plans)
    return Manifest(config, table, plans, streams, contents)


def check_table(table: Sequence[TableEntry], config: GPTConfig) -> None:
    """Compare a tensor table with the state dict of the model that a configuration builds.

    Raises:
        ArtifactError: A tensor is missing, unexpected or of another shape.
    """
    # This bounds the time to build the model on the meta device.
    if config.num_layers * TENSORS_PER_LAYER > len(table):
        raise ArtifactError(
            f"has {len(table)} tensors, too few for a model of {config.num_layers} layers"
        )
    try:
        expected = expected_shapes(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ArtifactError(f"describes a model that cannot be built: {error!s:.80}") from error
    found = {entry.name: entry.shape for entry in table}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ArtifactError(f"lacks the tensor {name} that its model configuration calls for")
        if name not in expected:
            raise ArtifactError(f"has the tensor {name!r:.80} that its model does not have")
        if found[name] != expected[name]:
            raise ArtifactError(
                f"has {name} in shape {found[name]}, but its model needs {expected[name]}"
            )


def _check_version(contents: dict[str, Any]) -> None:
    version = contents.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError("has a manifest without a format version")
    if version > VERSION:
        raise ArtifactError(
            f"was written by {contents.get('writer')!s:.40}, format version {version}; this pgl "
            f"reads up to {VERSION}: upgrade"
        )


def _read_table(rows: list[Any]) -> list[TableEntry]:
    if len(rows) > MAX_TENSORS:
        raise ArtifactError(f"lists {len(rows)} tensors, too many for an artifact")
    table = [_read_entry(row) for row in rows]
    if len({entry.name for entry in table}) != len(table):
        raise ArtifactError("lists a tensor twice")
    if sum(entry.numel for entry in table) > MAX_PARAMETERS:
        raise ArtifactError(f"claims more than {MAX_PARAMETERS:,} weights")
    return table


def _read_entry(row: Any) -> TableEntry:
    fields = {"name", "group", "kind", "dtype", "shape"}
    if not isinstance(row, dict) or row.keys() != fields:
        raise ArtifactError("has a tensor table with a malformed row")
    name, kind, shape = row["name"], row["kind"], row["shape"]
    is_sound = (
        isinstance(name, str)
        and isinstance(shape, list)
        and len(shape) <= 8
        and all(type(size) is int and 0 <= size <= MAX_PARAMETERS for size in shape)
        and isinstance(kind, str)
        and kind in (*DTYPES, *CODE_KINDS)
        and isinstance(row["dtype"], str)
        and row["dtype"] in DTYPES
    )
    if not is_sound or (kind in CODE_KINDS and len(shape) != 2):
        raise ArtifactError(f"has a malformed tensor table row for {name!r:.80}")
    if row["group"] != tensor_group(name, len(shape)):
        raise ArtifactError(f"puts {name!r:.80} into the wrong group of tensors")
    return TableEntry(name, row["group"], kind, row["dtype"], tuple(shape))


def _read_streams(rows: dict[str, Any], plans: Mapping[str, StreamPlan]) -> dict[str, StreamRecord]:
    if rows.keys() != plans.keys():
        raise ArtifactError("lists other weight streams than its tensor table calls for")
    streams = {}
    for name, row in rows.items():
        types = {"codec": str, "packed_bytes": int, "raw_bytes": int, "raw_sha256": str}
        if (
            not isinstance(row, dict)
            or row.keys() != types.keys()
            or any(type(row[key]) is not kind for key, kind in types.items())
        ):
            raise ArtifactError(f"has a malformed record of its stream {name}")
        streams[name] = StreamRecord(**row)
        if streams[name].raw_bytes != plans[name].num_bytes:
            raise ArtifactError(
                f"claims {row['raw_bytes']} bytes for its stream {name}, where the tensor table "
                f"calls for {plans[name].num_bytes}"
            )
    return streams
