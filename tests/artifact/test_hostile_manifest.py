"""Manifests that lie about the archive end in an ArtifactError that says what is wrong."""

import json

import pytest

from pgl.artifact.container import unpack
from tests.artifact.archives import rebuild, refuse


def with_manifest(whole, change):
    """Rebuild the archive around a changed manifest."""
    manifest_json, streams = unpack(whole)
    manifest = json.loads(manifest_json)
    changed = change(manifest)
    return rebuild(json.dumps(manifest if changed is None else changed).encode(), streams)


def set_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(manifest):
        place = manifest
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def drop(*keys):
    def change(manifest):
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


def repeat_first_tensor(manifest):
    manifest["tensors"].append(manifest["tensors"][0])


def rename_first_tensor(manifest):
    manifest["tensors"][0]["name"] = "blocks.0.attn.c_x.weight"


def code_vector(manifest):
    manifest["tensors"][0].update(group="control", kind="int6", shape=[256])


STREAM = ("streams", "attention.int6")
LIES = {
    "other format": (set_in("format", "zip"), "another format"),
    "newer version": (
        set_in("version", 99),
        r"was written by pgl \S+, format version 99; this pgl reads up to 1: upgrade",
    ),
    "version of a wrong type": (set_in("version", True), "format version"),
    "no version": (drop("version"), "format version"),
    "no tensors": (drop("tensors"), "tensors"),
    "not a table": (lambda manifest: [1, 2], "another format"),
    "unknown setting": (set_in("config", "warp_drive", 1), "warp_drive.*upgrade"),
    "setting of a wrong type": (set_in("config", "num_layers", "two"), "num_layers"),
    "boolean layers": (set_in("config", "num_layers", True), "num_layers"),
    "huge setting": (set_in("config", "model_dim", 10**12), "model_dim"),
    "huge rope": (set_in("config", "rope_train_len", 10**15), "rope_train_len"),
    "impossible model": (set_in("config", "num_heads", 7), "model configuration"),
    "unknown choice": (set_in("config", "mlp_activation", "sin"), "mlp_activation"),
    "list for a number": (set_in("config", "rope_base", [1.0]), "rope_base"),
    "infinite setting": (set_in("config", "rope_base", float("inf")), "rope_base"),
    "no configuration": (drop("config"), "configuration"),
    "more layers than tensors": (set_in("config", "num_layers", 60_000), "too few"),
    "a layer for each five tensors": (set_in("config", "num_layers", 5), "too few"),
    "a layer more": (set_in("config", "num_layers", 3), "lacks the tensor"),
    "other width": (set_in("config", "mlp_hidden", 32), "shape"),
    "repeated tensor": (repeat_first_tensor, "twice"),
    "renamed tensor": (rename_first_tensor, "tensor"),
    "tensor missing": (drop("tensors", 0), "lacks|calls for"),
    "negative shape": (set_in("tensors", 0, "shape", [-1, -16]), "malformed"),
    "absurd shape": (set_in("tensors", 0, "shape", [2**40, 2**40]), "malformed"),
    "large shape": (set_in("tensors", 0, "shape", [2**25, 2**25]), "weights"),
    "more weights than a model has": (set_in("tensors", 0, "shape", [2**14, 2**13]), "weights"),
    "boolean shape": (set_in("tensors", 0, "shape", [True, 16]), "malformed"),
    "code vector": (code_vector, "malformed"),
    "unknown kind": (set_in("tensors", 0, "kind", "int4"), "malformed"),
    "kind of a wrong type": (set_in("tensors", 0, "kind", ["int6"]), "malformed"),
    "unknown dtype": (set_in("tensors", 0, "dtype", "complex64"), "malformed"),
    "other group": (set_in("tensors", 0, "group", "mlp"), "group"),
    "extra column": (set_in("tensors", 0, "offset", 5), "malformed"),
    "row not a table": (set_in("tensors", 0, 5), "malformed"),
    "too many tensors": (set_in("tensors", [None] * 20_000), "too many"),
    "stream missing": (drop(*STREAM), "streams"),
    "stream too many": (set_in("streams", "x", {}), "streams"),
    "stream size": (set_in(*STREAM, "raw_bytes", 10**9), "claims"),
    "stream record": (set_in(*STREAM, "raw_bytes", "many"), "malformed"),
    "packed size": (set_in(*STREAM, "packed_bytes", 1), "another size"),
    "codec": (set_in(*STREAM, "codec", "pickle"), "pickle"),
    "checksum": (set_in(*STREAM, "raw_sha256", "0" * 64), "checksum"),
}


@pytest.mark.parametrize("lie", LIES)
def test_manifest_that_lies(whole, tmp_path, lie):
    change, match = LIES[lie]
    refuse(with_manifest(whole, change), tmp_path / "m", match)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version":' + b"9" * 6000 + b"}", b"null", b"NaN"],
)
def test_manifest_that_is_not_one(whole, tmp_path, manifest):
    refuse(rebuild(manifest, unpack(whole)[1]), tmp_path / "m", "manifest")


def test_swapped_and_missing_streams(whole, tmp_path):
    manifest, streams = unpack(whole)
    names = sorted(streams)
    refuse(rebuild(manifest, {n: streams[n] for n in names[1:]}), tmp_path / "m", "streams")
    other = {**streams, names[0]: streams[names[1]]}
    refuse(rebuild(manifest, other), tmp_path / "m", "stream")
    refuse(rebuild(manifest, {**streams, "x": b""}), tmp_path / "m", "streams")
