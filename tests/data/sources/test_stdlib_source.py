"""The standard library as a corpus."""

import json
import textwrap
import time

import numpy as np
import pytest

from pgl.data.shards import read_shard
from pgl.data.sources import Stdlib
from pgl.data.sources.stdlib import TOPICS, extract_blocks, module_files
from pgl.data.tokenizer import load_tokenizer

SOURCE = textwrap.dedent(
    '''
    #!/usr/bin/env python3
    # -*- coding: utf-8 -*-
    # Copyright 1999 by somebody. All rights reserved.
    # You may do this and that.

    """What this module does.

    Details of it.
    """

    # A comment that goes
    # over two lines.
    # ----------------
    import this  # noqa: F401


    class Thing:
        """A thing of some kind."""

        x = "# not a comment at all"  # what x is for

        async def act(self):
            """
            Act on the thing

                indented part
            """
            # short one
            return self  # the last word here
    '''
).encode()


def text_of(shards, tokenizer) -> list[str]:
    tokens = np.concatenate([read_shard(path) for path in shards])
    parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    return [tokenizer.decode(part[1:].tolist()) for part in parts]


def test_blocks_in_order_cleaned():
    assert extract_blocks(SOURCE) == [
        "What this module does.\n\nDetails of it.",
        "A comment that goes\nover two lines.",
        "A thing of some kind.",
        "what x is for",
        "Act on the thing\n\n    indented part",
        "the last word here",
    ]


@pytest.mark.parametrize("source", [b"def (", b"\xff\xfe\x00", b"x = '''", b"\x00"])
def test_source_that_does_not_parse_gives_nothing(source):
    assert extract_blocks(source) == []


def test_module_files_leave_tests_and_installed_packages_out(tmp_path):
    for name in (
        "a.py",
        "pack/__init__.py",
        "pack/inner.py",
        "pack/tests/test_a.py",
        "test/b.py",
        "site-packages/c.py",
        "__pycache__/a.py",
        "_sysconfigdata__linux.py",
        "pack/data.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(module_files(tmp_path)) == ["a", "pack", "pack.inner"]


MODULES = ["textwrap", "heapq", "bisect", "random", "string", "shlex", "glob", "fnmatch"]


def make(tmp_path, **settings) -> Stdlib:
    settings = {"vocab_size": 400, "val_fraction": 0.25, "modules": MODULES, **settings}
    return Stdlib(str(tmp_path / "cache"), **settings)


def test_modules_become_documents_of_two_splits(tmp_path):
    source = make(tmp_path)
    with pytest.raises(ValueError, match="has not been built"):
        source.corpus()
    source.prepare()
    corpus = source.corpus()
    assert corpus.name.startswith("stdlib-3.")
    assert corpus.vocab_size == 400
    assert corpus.val_xz_bits_per_byte > 1
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    train, val = (text_of(s, tokenizer) for s in (corpus.train_shards, corpus.val_shards))
    assert len(train) + len(val) == 8
    assert any("Heap queue algorithm" in text for text in train + val)


def test_nothing_is_said_twice(tmp_path):
    source = make(tmp_path, modules=[TOPICS], val_fraction=0.1)
    source.prepare()
    corpus = source.corpus()
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    train = " ".join(text_of(corpus.train_shards, tokenizer))
    val = " ".join(text_of(corpus.val_shards, tokenizer))
    sentence = 'The "while" statement is used for repeated execution'
    assert (train + val).count(sentence) == 1


def test_same_modules_give_the_same_files(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    first.prepare()
    second.prepare()
    assert first.corpus().tokenizer_path.is_relative_to(tmp_path / "a" / "cache")
    for one, other in zip(
        sorted(first.corpus().tokenizer_path.parent.iterdir()),
        sorted(second.corpus().tokenizer_path.parent.iterdir()),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "change", [{"vocab_size": 410}, {"val_fraction": 0.3}, {"modules": MODULES[:-1]}]
)
def test_other_settings_build_anew(tmp_path, change):
    first, second = make(tmp_path), make(tmp_path, **change)
    first.prepare()
    with pytest.raises(ValueError, match="has not been built"):
        second.corpus()
    second.prepare()
    assert first.corpus() != second.corpus()


def test_cache_is_used_again(tmp_path, monkeypatch):
    make(tmp_path).prepare()
    monkeypatch.setattr(Stdlib, "_documents", None)
    make(tmp_path).prepare()


def test_modules_decide_the_split_whatever_else_is_read(tmp_path):
    whole = {document.text: document.held_out for document in make(tmp_path)._documents()}
    assert set(whole.values()) == {True, False}
    part = list(make(tmp_path, modules=MODULES[1:4])._documents())
    assert [document.held_out for document in part] == [whole[document.text] for document in part]


def test_unknown_modules_are_named(tmp_path):
    source = make(tmp_path, modules=["random", "numpy"])
    with pytest.raises(ValueError, match=r"no source of numpy; correct .*\.modules"):
        source.prepare()


def test_settings_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="val_fraction is 1"):
        make(tmp_path, val_fraction=1.0)
    with pytest.raises(ValueError, match="modules is empty"):
        make(tmp_path, modules=[])


@pytest.mark.slow
def test_whole_library(tmp_path):
    started = time.perf_counter()
    source = Stdlib(str(tmp_path / "cache"))
    source.prepare()
    assert time.perf_counter() - started < 60
    corpus = source.corpus()
    assert corpus.vocab_size == 1024
    manifest = json.loads((corpus.tokenizer_path.parent / "manifest.json").read_text())
    assert manifest["splits"]["train"]["text_bytes"] > 2_500_000
    assert manifest["splits"]["val"]["text_bytes"] > 100_000
    assert 1.5 < corpus.val_xz_bits_per_byte < 3.5
