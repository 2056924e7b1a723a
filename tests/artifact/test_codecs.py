import contextlib
import lzma
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.artifact import codecs
from pgl.artifact.codecs import CODECS, compress, decompress
from pgl.artifact.errors import CodecError

BYTE_CODECS = [name for name, codec in CODECS.items() if not codec.codes_only]


@pytest.mark.parametrize("codec", BYTE_CODECS)
@given(data=st.binary(max_size=3000))
@settings(max_examples=25, deadline=None)
def test_round_trip(codec, data):
    assert decompress(codec, compress(codec, data), len(data)) == data


@pytest.mark.parametrize("codec", BYTE_CODECS)
def test_another_size_than_announced_is_refused(codec):
    packed = compress(codec, bytes(1000))
    for num_bytes in (0, 999, 1001):
        with pytest.raises(CodecError):
            decompress(codec, packed, num_bytes)


@pytest.mark.parametrize("codec", BYTE_CODECS)
def test_damage_is_refused_or_changes_bytes_only(codec):
    data = bytes(range(256)) * 20
    packed = compress(codec, data)
    for position in range(0, len(packed), 3):
        broken = bytearray(packed)
        broken[position] ^= 0x41
        with contextlib.suppress(CodecError):
            assert len(decompress(codec, bytes(broken), len(data))) == len(data)
    for kept in (0, 1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(CodecError):
            decompress(codec, packed[:kept], len(data))


def peak_memory(action):
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("codec", BYTE_CODECS)
def test_a_bomb_does_not_go_off(codec):
    data = bytes(20_000_000)
    if codec == "lzma":  # with a small dictionary, which is all that it may allocate
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
        bomb = lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)
    else:
        bomb = compress(codec, data)

    def refuse():
        with pytest.raises(CodecError):
            decompress(codec, bomb, 1000)

    assert peak_memory(refuse) < 5_000_000


def test_a_lying_zstd_header_allocates_nothing():
    # Frame header of 2 GiB of content with a window descriptor of its own, then no block.
    frame = b"\x28\xb5\x2f\xfd" + b"\x80\x50" + (1 << 31).to_bytes(4, "little")
    assert zstandard.frame_content_size(frame) == 1 << 31

    def refuse():
        with pytest.raises(CodecError):
            decompress("zstd", frame, 1000)

    assert peak_memory(refuse) < 1_000_000


def test_a_wide_lzma_dictionary_is_refused():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    packed = lzma.compress(b"abc", format=lzma.FORMAT_XZ, filters=filters)
    with pytest.raises(CodecError, match=r"(?i)memory"):
        decompress("lzma", packed, 3)


def test_unknown_codecs_are_named():
    with pytest.raises(ValueError, match='"gzip" is unknown'):
        compress("gzip", b"")
    with pytest.raises(CodecError, match='"gzip" is unknown'):
        decompress("gzip", b"", 0)


@pytest.mark.parametrize(("codec", "package"), [("brotli", "brotli"), ("zstd", "zstandard")])
def test_a_missing_package_is_named(monkeypatch, codec, package):
    monkeypatch.delitem(codecs.CODECS, codec, raising=False)
    with pytest.raises(ValueError, match=f"needs the package {package}.*install"):
        compress(codec, b"")


def test_settings_are_the_strongest():
    data = b"".join(f"{i * i % 977} ".encode() for i in range(5000))
    assert len(compress("zstd", data)) <= len(zstandard.ZstdCompressor(level=3).compress(data))
    assert len(compress("lzma", data)) <= len(lzma.compress(data, preset=0))
