"""Files that are cut, flipped or made to deceive end in an ArtifactError, nothing else."""

import io
import json
import random
import re
import resource
import tracemalloc
import zipfile

import pytest
import torch

from pgl.artifact import CODECS, ArtifactError, codecs, load, rans, save
from pgl.artifact.container import pack, seal, unpack


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config, tiny_stored):
    return packed_with("zstd", tmp_path_factory, tiny_config, tiny_stored)


def packed_with(codec, tmp_path_factory, config, stored):
    path = tmp_path_factory.mktemp("artifact") / "m"
    save(path, config, stored, codec=codec)
    return path.read_bytes()


def loads(data, path):
    path.write_bytes(data)
    return load(path)


def refuse(data, path, match=None):
    with pytest.raises(ArtifactError, match=match) as caught:
        loads(data, path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert len(message) < len(str(path)) + 250
    assert "\n" not in message
    return message


def reseal(data):
    return seal(bytes(data[:-64]))


def with_manifest(whole, change):
    """Rebuild the archive around a changed manifest."""
    manifest_json, streams = unpack(whole)
    manifest = json.loads(manifest_json)
    changed = change(manifest)
    return rebuild(json.dumps(manifest if changed is None else changed).encode(), streams)


def rebuild(manifest_json, streams):
    return pack(manifest_json, b"", streams, {}).data


def mutate(whole, rng):
    data = bytearray(whole)
    kind = rng.choice(["flip", "byte", "cut", "grow", "splice", "zero"])
    # Weights and source are most of the file; the structures at both ends deserve more hits.
    limit = rng.choice([200, 3000, len(data)])
    position = rng.randrange(limit)
    streams = data.index(b"weights/"), data.index(b"source/")
    position = rng.choice([position, len(data) - 1 - position, rng.randrange(*streams)])
    if kind == "flip":
        data[position] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[position] = rng.randrange(256)
    elif kind == "cut":
        del data[position : position + rng.choice([1, 100, len(data)])]
    elif kind == "grow":
        data[position:position] = rng.randbytes(rng.choice([1, 4, 100]))
    elif kind == "splice":
        start = rng.randrange(len(data))
        data[position : position + 50] = data[start : start + 50]
    else:
        data[position : position + 8] = bytes(8)
    return bytes(data)


def mutate_content(manifest, streams, rng):
    """Change the manifest or a stream and rebuild the archive around it: every checksum holds."""
    name = rng.choice([None, rng.choice(sorted(streams))])
    data = bytearray(json.dumps(manifest).encode() if name is None else streams[name])
    position = rng.randrange(min(len(data), rng.choice([16, 200, len(data)])))
    kind = rng.choice(["flip", "byte", "cut", "grow", "zero", "digit"])
    if kind == "flip":
        data[position] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[position] = rng.randrange(256)
    elif kind == "cut":
        del data[position : position + rng.choice([1, 4, len(data)])]
    elif kind == "grow":
        data[position:position] = rng.randbytes(rng.choice([1, 4, 100]))
    elif kind == "zero":
        data[position : position + 4] = bytes(4)
    else:
        digits = [place for place, byte in enumerate(data) if 48 <= byte < 58] or [position]
        data[rng.choice(digits)] = 48 + rng.randrange(10)
    if name is None:
        return rebuild(bytes(data), streams)
    record = {**manifest["streams"][name], "packed_bytes": len(data)}
    changed = {**manifest, "streams": {**manifest["streams"], name: record}}
    return rebuild(json.dumps(changed).encode(), {**streams, name: bytes(data)})


def weights_or_message(data, path):
    try:
        return loads(data, path).state_dict
    except ArtifactError as error:
        return str(error)


def fuzz(whole, path, count):
    """Change an archive `count` times; return the messages that it is refused with.

    What the checks behind the checksum let pass must be the same weights: the change was in the
    source, a date, a note, a setting that has no weights.
    """
    rng = random.Random(count)
    expected = loads(whole, path).state_dict
    manifest_json, streams = unpack(whole)
    manifest = json.loads(manifest_json)
    messages = []
    for number in range(count):
        if number % 2:
            data = mutate_content(manifest, streams, rng)
        else:
            data = mutate(whole, rng)
            if data == whole:
                continue
            refuse(data, path)
            data = reseal(data) if len(data) > 64 else data
        found = weights_or_message(data, path)
        if isinstance(found, str):
            assert found.startswith(f"{path} ")
            messages.append(found)
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    return messages


def check_depth(messages, count):
    """The fuzz reached the codecs and the manifest's checks, and something survived it."""
    from_codec = sum("cannot decompress" in message for message in messages)
    from_checksum = sum("damaged stream" in message for message in messages)
    from_archive = sum("archive" in message for message in messages)
    kinds = {re.sub("[^a-z ]", "", message.split(" ", 1)[1])[:20] for message in messages}
    assert from_codec > count / 20
    assert from_codec + from_checksum > count / 8
    assert from_archive > count / 20
    # Half of the changes of content are in the manifest; many leave the weights as they are.
    assert len(messages) - from_codec - from_checksum - from_archive > count / 12
    assert len(kinds) > 10
    assert len(messages) < count


@pytest.fixture
def all_rans(monkeypatch):
    """Streams of codes are rans however short they are, and have several lanes."""
    monkeypatch.setattr(codecs, "_SHORT_STREAM_BYTES", 0)
    monkeypatch.setattr(rans, "STEPS_PER_LANE", 64)


def codecs_used(whole):
    manifest = json.loads(unpack(whole)[0])
    return {record["codec"] for record in manifest["streams"].values()}


def test_mutations(whole, tmp_path):
    check_depth(fuzz(whole, tmp_path / "m", 300), 300)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_many_mutations(codec, all_rans, tmp_path_factory, tiny_config, tiny_stored, tmp_path):
    count = -(-12_000 // len(CODECS))
    whole = packed_with(codec, tmp_path_factory, tiny_config, tiny_stored)
    assert codecs_used(whole) == ({"rans", "lzma"} if codec == "rans" else {codec})
    before = resource.getrusage(resource.RUSAGE_SELF)
    check_depth(fuzz(whole, tmp_path / "m", count), count)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KiB, for a file of 60 KB
    assert after.ru_utime - before.ru_utime < count * 0.05


@pytest.mark.parametrize("codec", ["rans", "lzma"])
def test_mutations_of_other_codecs(
    codec, all_rans, tmp_path_factory, tiny_config, tiny_stored, tmp_path
):
    whole = packed_with(codec, tmp_path_factory, tiny_config, tiny_stored)
    assert codec in codecs_used(whole)
    check_depth(fuzz(whole, tmp_path / "m", 200), 200)


def test_every_truncation(whole, tmp_path):
    for kept in [*range(0, len(whole), len(whole) // 50), len(whole) - 1]:
        refuse(whole[:kept], tmp_path / "m")


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
