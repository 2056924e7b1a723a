"""Archives that are cut or changed at random end in an ArtifactError, or hold the same weights."""

import json
import random
import re
import resource

import pytest
import torch

from pgl.artifact import CODECS, ArtifactError, codecs, rans
from pgl.artifact.container import unpack
from tests.artifact.archives import loads, rebuild, refuse, reseal


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
def test_many_mutations(codec, all_rans, pack_tiny, tmp_path):
    count = -(-12_000 // len(CODECS))
    whole = pack_tiny(codec)
    assert codecs_used(whole) == ({"rans", "lzma"} if codec == "rans" else {codec})
    before = resource.getrusage(resource.RUSAGE_SELF)
    check_depth(fuzz(whole, tmp_path / "m", count), count)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KiB, for a file of 60 KB
    assert after.ru_utime - before.ru_utime < count * 0.05


@pytest.mark.parametrize("codec", ["rans", "lzma"])
def test_mutations_of_other_codecs(codec, all_rans, pack_tiny, tmp_path):
    whole = pack_tiny(codec)
    assert codec in codecs_used(whole)
    check_depth(fuzz(whole, tmp_path / "m", 200), 200)


def test_every_truncation(whole, tmp_path):
    for kept in [*range(0, len(whole), len(whole) // 50), len(whole) - 1]:
        refuse(whole[:kept], tmp_path / "m")
