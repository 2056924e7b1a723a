"""From documents to a finished corpus on disk: tokenizer, shards, manifest.

A corpus is built in a directory beside its final one and renamed when complete; its manifest is the
file written last. So a directory with a manifest is whole, and an interrupted build starts afresh.
"""

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sentencepiece import SentencePieceProcessor

from pgl.data.shards import Split, token_count, write_shard
from pgl.data.sources.base import Corpus, one_at_a_time
from pgl.data.tokenizer import (
    decode_documents,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from pgl.io import atomic_write, sha256_file

FORMAT = 1  # raise it when the same text and settings shall give other files
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
BATCH_CHARACTERS = 4_000_000
XZ_LIMIT_BYTES = 64_000_000  # xz -9e takes about a second per MB


@dataclass(frozen=True)
class Document:
    """One text and the split that it belongs to."""

    text: str
    held_out: bool
    """True puts it into the validation split, where nothing is trained on it."""


Documents = Callable[[], Iterable[Document]]
"""Gives the documents from the start each time; always the same ones in the same order."""


@dataclass(frozen=True)
class BuildSettings:
    """How documents become shards."""

    name: str
    """Name of the corpus."""
    vocab_size: int
    """Pieces of the tokenizer."""
    shard_tokens: int
    """Tokens of a shard, but for the last one of a split."""
    tokenizer_characters: int
    """Characters of training text that the tokenizer is trained on, about; more is sampled down."""
    threads: int
    """Threads that encode. Any number gives the same files."""
    more_documents: str
    """What a user can do to have more documents, for the message that there are too few."""


def hash_fraction(text: str, salt: str = "") -> float:
    """Return a number in [0, 1) that depends on the text alone, evenly spread over texts."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    # 53 bits are what a float holds: more would round up to 1.0 now and then.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def fingerprint(files: Iterable[Path], settings: dict[str, Any]) -> str:
    """Return a short hash over the bytes of files, in their order, and settings."""
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def build_once(directory: Path, documents: Documents, settings: BuildSettings) -> None:
    """Build a corpus in ``directory`` unless it is there and whole.

    Of several processes of a machine one builds while the others wait.

    Raises:
        ValueError: If a split has no document, or the text is too small for the vocabulary.
    """
    if _is_whole(directory):
        return
    lock = directory.with_name(f"{directory.name}.lock")
    with one_at_a_time(lock, f"building {directory}"):
        if _is_whole(directory):
            return
        building = directory.with_name(f"{directory.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        try:
            _build(building, documents, settings)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(building, directory)


def load_built(directory: Path) -> Corpus:
    """Return the corpus that :func:`build_once` left in ``directory``.

    Raises:
        ValueError: If there is none, or its manifest or a shard is damaged.
    """
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} has not been built; call the source's prepare() first.")
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        name, train, val = manifest["name"], manifest["splits"]["train"], manifest["splits"]["val"]
        shards = [[directory / shard for shard in split["shards"]] for split in (train, val)]
        xz_bytes = val["xz_bytes"]
        bits_per_byte = None if xz_bytes is None else 8 * xz_bytes / val["text_bytes"]
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{directory / MANIFEST} is damaged ({error!r}): remove {directory} and build it again"
        ) from error
    return Corpus.from_files(name, *shards, directory / TOKENIZER, bits_per_byte)


def _is_whole(directory: Path) -> bool:
    if not (directory / MANIFEST).is_file():
        return False
    try:
        load_built(directory)
    except ValueError:
        return False
    return True


def _build(directory: Path, documents: Documents, settings: BuildSettings) -> None:
    directory.mkdir(parents=True)
    with _progress() as progress:
        characters = {"train": 0, "val": 0}
        counted = 0
        for document in progress.track(documents(), total=None, description="reading text"):
            characters[_split(document)] += len(document.text)
            counted += 1
        _check_splits(characters, counted, settings.more_documents)

        sample = _tokenizer_texts(documents, settings.tokenizer_characters / characters["train"])
        tracked = progress.track(sample, total=None, description="training the tokenizer")
        save_tokenizer(directory / TOKENIZER, train_tokenizer(tracked, settings.vocab_size))

        tokenizer = load_tokenizer(directory / TOKENIZER)
        tracked = progress.track(documents(), total=counted, description="encoding")
        splits = _encode(directory, tracked, tokenizer, settings)
    manifest = {
        "format": FORMAT,
        "name": settings.name,
        "tokenizer": {
            "file": TOKENIZER,
            "vocab_size": settings.vocab_size,
            "sha256": sha256_file(directory / TOKENIZER),
        },
        "splits": splits,
    }
    with atomic_write(directory / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _check_splits(characters: dict[str, int], documents: int, more_documents: str) -> None:
    for split, advice in (("train", "lower"), ("val", "raise")):
        if characters[split] == 0:
            raise ValueError(
                f"none of the {documents} documents falls into the {split} split; "
                f"{more_documents} or {advice} data.source.init_args.val_fraction."
            )


def _tokenizer_texts(documents: Documents, keep: float) -> Iterator[str]:
    for document in documents():
        if not document.held_out and (
            keep >= 1 or hash_fraction(document.text, salt="tokenizer") < keep
        ):
            yield document.text


def _encode(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: SentencePieceProcessor,
    settings: BuildSettings,
) -> dict[str, dict[str, Any]]:
    writers = {
        "train": _SplitWriter(directory, "train", settings.shard_tokens),
        "val": _SplitWriter(directory, "val", settings.shard_tokens),
    }
    xz = _XzSize()
    for batch in _batches(documents):
        encoded = encode_documents(tokenizer, [item.text for item in batch], settings.threads)
        decoded = decode_documents(tokenizer, encoded, settings.threads)
        for document, tokens, text in zip(batch, encoded, decoded, strict=True):
            # Bits per byte counts the bytes of the normalised text, so they are counted here too.
            text_bytes = text.encode()
            writers[_split(document)].add(tokens, len(text_bytes))
            if document.held_out:
                xz.add(text_bytes + b"\n")
    summaries = {split: writer.finish() for split, writer in writers.items()}
    summaries["val"]["xz_bytes"] = xz.finish()
    return summaries


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split(document: Document) -> Split:
    return "val" if document.held_out else "train"


class _SplitWriter:
    """Lays documents end to end and cuts a shard off whenever there is enough for one."""

    def __init__(self, directory: Path, split: Split, shard_tokens: int) -> None:
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.pending: list[np.ndarray] = []
        self.pending_tokens = 0
        self.shards: list[str] = []
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self.documents += 1
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self.pending.append(tokens)
        self.pending_tokens += len(tokens)
        while self.pending_tokens >= self.shard_tokens:
            self._cut(self.shard_tokens)

    def finish(self) -> dict[str, Any]:
        if self.pending_tokens:
            self._cut(self.pending_tokens)
        assert self.tokens == sum(token_count(self.directory / name) for name in self.shards)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }

    def _cut(self, count: int) -> None:
        tokens = np.concatenate(self.pending)
        name = f"fineweb_{self.split}_{len(self.shards):06d}.bin"
        write_shard(self.directory / name, tokens[:count])
        self.shards.append(name)
        self.pending, self.pending_tokens = [tokens[count:]], len(tokens) - count


class _XzSize:
    """The size that ``xz -9e`` gives a text, or None above ``XZ_LIMIT_BYTES``."""

    def __init__(self) -> None:
        self.compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
        self.text_bytes = self.xz_bytes = 0

    def add(self, text: bytes) -> None:
        self.text_bytes += len(text)
        if self.text_bytes <= XZ_LIMIT_BYTES:
            self.xz_bytes += len(self.compressor.compress(text))

    def finish(self) -> int | None:
        if self.text_bytes > XZ_LIMIT_BYTES:
            return None
        return self.xz_bytes + len(self.compressor.flush())


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns()[:3],
        MofNCompleteColumn(),
        TextColumn("documents"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
