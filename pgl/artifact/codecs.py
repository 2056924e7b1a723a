"""The codecs of weight streams, in one table. Decompression is bounded by the announced size.

On a full-size model's int6 codes "rans" is the smallest and, at 4 s, by far the fastest to write:
zstd 22 and lzma 9e take half a minute, brotli a minute (one core).
"""

import io
import lzma
from collections.abc import Callable
from dataclasses import dataclass

from pgl.artifact import entropy
from pgl.artifact.entropy import Layout
from pgl.artifact.errors import CodecError

try:
    import brotli
except ImportError:
    brotli = None
try:
    import zstandard
except ImportError:  # whoever reads an artifact with the source inside it may do without
    zstandard = None

_PACKAGES = {"zstd": "zstandard", "brotli": "brotli >= 1.2"}

_SHORT_STREAM_BYTES = 1 << 20

_ZSTD_LEVEL = 22
_ZSTD_MAX_WINDOW_BYTES = 1 << 27
_LZMA_MEMORY_LIMIT_BYTES = 1 << 27
# One byte is one weight: no alignment (pb, lp) and no use for the byte before it (lc).
_LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
]
# That is 0.4 % better on Gaussian int6 codes than the preset's lc = 3, pb = 2.


@dataclass(frozen=True)
class Codec:
    """A pair of functions. ``decompress(data, num_bytes, layout)`` returns exactly `num_bytes`."""

    compress: Callable[[bytes, Layout], bytes]
    decompress: Callable[[bytes, int, Layout], bytes]
    codes_only: bool = False
    """Takes streams of integer codes only."""


def compress(codec: str, data: bytes, layout: Layout = ()) -> bytes:
    """Compress a stream with a codec of the table.

    Raises:
        ValueError: The codec is unknown or its library is not installed.
    """
    return _codec(codec).compress(data, layout)


def decompress(codec: str, data: bytes, num_bytes: int, layout: Layout = ()) -> bytes:
    """Decompress a stream of `num_bytes`.

    Raises:
        CodecError: The codec is unknown, or the data are damaged or not `num_bytes` long. No more
            than a byte beyond `num_bytes` is ever produced.
    """
    try:
        found = _codec(codec)
    except ValueError as error:
        raise CodecError(str(error)) from error
    result = found.decompress(data, num_bytes, layout)
    if len(result) != num_bytes:
        raise CodecError(f"it does not hold the {num_bytes} bytes that were announced")
    return result


def check_codec(name: str) -> None:
    """Refuse a codec that cannot be used.

    Raises:
        ValueError: It is unknown or its library is not installed.
    """
    _codec(name, setting="artifact.codec")


def compress_best(name: str, data: bytes, layout: Layout) -> tuple[str, bytes]:
    """Compress a stream and return the codec that was used with the result.

    That is the one named, but for "rans": lzma takes the streams of values, and those short streams
    of codes that it makes smaller (embeddings, whose rows repeat each other).

    Raises:
        ValueError: The codec is unknown or its library is not installed.
    """
    if not _codec(name).codes_only:
        return name, compress(name, data, layout)
    found = [(name, compress(name, data, layout))] if layout else []
    if not layout or len(data) <= _SHORT_STREAM_BYTES:
        found.append(("lzma", compress("lzma", data, layout)))
    return min(found, key=lambda pair: len(pair[1]))


def _codec(name: str, setting: str = "codec") -> Codec:
    if name in _PACKAGES and name not in CODECS:
        raise ValueError(f'{setting} "{name}" needs the package {_PACKAGES[name]}: install it')
    if name not in CODECS:
        raise ValueError(f'{setting} "{name}" is unknown: choose one of {", ".join(CODECS)}')
    return CODECS[name]


def _zstd_compress(data: bytes, layout: Layout) -> bytes:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def _zstd_decompress(data: bytes, num_bytes: int, layout: Layout) -> bytes:
    # A stream reader, as the one-shot call allocates whatever size the frame claims to have.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(io.BytesIO(data)) as reader:
            return _read_at_most(reader.read, num_bytes + 1)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd says: {error}") from error


def _read_at_most(read: Callable[[int], bytes], num_bytes: int) -> bytes:
    pieces = []
    while num_bytes > 0 and (piece := read(num_bytes)):
        pieces.append(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)


def _lzma_compress(data: bytes, layout: Layout) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=_LZMA_FILTERS)


def _lzma_decompress(data: bytes, num_bytes: int, layout: Layout) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_LIMIT_BYTES)
    try:
        result = decompressor.decompress(data, max_length=num_bytes + 1)
        if not decompressor.eof and len(result) == num_bytes:
            # The end marker is read only once more output is asked for.
            result += decompressor.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise CodecError(f"lzma says: {error}") from error
    if not decompressor.eof:
        raise CodecError("it ends too early or holds more than was announced")
    return result


def _brotli_compress(data: bytes, layout: Layout) -> bytes:
    return brotli.compress(data, mode=brotli.MODE_GENERIC, quality=11, lgwin=24)


def _brotli_decompress(data: bytes, num_bytes: int, layout: Layout) -> bytes:
    decompressor = brotli.Decompressor()
    pieces, produced, pending = [], 0, data
    try:
        while not decompressor.is_finished() and produced <= num_bytes:
            piece = decompressor.process(pending, output_buffer_limit=num_bytes + 1 - produced)
            if not piece and decompressor.can_accept_more_data():
                break
            pieces.append(piece)
            produced, pending = produced + len(piece), b""
    except brotli.error as error:
        raise CodecError(f"brotli says: {error}") from error
    return b"".join(pieces)


CODECS: dict[str, Codec] = {
    "lzma": Codec(_lzma_compress, _lzma_decompress),
    "rans": Codec(entropy.encode, entropy.decode, codes_only=True),
}
if zstandard is not None:
    CODECS["zstd"] = Codec(_zstd_compress, _zstd_decompress)
if brotli is not None and hasattr(brotli.Decompressor, "can_accept_more_data"):
    CODECS["brotli"] = Codec(_brotli_compress, _brotli_decompress)
