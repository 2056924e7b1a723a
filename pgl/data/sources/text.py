"""The user's own text files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from pgl.data.sources.base import Corpus, Source
from pgl.data.sources.build import (
    BuildSettings,
    Document,
    build_once,
    fingerprint,
    hash_fraction,
    load_built,
)

SUFFIXES = (".txt", ".jsonl")


class Text(Source):
    """UTF-8 text from ``.txt`` and ``.jsonl`` files, tokenised with a tokenizer of its own.

    A ``.txt`` file is one document (or several, see ``document_separator``), a line of a ``.jsonl``
    file is one. A hash of its text decides whether a document is held out for validation, so adding
    documents moves no other one, and copies of a document stay on the same side. The tokenizer is
    trained on the training documents alone. Results lie in ``cache_dir`` under a hash of the files'
    bytes and of the settings, and are used again.

    Args:
        paths: Files, or directories that are searched for ``.txt`` and ``.jsonl``, sub-directories
            included.
        cache_dir: Where tokenizer and shards are kept.
        vocab_size: Number of pieces of the tokenizer.
        val_fraction: Share of the documents held out for validation, in (0, 1).
        shard_tokens: Tokens of a shard.
        workers: Threads that encode; null takes all processors.
        jsonl_field: Key of a ``.jsonl`` line that holds the text.
        document_separator: Cuts each ``.txt`` file into documents at this string, which is left
            out; null takes the whole file.
        tokenizer_characters: Characters of training text that the tokenizer sees, about. Of a
            larger corpus it sees a sample of the documents.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        paths: list[str],
        cache_dir: str = "data/text",
        vocab_size: int = 1024,
        val_fraction: float = 0.02,
        shard_tokens: int = 10_000_000,
        workers: int | None = None,
        jsonl_field: str = "text",
        document_separator: str | None = None,
        tokenizer_characters: int = 100_000_000,
    ) -> None:
        if not paths:
            raise ValueError(
                "data.source.init_args.paths is empty; name at least one .txt or .jsonl file or "
                "directory."
            )
        check_fraction(val_fraction)
        for name, value in (
            ("shard_tokens", shard_tokens),
            ("workers", 1 if workers is None else workers),
            ("tokenizer_characters", tokenizer_characters),
        ):
            if value < 1:
                raise ValueError(f"data.source.init_args.{name} is {value}; give at least 1.")
        if document_separator == "":
            raise ValueError(
                "data.source.init_args.document_separator is empty; give a string, or null for "
                "none."
            )
        self.paths = [Path(path) for path in paths]
        self.cache_dir = Path(cache_dir)
        self.val_fraction = val_fraction
        self.jsonl_field = jsonl_field
        self.document_separator = document_separator
        self.build_settings = BuildSettings(
            name="text",
            vocab_size=vocab_size,
            shard_tokens=shard_tokens,
            tokenizer_characters=tokenizer_characters,
            threads=workers or os.cpu_count() or 1,
            more_documents="give more files, set data.source.init_args.document_separator to cut "
            ".txt files up,",
        )

    def prepare(self) -> None:
        """Train the tokenizer and write the shards, unless that has been done.

        Raises:
            ValueError: If there are no files, one cannot be read, or there is too little text.
        """
        files = self.files()
        build_once(self._directory(files), lambda: self._documents(files), self.build_settings)

    def corpus(self) -> Corpus:
        """Return the built corpus. Reads the text files once for their hash (about 1 s per GB)."""
        return load_built(self._directory(self.files()))

    def files(self) -> list[Path]:
        """Return the text files that ``paths`` stands for, sorted within each path, each once.

        Raises:
            ValueError: If a path is neither a directory nor a file of a known kind, or holds none.
        """
        files: dict[Path, None] = {}
        for path in self.paths:
            if path.is_dir():
                found = sorted(
                    item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file()
                )
                if not found:
                    raise ValueError(
                        f"no .txt or .jsonl file in {path}; check data.source.init_args.paths."
                    )
            elif not path.is_file():
                raise ValueError(f"{path} does not exist; check data.source.init_args.paths.")
            elif path.suffix not in SUFFIXES:
                raise ValueError(f"{path} is neither .txt nor .jsonl; convert it or rename it.")
            else:
                found = [path]
            files.update(dict.fromkeys(found))
        return list(files)

    def _directory(self, files: list[Path]) -> Path:
        settings = {
            "kinds": [path.suffix for path in files],
            "vocab_size": self.build_settings.vocab_size,
            "shard_tokens": self.build_settings.shard_tokens,
            "tokenizer_characters": self.build_settings.tokenizer_characters,
            "val_fraction": self.val_fraction,
            "jsonl_field": self.jsonl_field,
            "document_separator": self.document_separator,
        }
        return self.cache_dir / fingerprint(files, settings)

    def _documents(self, files: list[Path]) -> Iterator[Document]:
        for path in files:
            texts = self._jsonl_texts(path) if path.suffix == ".jsonl" else self._txt_texts(path)
            for text in texts:
                if text.strip():
                    yield Document(text, held_out=hash_fraction(text) < self.val_fraction)

    def _txt_texts(self, path: Path) -> list[str]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it to UTF-8.") from error
        return [text] if self.document_separator is None else text.split(self.document_separator)

    def _jsonl_texts(self, path: Path) -> Iterator[str]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield self._jsonl_text(line, f"{path} line {number}")

    def _jsonl_text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not UTF-8 JSON ({error}); correct the line.") from error
        text = record.get(self.jsonl_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'{place} has no string under the key "{self.jsonl_field}"; set '
                "data.source.init_args.jsonl_field."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place} holds half a surrogate pair ({error}); correct the line."
            ) from error
        return text


def check_fraction(val_fraction: float) -> None:
    """Raise ValueError unless ``val_fraction`` leaves something on both sides."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"data.source.init_args.val_fraction is {val_fraction}; give a number between 0 and 1."
        )
