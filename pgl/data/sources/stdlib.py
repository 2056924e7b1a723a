"""The English that every Python installation carries: a corpus without a download."""

import ast
import importlib
import inspect
import io
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
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
from pgl.data.sources.text import check_fraction

TOPICS = "pydoc_data.topics"
# Tests, what was installed later, generated files, and programs that are no part of the library.
SKIPPED_FOLDERS = re.compile(
    r"tests?|idle_test|turtledemo|(site|dist)-packages|__pycache__|lib-dynload|config-.*|_bundled"
)
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|\d.*")
LEGAL = re.compile(r"copyright|all rights reserved|licen[sc]ed? |warrant(y|ies)", re.IGNORECASE)
# Lines of comments that speak to programs, not to people.
MARKS = re.compile(
    r"!|.*-\*-|\s*(coding[:=]|(type|pragma|pylint|noqa|fmt|vim?|emacs|mypy)\b)",
    re.IGNORECASE,
)
MIN_WORDS = 3
MIN_DOCUMENT_WORDS = 20
_WORD = re.compile(r"[A-Za-z]{2,}")
_HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Stdlib(Source):
    """The language reference, and the docstrings and comments of the standard library.

    Nothing is downloaded and nothing imported but the reference topics that ``help()`` shows. A
    module is one document: its docstrings and comments in order of appearance; a topic is one too.
    Licences, editor marks and blocks that an earlier document has already are left out. Whole
    modules are held out for validation, chosen by a hash of their names. The same Python version
    gives the same corpus, byte for byte; scores of different versions do not compare.

    Args:
        cache_dir: Where tokenizer and shards are kept.
        vocab_size: Number of pieces of the tokenizer.
        val_fraction: Share of the modules held out for validation, in (0, 1).
        modules: Names of the modules to read, ``pydoc_data.topics`` standing for the language
            reference; null reads all.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        cache_dir: str = "data/stdlib",
        vocab_size: int = 1024,
        val_fraction: float = 0.05,
        modules: list[str] | None = None,
    ) -> None:
        check_fraction(val_fraction)
        if modules is not None and not modules:
            raise ValueError(
                "data.source.init_args.modules is empty; name some, or give null for all."
            )
        self.cache_dir = Path(cache_dir)
        self.val_fraction = val_fraction
        self.modules = modules
        self.build_settings = BuildSettings(
            name=f"stdlib-{platform.python_version()}",
            vocab_size=vocab_size,
            shard_tokens=10_000_000,
            tokenizer_characters=100_000_000,
            threads=os.cpu_count() or 1,
            more_documents="give more modules",
        )

    def prepare(self) -> None:
        """Extract the text, train the tokenizer and write the shards, unless that has been done."""
        build_once(self._directory, self._documents, self.build_settings)

    def corpus(self) -> Corpus:
        """Return the built corpus. Reads the modules once for their hash."""
        return load_built(self._directory)

    @cached_property
    def _files(self) -> dict[str, Path]:
        found = module_files(Path(sysconfig.get_path("stdlib")))
        if self.modules is None:
            return found
        missing = sorted(set(self.modules) - set(found))
        if missing:
            raise ValueError(
                f"the standard library has no source of {', '.join(missing)}; correct "
                "data.source.init_args.modules."
            )
        return {name: found[name] for name in sorted(set(self.modules))}

    @cached_property
    def _directory(self) -> Path:
        settings = {
            "modules": list(self._files),
            "vocab_size": self.build_settings.vocab_size,
            "val_fraction": self.val_fraction,
        }
        return self.cache_dir / fingerprint(self._files.values(), settings)

    def _documents(self) -> Iterator[Document]:
        for name, text in self._texts:
            yield Document(text, held_out=hash_fraction(name) < self.val_fraction)

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        seen: set[str] = set()
        texts = []
        for name, path in self._files.items():
            blocks_of = _topics() if name == TOPICS else {name: extract_blocks(path.read_bytes())}
            for document_name, blocks in blocks_of.items():
                # Signatures and notices recur word for word: held-out ones would be known already.
                fresh = [block for block in blocks if _key(block) not in seen]
                seen.update(map(_key, fresh))
                text = "\n\n".join(fresh)
                if len(_WORD.findall(text)) >= MIN_DOCUMENT_WORDS:
                    texts.append((document_name, text))
        return texts


def module_files(library: Path) -> dict[str, Path]:
    """Return the source files of the standard library by module name, sorted by name."""
    files = {}
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if not SKIPPED_FOLDERS.fullmatch(name)]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and not SKIPPED_FILES.fullmatch(path.stem):
                parts = path.relative_to(library).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                files[module] = path
    return dict(sorted(files.items()))


def extract_blocks(source: bytes) -> list[str]:
    """Return a module's docstrings and comments, cleaned, in order of appearance.

    Comments on lines that follow each other are one block. Blocks of under three words and
    licences are left out; a file that does not parse gives none.
    """
    try:
        blocks = [*_docstrings(source), *_comments(source)]
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return []
    ordered = (text for _, text in sorted(blocks))
    return [
        text
        for text in ordered
        if len(_WORD.findall(text)) >= MIN_WORDS and not LEGAL.search(text[:300])
    ]


def _docstrings(source: bytes) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _HAS_DOCSTRING):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text.strip()


def _comments(source: bytes) -> Iterator[tuple[int, str]]:
    start = last_line = last_column = -1
    lines: list[str] = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        if lines and (line != last_line + 1 or column != last_column):
            yield start, _join(lines)
            lines = []
        if not lines:
            start = line
        lines.append(token.string.lstrip("#").rstrip())
        last_line, last_column = line, column
    if lines:
        yield start, _join(lines)


def _join(lines: list[str]) -> str:
    kept = (line if _is_prose(line) and not MARKS.match(line) else "" for line in lines)
    return inspect.cleandoc("\n".join(kept)).strip()


def _is_prose(line: str) -> bool:
    # Rulers have no letters, the character names of the code pages are in capitals.
    return sum(map(str.islower, line)) > sum(map(str.isupper, line))


def _key(block: str) -> str:
    return " ".join(block.lower().split())


def _topics() -> dict[str, list[str]]:
    topics = importlib.import_module(TOPICS).topics
    return {
        f"{TOPICS}:{name}": [
            part.strip() for part in re.split(r"\n\s*\n", topics[name]) if _WORD.search(part)
        ]
        for name in sorted(topics)
    }
