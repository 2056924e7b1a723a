"""Packed bytes that are rebuilt with something wrong in them, and how each is refused."""

import pytest

from pgl.artifact import ArtifactError, load
from pgl.artifact.container import pack, seal


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


def rebuild(manifest_json, streams):
    return pack(manifest_json, b"", streams, {}).data
