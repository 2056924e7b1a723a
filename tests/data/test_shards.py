"""The shard format: round trips, and a clear sentence for everything that is wrong."""

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgl.data.shards import (
    HEADER_BYTES,
    MAGIC,
    ShardError,
    check_tokens,
    list_shards,
    read_shard,
    read_tokens,
    shard_state,
    token_count,
    write_shard,
)

# Each example writes its own file anew, so sharing the folder does no harm.
several = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def header(magic: int = MAGIC, version: int = 1, count: int = 3) -> bytes:
    words = np.zeros(256, dtype="<i4")
    words[:3] = magic, version, count
    return words.tobytes()


@several
@given(tokens=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=300))
def test_round_trip(tmp_path, tokens):
    path = tmp_path / "shard.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    assert token_count(path) == len(tokens)
    shard = read_shard(path)
    assert shard.dtype == np.uint16
    assert shard.tolist() == tokens


def test_bytes_on_disk_are_the_challenge_format(tmp_path):
    path = tmp_path / "new" / "shard.bin"
    write_shard(path, np.array([1, 258, 65535], dtype=np.uint16))
    assert path.read_bytes() == header() + bytes([1, 0, 2, 1, 255, 255])
    assert [item.name for item in path.parent.iterdir()] == ["shard.bin"]


def test_some_tokens_are_read_where_they_lie(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(1000))
    state = shard_state(path)
    assert read_tokens(path, 0, 1000, state).tolist() == list(range(1000))
    assert read_tokens(path, 990, 10, state).tolist() == list(range(990, 1000))
    assert read_tokens(path, 5, 0, state).tolist() == []


def test_a_file_that_changes_while_it_is_read_gives_its_tokens_or_an_error(tmp_path):
    # The file is cut and mended again and again, with its old times, while it is read. A mapped
    # file would end the process with SIGBUS within a few reads.
    path = tmp_path / "shard.bin"
    write_shard(path, np.arange(50_000))
    content = path.read_bytes()
    state = shard_state(path)
    done = threading.Event()

    def spoil() -> None:
        while not done.is_set():
            with open(path, "r+b") as file:
                file.truncate(2000)
                file.write(content)
            os.utime(path, ns=(state[1], state[1]))

    thread = threading.Thread(target=spoil)
    thread.start()
    changed = f"{path} was changed while the run was reading it: restore it and resume."
    results: list[int | str] = []
    deadline = time.monotonic() + 30
    try:
        # At least until the other thread has had its turn.
        while (len(results) < 200 or changed not in results) and time.monotonic() < deadline:
            try:
                results.append(int(read_tokens(path, 1000, 49_000, state).sum(dtype=np.int64)))
            except ShardError as error:
                results.append(str(error))
    finally:
        done.set()
        thread.join()
    assert changed in results
    assert set(results) <= {changed, sum(range(1000, 50_000))}


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "is empty"),
        (header()[:-1], r"cut short inside its header \(1023 of 1024 bytes\)"),
        (header(magic=20240521) + bytes(6), "is not a token shard .magic number 20240521"),
        (header(version=2) + bytes(6), "format version 2"),
        (header(count=0), "holds 0 tokens"),
        (header(count=-5) + bytes(6), "holds -5 tokens"),
        (header() + bytes(5), r"has 1029 bytes but its header promises 3 tokens \(1030 bytes\)"),
        (header() + bytes(8), "has 1032 bytes"),
    ],
)
def test_damage_is_named(tmp_path, content, wrong):
    path = tmp_path / "fineweb_train_000007.bin"
    path.write_bytes(content)
    for read in (token_count, read_shard):
        with pytest.raises(ShardError, match=wrong) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ShardError, match="is not a file"):
        read_shard(tmp_path / "none.bin")


@several
@given(content=st.binary(max_size=HEADER_BYTES + 64), keep_magic=st.booleans())
def test_any_bytes_are_a_shard_or_an_error(tmp_path, content, keep_magic):
    if keep_magic:
        content = header()[:8] + content
    path = tmp_path / "shard.bin"
    path.write_bytes(content)
    try:
        shard = read_shard(path)
    except ShardError:
        return
    assert len(content) == HEADER_BYTES + 2 * len(shard)


@pytest.mark.parametrize(
    ("tokens", "wrong"),
    [
        (np.array([], dtype=np.uint16), "at least one token"),
        (np.array([1, 65536]), r"0\.\.65535, got 1\.\.65536"),
        (np.array([-1, 4]), r"got -1\.\.4"),
        (np.array([1.0]), "1-D integer array"),
        (np.array([[1, 2]]), "1-D integer array"),
    ],
)
def test_refuses_what_is_no_shard(tmp_path, tokens, wrong):
    with pytest.raises(ShardError, match=wrong):
        write_shard(tmp_path / "shard.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_list_shards_sorts_and_keeps_splits_apart(tmp_path):
    for name in ("train_000010", "train_000002", "val_000000", "train_000001"):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.array([1]))
    (tmp_path / "fineweb_train_000003.txt").touch()
    names = [path.name for path in list_shards(tmp_path, "train")]
    assert names == [f"fineweb_train_{index:06d}.bin" for index in (1, 2, 10)]
    assert [path.name for path in list_shards(tmp_path, "val")] == ["fineweb_val_000000.bin"]


def test_list_shards_without_any(tmp_path):
    with pytest.raises(ShardError, match=r"no fineweb_val_\*\.bin in .*; check the directory"):
        list_shards(tmp_path, "val")


def test_check_tokens(tmp_path):
    tokens = np.array([0, 5, 9, 12, 10], dtype=np.uint16)
    check_tokens(tokens, 13, "a.bin")
    check_tokens(tokens[:0], 1, "a.bin")
    with pytest.raises(ShardError, match=r"a\.bin has token 12 at position 3.*vocabulary of 10;"):
        check_tokens(tokens, 10, "a.bin")
    with pytest.raises(ShardError, match=r"a\.bin has token 12 at position 703,"):
        check_tokens(tokens, 10, "a.bin", start=700)
