import contextlib
import lzma
import random
import struct
import time
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.artifact import entropy, rans
from pgl.artifact.entropy import decode, encode
from pgl.artifact.errors import CodecError
from pgl.artifact.rans import TOTAL, normalise


def gaussian(rows, columns, deviation, seed=0, columns_too=None):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns)) * np.broadcast_to(deviation, rows)[:, None]
    if columns_too is not None:
        w = w * columns_too
    return np.clip(np.rint(w * 31), -31, 31).astype(np.int8)


def round_trip(*matrices):
    data = b"".join(matrix.tobytes() for matrix in matrices)
    layout = [matrix.shape for matrix in matrices]
    packed = encode(data, layout)
    assert decode(packed, len(data), layout) == data
    assert encode(data, layout) == packed
    return packed


def entropy_bits(codes):
    counts = np.bincount(codes.ravel().astype(np.int64) + 128)
    p = counts[counts > 0] / codes.size
    return -(p * np.log2(p)).sum()


@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
    low=st.integers(-128, 127),
    span=st.integers(1, 256),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_codes(shapes, low, span, seed):
    rng = np.random.default_rng(seed)
    high = min(low + span, 128)
    round_trip(*[rng.integers(low, high, shape).astype(np.int8) for shape in shapes])


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((0, 5), np.int8),
        np.zeros((1, 1), np.int8),
        np.zeros((300, 200), np.int8),
        np.full((4, 4), -128, np.int8),
        np.array([[-128, 127]], np.int8),
        np.arange(-128, 128, dtype=np.int8)[None].repeat(300, 0),
        np.eye(500, dtype=np.int8) * 127,
    ],
)
def test_round_trip_of_corner_cases(matrix):
    round_trip(matrix)


def test_several_lanes_and_a_ragged_last_step():
    lanes = 3 * rans.STEPS_PER_LANE
    for size in (lanes - 1, lanes, lanes + 1, lanes + 2):
        round_trip(gaussian(1, size, 0.1))


@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_close_to_the_entropy(deviation):
    codes = gaussian(1024, 512, deviation)
    bits = 8 * len(round_trip(codes)) / codes.size
    assert bits < entropy_bits(codes) + 0.02


def test_rows_and_columns_of_other_spread_pay():
    rng = np.random.default_rng(1)
    rows = np.exp(rng.uniform(np.log(0.05), np.log(0.2), 1024))
    columns = np.exp(rng.uniform(np.log(0.5), np.log(2), 512))
    by_row = gaussian(1024, 512, rows)
    data = by_row.tobytes()
    zstd = len(zstandard.ZstdCompressor(level=22).compress(data))
    assert len(round_trip(by_row)) < 0.96 * zstd
    assert len(round_trip(by_row)) < entropy_bits(by_row) * by_row.size / 8 * 0.97
    by_both = gaussian(1024, 512, rows, columns_too=columns)
    shuffled = np.random.default_rng(2).permuted(by_both, axis=1)
    assert len(round_trip(by_both)) < 0.97 * len(round_trip(shuffled))


def trained_like(rows=1536, columns=512, seed=3):
    """Codes with the spreads of a trained MLP: wide over hidden units, narrow over the others."""
    rng = np.random.default_rng(seed)
    by_row = 0.07 * 2 ** rng.normal(0, 0.7, rows)
    return gaussian(rows, columns, by_row, columns_too=2 ** rng.normal(0, 0.1, columns))


def test_smaller_than_the_general_codecs_on_codes_of_a_trained_kind():
    matrices = [trained_like(seed=seed) for seed in range(2)]
    data = b"".join(matrix.tobytes() for matrix in matrices)
    packed = len(round_trip(*matrices))
    assert packed < 0.97 * len(zstandard.ZstdCompressor(level=22).compress(data))
    assert packed < 0.97 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def test_as_long_as_its_model_predicts():
    matrices = [trained_like(), gaussian(512, 512, 0.1)]
    codes = np.concatenate([matrix.ravel() for matrix in matrices])
    layout = [matrix.shape for matrix in matrices]
    low, symbols, num_symbols = entropy._symbols(codes)
    assert (symbols.astype(int) + low == codes).all()
    levels, side, _ = entropy._choose_levels(codes, symbols, num_symbols, layout)
    class_N = entropy._classes(levels, layout)
    tables = entropy._frequencies(entropy._count(class_N, symbols, num_symbols))
    share = tables.frequency_KS[class_N, symbols] / TOTAL
    predicted_bytes = -np.log2(share).sum() / 8 + len(side)
    assert predicted_bytes < len(round_trip(*matrices)) < 1.01 * predicted_bytes
    assert entropy.predicted_bytes(codes.tobytes(), layout) == pytest.approx(predicted_bytes)


def decode_as_documented(packed, layout):
    """Decode with nothing but docs/artifact.md: one code at a time, Python's integers."""
    low, last_symbol, side_bytes, num_words = struct.unpack_from("<bBII", packed)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 22}]
    side = lzma.decompress(packed[10 : 10 + side_bytes], lzma.FORMAT_RAW, filters=filters)
    signed = [byte - 256 if byte > 127 else byte for byte in side]
    sums, place = [], 0
    for rows, columns in layout:
        row_levels = signed[place : place + rows]
        column_levels = signed[place + rows : place + rows + columns]
        sums += [row + column for row in row_levels for column in column_levels]
        place += rows + columns
    number = {value: k for k, value in enumerate(sorted(set(sums)))}
    size = len(number) * (last_symbol + 1)
    frequency = [side[place + i] + 256 * side[place + size + i] for i in range(size)]
    lanes = max(1, min(len(sums) // 2048, 2048))
    x = list(struct.unpack_from(f"<{lanes}I", packed, 10 + side_bytes))
    words = iter(struct.unpack_from(f"<{num_words}H", packed, 10 + side_bytes + 4 * lanes))
    codes = []
    for i, value in enumerate(sums):
        first = number[value] * (last_symbol + 1)
        slot, lane, start, s = x[i % lanes] % 2**14, i % lanes, 0, 0
        while start + frequency[first + s] <= slot:
            start += frequency[first + s]
            s += 1
        codes.append(low + s)
        x[lane] = frequency[first + s] * (x[lane] // 2**14) + slot - start
        if x[lane] < 2**16:
            x[lane] = x[lane] * 2**16 + next(words)
    assert x == [2**16] * lanes
    assert next(words, None) is None
    return np.array(codes, dtype=np.int8).tobytes()


def test_the_documented_layout():
    rng = np.random.default_rng(5)
    by_row = 0.1 * 2 ** rng.normal(0, 0.7, 80)
    matrices = [gaussian(80, 64, by_row, columns_too=2 ** rng.normal(0, 1, 64)), gaussian(9, 7, 1)]
    layout = [matrix.shape for matrix in matrices]
    data = b"".join(matrix.tobytes() for matrix in matrices)
    assert decode_as_documented(encode(data, layout), layout) == data


def test_a_layout_of_other_codes_is_refused():
    with pytest.raises(ValueError, match="8 codes do not fill a layout of 0"):
        encode(bytes(8), [])
    with pytest.raises(ValueError, match="8 codes do not fill a layout of 6"):
        encode(bytes(8), [(2, 3)])


def test_damage_is_noticed():
    codes = gaussian(32, 32, 0.1)
    data, layout = codes.tobytes(), [codes.shape]
    packed = encode(data, layout)
    rng = random.Random(0)
    for _ in range(300):
        broken = bytearray(packed)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        # A flip that still decodes to something is left to the stream's checksum.
        with contextlib.suppress(CodecError):
            assert len(decode(bytes(broken), len(data), layout)) == len(data)
    for kept in range(0, len(packed), 7):
        with pytest.raises(CodecError):
            decode(packed[:kept], len(data), layout)
    with pytest.raises(CodecError):
        decode(packed + b"\0\0", len(data), layout)


def test_another_layout_is_refused():
    codes = gaussian(8, 8, 0.1)
    packed = encode(codes.tobytes(), [(8, 8)])
    with pytest.raises(CodecError):
        decode(packed, 64, [(8, 9)])
    with pytest.raises(CodecError):
        decode(packed, 72, [(8, 9)])
    with pytest.raises(CodecError):
        decode(b"x", 0, [(0, 9)])


def repacked(packed, **changes):
    """A stream with other fields in its header, or another side information."""
    low, last_symbol, side_bytes, num_words = entropy._HEADER.unpack_from(packed)
    side_stop = entropy._HEADER.size + side_bytes
    side = changes.get("side", packed[entropy._HEADER.size : side_stop])
    header = entropy._HEADER.pack(
        changes.get("low", low), last_symbol, len(side), changes.get("num_words", num_words)
    )
    return header + side + packed[side_stop:] + changes.get("more", b"")


def test_words_left_over_are_noticed():
    matrix = gaussian(20, 30, 0.1)
    packed = encode(matrix.tobytes(), [matrix.shape])
    num_words = entropy._HEADER.unpack_from(packed)[3]
    longer = repacked(packed, num_words=num_words + 1, more=b"\0\0")
    with pytest.raises(CodecError, match="damaged"):
        decode(longer, matrix.size, [matrix.shape])


def test_codes_beyond_int8_are_refused():
    matrix = gaussian(20, 30, 0.1)
    packed = repacked(encode(matrix.tobytes(), [matrix.shape]), low=126)
    with pytest.raises(CodecError, match="header does not fit"):
        decode(packed, matrix.size, [matrix.shape])


@pytest.mark.parametrize("num_bytes", [599, 601])
def test_a_layout_of_more_or_fewer_codes_is_another_one(num_bytes):
    matrix = gaussian(20, 30, 0.1)
    with pytest.raises(CodecError, match="another layout"):
        decode(encode(matrix.tobytes(), [matrix.shape]), num_bytes, [matrix.shape])


def test_one_table_that_does_not_add_up_is_enough():
    matrices = [gaussian(20, 30, 0.02, seed=1), gaussian(20, 30, 0.6, seed=2)]
    layout = [matrix.shape for matrix in matrices]
    data = b"".join(matrix.tobytes() for matrix in matrices)
    packed = encode(data, layout)
    start = entropy._HEADER.size
    stop = start + entropy._HEADER.unpack_from(packed)[2]
    filters = entropy._SIDE_FILTERS
    side = bytearray(lzma.decompress(packed[start:stop], lzma.FORMAT_RAW, filters=filters))
    num_levels = sum(rows + columns for rows, columns in layout)
    tables = len(set(side[:num_levels]))
    assert tables > 1, "the test needs several tables, of which one stays right"
    side[num_levels] ^= 1  # the low byte of a frequency of the first table
    damaged = repacked(packed, side=lzma.compress(bytes(side), lzma.FORMAT_RAW, filters=filters))
    with pytest.raises(CodecError, match="do not add up"):
        decode(damaged, len(data), layout)


@given(
    counts=st.lists(st.integers(0, 10**7), min_size=1, max_size=256).filter(any),
)
@settings(max_examples=60, deadline=None)
def test_frequencies_sum_up_and_keep_every_symbol(counts):
    counts = np.array(counts, dtype=np.int64)
    frequency = normalise(counts)
    assert frequency.sum(dtype=np.int64) == TOTAL
    assert ((frequency > 0) == (counts > 0)).all()


@pytest.mark.slow
def test_a_whole_model_decodes_in_seconds():
    rng = np.random.default_rng(1)
    rows = np.exp(rng.uniform(np.log(0.05), np.log(0.2), 50_688))
    codes = gaussian(50_688, 512, rows)
    data = codes.tobytes()
    packed = encode(data, [(512, 512)] * 99)
    start = time.process_time()
    decoded = decode(packed, len(data), [(512, 512)] * 99)
    assert time.process_time() - start < 5
    assert zlib.crc32(decoded) == zlib.crc32(data)
    assert decoded == data
