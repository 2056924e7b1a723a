"""Token shards: the challenge's file format, read piece by piece and written whole or not at all.

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros) followed
by that many little-endian uint16 tokens. Documents lie end to end, each opened by the BOS token,
and may straddle two shards.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from pgl.io import atomic_write

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2

Split = Literal["train", "val"]


class ShardError(ValueError):
    """A shard file that is missing, damaged or not a shard; the message names the file."""


def token_count(path: str | os.PathLike[str]) -> int:
    """Return the number of tokens in a shard from its header, checked against the file's length.

    Reads 1,024 bytes whatever the size of the shard.

    Raises:
        ShardError: If the file is missing, empty or cut short, is no shard, or holds no token.
    """
    path = Path(path)
    if not path.is_file():
        raise ShardError(f"{path} is not a file; check the path or prepare the data first.")
    with open(path, "rb") as file:
        header_bytes = file.read(HEADER_BYTES)
        size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes == 0:
        raise ShardError(f"{path} is empty (0 bytes); delete it and fetch or build it again.")
    if len(header_bytes) < HEADER_BYTES:
        raise ShardError(
            f"{path} is cut short inside its header ({len(header_bytes)} of {HEADER_BYTES} bytes); "
            "delete it and fetch or build it again."
        )
    magic, version, count = (int(word) for word in np.frombuffer(header_bytes, "<i4", count=3))
    if magic != MAGIC:
        raise ShardError(
            f"{path} is not a token shard (magic number {magic}, expected {MAGIC}); "
            "give a file of the challenge's format."
        )
    if version != VERSION:
        raise ShardError(
            f"{path} has shard format version {version}, only version {VERSION} can be read; "
            "export it again in that version."
        )
    if count <= 0:
        raise ShardError(f"{path} holds {count} tokens; delete it and fetch or build it again.")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * count
    if size_bytes != expected_bytes:
        raise ShardError(
            f"{path} has {size_bytes} bytes but its header promises {count} tokens "
            f"({expected_bytes} bytes); delete it and fetch or build it again."
        )
    return count


def read_shard(path: str | os.PathLike[str]) -> np.ndarray:
    """Read all tokens of a shard.

    Args:
        path: The shard file.

    Returns:
        Array of shape (tokens,), little-endian uint16.

    Raises:
        ShardError: As :func:`token_count`.
    """
    count = token_count(path)
    return read_tokens(path, 0, count, shard_state(path))


def read_tokens(
    path: str | os.PathLike[str], start: int, count: int, state: tuple[int, int]
) -> np.ndarray:
    """Read some tokens of a shard that is as it was when it was opened.

    A file that is cut short while it is mapped into memory ends the process that reads it with
    SIGBUS, whatever was checked before. Reading copies the same bytes and can only come up short.

    Args:
        path: The shard file.
        start: Position of the first token.
        count: Number of tokens; the shard must have had as many from ``start``.
        state: The shard's :func:`shard_state` when it was opened.

    Returns:
        Array of shape (count,), little-endian uint16.

    Raises:
        ShardError: If the file was deleted or written to since then.
    """
    tokens = np.empty(count, dtype="<u2")
    try:
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES + TOKEN_BYTES * start)
            read_bytes = file.readinto(tokens.view(np.uint8))
            # After reading: what was written before is seen now.
            status = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise _deleted(path) from error
    if read_bytes < tokens.nbytes or (status.st_size, status.st_mtime_ns) != state:
        raise _changed(path)
    return tokens


def shard_state(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return a file's length in bytes and when it was last written, in nanoseconds.

    Raises:
        ShardError: If it is not there.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise _deleted(path) from error
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: str | os.PathLike[str], state: tuple[int, int]) -> None:
    """Check that a shard is as it was when it was opened.

    Raises:
        ShardError: If it was deleted or written to.
    """
    if shard_state(path) != state:
        raise _changed(path)


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Write tokens as a shard; the file appears under its name only when complete.

    Args:
        path: Where the shard shall be.
        tokens: Integers of shape (tokens,), each in 0..65535.

    Raises:
        ShardError: If there is no token, or the array cannot be stored as uint16.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ShardError(
            f"{path}: tokens must be a 1-D integer array, "
            f"got {tokens.dtype} of shape {tokens.shape}."
        )
    if tokens.size == 0:
        raise ShardError(f"{path}: a shard needs at least one token.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 0xFFFF:
        raise ShardError(f"{path}: tokens must lie in 0..65535, got {low}..{high}.")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def list_shards(directory: str | os.PathLike[str], split: Split) -> list[Path]:
    """Return ``fineweb_{split}_*.bin`` of a directory in file name order, which is reading order.

    Raises:
        ShardError: If there is none.
    """
    directory = Path(directory)
    shards = sorted(directory.glob(f"fineweb_{split}_*.bin"))
    if not shards:
        raise ShardError(
            f"no fineweb_{split}_*.bin in {directory}; "
            "check the directory or prepare the data first."
        )
    return shards


def check_tokens(
    tokens: np.ndarray, vocab_size: int, path: str | os.PathLike[str], start: int = 0
) -> None:
    """Check that every token is in the vocabulary.

    Args:
        tokens: Unsigned integers of shape (tokens,), for instance from :func:`read_shard`.
        vocab_size: Size of the vocabulary.
        path: The file they came from, for the message.
        start: Position of the first of them in that file, for the message.

    Raises:
        ShardError: Naming the first token that is not in the vocabulary and its position.
    """
    if tokens.size == 0 or int(tokens.max()) < vocab_size:
        return
    index = int(np.argmax(tokens >= vocab_size))
    raise ShardError(
        f"{path} has token {int(tokens[index])} at position {start + index}, outside the "
        f"vocabulary of {vocab_size}; use the tokenizer that these shards were made with."
    )


def _deleted(path: str | os.PathLike[str]) -> ShardError:
    return ShardError(f"{path} was deleted while the run was reading it: restore it and resume.")


def _changed(path: str | os.PathLike[str]) -> ShardError:
    return ShardError(f"{path} was changed while the run was reading it: restore it and resume.")
