"""Entropy coding of integer codes: rANS with the spread of rows and columns as context.

A general codec sees bytes. Here the codes are known to be bell-shaped around zero, with a width
that differs from row to row and from column to column: each row and each column gets a level (the
logarithm of its spread, in quarter octaves), the sum of the two is the class of a code, and each
class has a frequency table. Levels and tables travel with the codes, under lzma.

Measured on int6 codes of Gaussian rows on a step of 1/31 whose deviations are spread from .05 to
.2: 3.70 bits a code, where zstd 22 takes 3.91, lzma 9e 4.04 and brotli 11 3.75; the entropy is 3.86
without context and 3.68 with the true deviations known. 26 million codes take 4 s to encode and
1 s to decode on one core.

Shape legend: K classes, S symbols, N codes of a stream, R rows, C columns of a matrix.
"""

import itertools
import lzma
import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pgl.artifact.errors import CodecError
from pgl.artifact.rans import (
    PRECISION_BITS,
    TOTAL,
    Tables,
    decode_lanes,
    encode_lanes,
    normalise,
    num_lanes_for,
)

Layout = Sequence[tuple[int, int]]
"""Rows and columns of each int8 matrix in a stream, in order."""

LEVELS_PER_OCTAVE = 4
_HEADER = struct.Struct("<bBII")  # smallest code, symbols - 1, bytes of side information, words
_SIDE_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22}]


def encode(data: bytes, layout: Layout) -> bytes:
    """Compress int8 codes.

    Args:
        data: The codes of all matrices, row by row.
        layout: Their shapes.

    Raises:
        ValueError: The matrices of the layout do not have as many codes as there are.
    """
    codes_N = np.frombuffer(data, dtype=np.int8)
    num_codes = sum(rows * columns for rows, columns in layout)
    if num_codes != codes_N.size:
        raise ValueError(f"{codes_N.size} codes do not fill a layout of {num_codes}")
    if not codes_N.size:
        return b""
    low, symbols_N, num_symbols = _symbols(codes_N)
    levels, side, _ = _choose_levels(codes_N, symbols_N, num_symbols, layout)
    class_N = _classes(levels, layout)
    tables = _frequencies(_count(class_N, symbols_N, num_symbols))
    state_L, words = encode_lanes(symbols_N, class_N, tables)
    header = _HEADER.pack(low, num_symbols - 1, len(side), len(words))
    return header + side + state_L.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def decode(data: bytes, num_bytes: int, layout: Layout) -> bytes:
    """Return the `num_bytes` codes that :func:`encode` compressed under the same layout.

    Raises:
        CodecError: The data are damaged. Memory is bounded by a few times `num_bytes`.
    """
    num_codes = sum(rows * columns for rows, columns in layout)
    if num_codes != num_bytes:
        raise CodecError("it is of another layout")
    if not num_codes:
        if data:
            raise CodecError("it is not empty")
        return b""
    if len(data) < _HEADER.size:
        raise CodecError("it ends too early")
    low, last_symbol, side_bytes, num_words = _HEADER.unpack_from(data)
    num_lanes = num_lanes_for(num_codes)
    side_stop = _HEADER.size + side_bytes
    state_stop = side_stop + 4 * num_lanes
    if low + last_symbol > 127 or len(data) != state_stop + 2 * num_words:
        raise CodecError("its header does not fit its length")
    num_levels = sum(rows + columns for rows, columns in layout)
    side = _decompress_side(data[_HEADER.size : side_stop], num_levels, last_symbol + 1)
    class_N = _classes(np.frombuffer(side[:num_levels], dtype=np.int8), layout)
    tables = _read_tables(side[num_levels:], int(class_N.max()) + 1, last_symbol + 1)
    state_L = np.frombuffer(data[side_stop:state_stop], dtype="<u4").astype(np.uint64)
    words = np.frombuffer(data[state_stop:], dtype="<u2").astype(np.uint64)
    symbols_N = decode_lanes(state_L, words, class_N, tables)
    return (symbols_N.astype(np.int16) + low).astype(np.int8).tobytes()


def predicted_bytes(data: bytes, layout: Layout) -> float:
    """Return what :func:`encode`'s model of the codes takes, tables included, without coding."""
    codes_N = np.frombuffer(data, dtype=np.int8)
    if not codes_N.size:
        return 0.0
    _, symbols_N, num_symbols = _symbols(codes_N)
    return _choose_levels(codes_N, symbols_N, num_symbols, layout)[2]


def _symbols(codes_N: NDArray[np.int8]) -> tuple[int, NDArray[np.uint8], int]:
    """Smallest code, codes counted from it, and how many symbols that makes."""
    low = int(codes_N.min())
    return low, (codes_N - np.int16(low)).astype(np.uint8), int(codes_N.max()) - low + 1


def _choose_levels(
    codes_N: NDArray[np.int8], symbols_N: NDArray[np.uint8], num_symbols: int, layout: Layout
) -> tuple[NDArray[np.int8], bytes, float]:
    """Return levels only as fine as pays for what they take, side information, bytes of all."""
    spreads = [_measure_spread(matrix_RC) for matrix_RC in _matrices(codes_N, layout)]
    best_bits, best = math.inf, (np.empty(0, dtype=np.int8), b"")
    for row_steps, column_steps in itertools.product((0, 2, 4), repeat=2):
        levels = np.concatenate(
            [_levels(spread, row_steps, column_steps) for spread in spreads]
        ).astype(np.int8)
        count_KS = _count(_classes(levels, layout), symbols_N, num_symbols)
        frequency_KS = _frequencies(count_KS).frequency_KS
        side = lzma.compress(
            levels.tobytes() + _split(frequency_KS), format=lzma.FORMAT_RAW, filters=_SIDE_FILTERS
        )
        code_bits_KS = PRECISION_BITS - np.log2(np.maximum(frequency_KS, 1))
        bits = float((count_KS * code_bits_KS).sum()) + 8 * len(side)
        if bits < best_bits:
            best_bits, best = bits, (levels, side)
    return *best, best_bits / 8


def _matrices(codes_N: NDArray[np.int8], layout: Layout) -> Iterator[NDArray[np.int8]]:
    position = 0
    for rows, columns in layout:
        yield codes_N[position : position + rows * columns].reshape(rows, columns)
        position += rows * columns


def _measure_spread(matrix_RC: NDArray[np.int8]) -> tuple[NDArray[np.float32], ...]:
    """Log2 of the spread of the rows (R,), and of the columns relative to their rows' (C,)."""
    rows, columns = matrix_RC.shape
    if not matrix_RC.size:
        return np.zeros(rows, dtype=np.float32), np.zeros(columns, dtype=np.float32)
    squares_RC = np.square(matrix_RC, dtype=np.float32)
    # The offsets keep empty rows and columns finite, below those with one code in 200.
    row_R = np.sqrt(squares_RC.mean(1)) + np.float32(0.05)
    column_C = np.sqrt((squares_RC / np.square(row_R)[:, None]).mean(0)) + np.float32(0.02)
    return np.log2(row_R), np.log2(column_C / np.median(column_C))


def _levels(
    spread: tuple[NDArray[np.float32], ...], row_steps: int, column_steps: int
) -> NDArray[np.float32]:
    """Levels of the rows, then the columns, rounded to a number of steps per octave; 0 for none."""
    row_R, column_C = spread
    middle = np.rint(np.median(row_R) * LEVELS_PER_OCTAVE) if row_R.size else np.float32(0)
    relative_R = row_R - middle / LEVELS_PER_OCTAVE
    return np.concatenate([middle + _round(relative_R, row_steps), _round(column_C, column_steps)])


def _round(spread: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    return np.rint(spread * steps) * (LEVELS_PER_OCTAVE // steps) if steps else spread * 0


def _classes(levels: NDArray[np.int8], layout: Layout) -> NDArray[np.uint8]:
    """Class of each code, numbered from 0 without gaps."""
    # Sums of two int8 levels; shifted they index a table of which sums occur.
    pieces = []
    position = 0
    occurs = np.zeros(512, dtype=bool)
    for rows, columns in layout:
        row_R = levels[position : position + rows].astype(np.int16)
        column_C = levels[position + rows : position + rows + columns].astype(np.int16)
        position += rows + columns
        sum_RC = row_R[:, None] + column_C + np.int16(256)
        occurs[sum_RC] = True
        pieces.append(sum_RC.ravel())
    if occurs.sum() > 256:
        raise CodecError("it has too many classes")
    number = (np.cumsum(occurs) - 1).astype(np.uint8)
    return np.concatenate([number[piece] for piece in pieces])


def _count(
    class_N: NDArray[np.uint8], symbols_N: NDArray[np.uint8], num_symbols: int
) -> NDArray[np.int64]:
    """How often each symbol occurs in each class, (K, S)."""
    index_N = class_N.astype(np.int32) * num_symbols + symbols_N
    num_classes = int(class_N.max()) + 1
    count = np.bincount(index_N, minlength=num_classes * num_symbols)
    return count.reshape(num_classes, num_symbols)


def _frequencies(count_KS: NDArray[np.int64]) -> Tables:
    return Tables(np.stack([normalise(count_S) for count_S in count_KS]))


def _decompress_side(data: bytes, num_levels: int, num_symbols: int) -> bytes:
    most_bytes = num_levels + 2 * 256 * num_symbols
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_SIDE_FILTERS)
    try:
        side = decompressor.decompress(data, max_length=most_bytes + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise CodecError(f"lzma says: {error}") from error
    if not num_levels <= len(side) <= most_bytes:
        raise CodecError("its side information is of a wrong size")
    return side


def _read_tables(data: bytes, num_classes: int, num_symbols: int) -> Tables:
    if len(data) != 2 * num_classes * num_symbols:
        raise CodecError("its frequency tables are of a wrong size")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(2, num_classes, num_symbols)
    frequency_KS = planes[0].astype(np.uint16) | planes[1].astype(np.uint16) << 8
    if (frequency_KS.sum(axis=1, dtype=np.int64) != TOTAL).any():
        raise CodecError("its frequency tables do not add up")
    return Tables(frequency_KS)


def _split(frequency_KS: NDArray[np.uint16]) -> bytes:
    low, high = frequency_KS & 255, frequency_KS >> 8
    return low.astype(np.uint8).tobytes() + high.astype(np.uint8).tobytes()
