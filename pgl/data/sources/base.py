"""What a source of text is, and what it yields."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from pgl.data.shards import list_shards, token_count
from pgl.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenised text that is ready on disk."""

    name: str
    """What the text is, for logs and reports."""
    train_shards: tuple[Path, ...]
    """Training shards in reading order."""
    val_shards: tuple[Path, ...]
    """Validation shards in reading order; together they are the whole validation split."""
    tokenizer_path: Path
    """The SentencePiece model that the shards were made with."""
    vocab_size: int
    """Number of pieces of that model."""
    train_tokens: int
    """Tokens of all training shards, BOS included."""
    val_tokens: int
    """Tokens of all validation shards, BOS included."""
    val_xz_bits_per_byte: float | None = None
    """What ``xz -9e`` needs for the validation text, in bits per byte; None where not measured."""

    @classmethod
    def from_files(
        cls,
        name: str,
        train_shards: Sequence[Path],
        val_shards: Sequence[Path],
        tokenizer_path: Path,
        val_xz_bits_per_byte: float | None = None,
    ) -> "Corpus":
        """Build from files, whose headers are read and checked.

        Raises:
            ShardError: If a shard is not valid.
            ValueError: If the tokenizer cannot be loaded.
        """
        return cls(
            name=name,
            train_shards=tuple(train_shards),
            val_shards=tuple(val_shards),
            tokenizer_path=tokenizer_path,
            vocab_size=load_tokenizer(tokenizer_path).vocab_size(),
            train_tokens=sum(token_count(path) for path in train_shards),
            val_tokens=sum(token_count(path) for path in val_shards),
            val_xz_bits_per_byte=val_xz_bits_per_byte,
        )

    @classmethod
    def from_directory(
        cls,
        name: str,
        directory: Path,
        tokenizer_path: Path,
        max_train_shards: int | None = None,
    ) -> "Corpus":
        """Build from the ``fineweb_{train,val}_*.bin`` of one directory; see :meth:`from_files`."""
        train_shards = list_shards(directory, "train")[:max_train_shards]
        return cls.from_files(name, train_shards, list_shards(directory, "val"), tokenizer_path)


class Source(ABC):
    """A place that text comes from.

    The data module calls :meth:`prepare` in one process of each machine and, after that,
    :meth:`corpus` in every process.
    """

    @abstractmethod
    def prepare(self) -> None:
        """Do what has to be done once: fetch, train the tokenizer, encode. May be called again."""

    @abstractmethod
    def corpus(self) -> Corpus:
        """Return the prepared text, cheaply.

        Raises:
            ValueError: If it has not been prepared.
        """


@contextmanager
def one_at_a_time(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Let one process of a machine into the block; the others wait, and are told what for.

    Args:
        path: Lock file; its folder is made if need be. It stays, empty.
        what: What the block does, for the message.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"Another process is {what}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
