"""The user's own text: splits, shards, tokenizer, and errors that say what to do."""

import json
import lzma
import os

import numpy as np
import pytest

from pgl.data.shards import read_shard
from pgl.data.sources import Text, build
from pgl.data.tokenizer import encode_documents, load_tokenizer
from tests.data.sources.stories import documents_of, manifest_of, source, story


def test_every_document_is_in_exactly_one_split(folder):
    text = source(folder)
    with pytest.raises(ValueError, match="has not been built"):
        text.corpus()
    text.prepare()
    corpus = text.corpus()
    assert corpus.vocab_size == 290
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    seeds = [*range(10), *range(100, 160)]
    encoded = encode_documents(tokenizer, [story(seed) for seed in seeds], threads=1)
    expected = {tuple(ids.tolist()) for ids in encoded}
    train, val = documents_of(corpus.train_shards), documents_of(corpus.val_shards)
    assert len(train) + len(val) == len(expected) == 70
    assert {*map(tuple, train), *map(tuple, val)} == expected
    assert 4 <= len(val) <= 26
    assert corpus.train_tokens == sum(map(len, train))


def test_manifest_counts_and_xz(folder):
    text = source(folder)
    text.prepare()
    corpus = text.corpus()
    splits = manifest_of(corpus)["splits"]
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    for name, shards in (("train", corpus.train_shards), ("val", corpus.val_shards)):
        documents = documents_of(shards)
        texts = [tokenizer.decode(tokens[1:]) for tokens in documents]
        assert splits[name]["documents"] == len(documents)
        assert splits[name]["tokens"] == sum(map(len, documents))
        assert splits[name]["text_bytes"] == sum(len(text.encode()) for text in texts)
    raw = "".join(text + "\n" for text in texts).encode()
    xz_bytes = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    assert splits["val"]["xz_bytes"] == xz_bytes
    assert corpus.val_xz_bits_per_byte == 8 * xz_bytes / splits["val"]["text_bytes"]


def test_xz_is_not_measured_above_its_limit(folder, monkeypatch):
    monkeypatch.setattr(build, "XZ_LIMIT_BYTES", 100)
    text = source(folder)
    text.prepare()
    assert text.corpus().val_xz_bits_per_byte is None


def test_shards_are_cut_at_their_size_and_batches_do_not_matter(folder, monkeypatch):
    whole = source(folder)
    whole.prepare()
    monkeypatch.setattr(build, "BATCH_CHARACTERS", 1000)
    cut = source(folder, shard_tokens=500, workers=2)
    cut.prepare()
    sizes = [len(read_shard(path)) for path in cut.corpus().train_shards]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {500}
    assert sizes[-1] <= 500
    for split in ("train_shards", "val_shards"):
        assert documents_of(getattr(cut.corpus(), split)) == documents_of(
            getattr(whole.corpus(), split)
        )


def test_split_does_not_move_when_documents_are_added(folder):
    text = source(folder)
    text.prepare()
    before = manifest_of(text.corpus())["splits"]["val"]["documents"]
    (folder / "new.jsonl").write_text(json.dumps({"text": story(5)}))  # a copy of 5.txt
    text.prepare()
    tokenizer = load_tokenizer(text.corpus().tokenizer_path)
    val = [tokenizer.decode(tokens[1:]) for tokens in documents_of(text.corpus().val_shards)]
    held_out = story(5) in val
    assert val.count(story(5)) == (2 if held_out else 0)
    assert len(val) == before + held_out


def test_tokenizer_never_sees_the_validation_text(folder, monkeypatch):
    seen: list[str] = []
    train = build.train_tokenizer

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(build, "train_tokenizer", spy)
    text = source(folder)
    text.prepare()
    tokenizer = load_tokenizer(text.corpus().tokenizer_path)
    train_documents = documents_of(text.corpus().train_shards)
    assert sorted(seen) == sorted(tokenizer.decode(tokens[1:]) for tokens in train_documents)


def test_tokenizer_sees_a_sample_of_much_text(folder, monkeypatch):
    seen: list[str] = []
    train = build.train_tokenizer

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(build, "train_tokenizer", spy)
    source(folder, tokenizer_characters=5000).prepare()
    assert 2000 < sum(map(len, seen)) < 9000


def test_separator_cuts_one_file_into_documents(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("<|end|>".join(story(seed) for seed in range(40)))
    text = Text([str(path)], str(tmp_path / "cache"), 290, 0.2, document_separator="<|end|>")
    text.prepare()
    splits = manifest_of(text.corpus())["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 40


def test_single_document_cannot_be_split(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(story(1, 3000))
    text = Text([str(path)], str(tmp_path / "cache"), 290)
    with pytest.raises(ValueError, match=r"none of the 1 documents .*\.document_separator"):
        text.prepare()


def test_byte_order_mark_and_empty_documents_are_dropped(tmp_path):
    (tmp_path / "t").mkdir()
    for seed in range(20):
        (tmp_path / "t" / f"{seed}.txt").write_bytes(b"\xef\xbb\xbf" + story(seed).encode())
    (tmp_path / "t" / "empty.txt").write_text(" \n")
    text = Text([str(tmp_path / "t")], str(tmp_path / "cache"), 290, 0.3)
    text.prepare()
    splits = manifest_of(text.corpus())["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == 20
    tokenizer = load_tokenizer(text.corpus().tokenizer_path)
    assert "\ufeff" not in "".join(tokenizer.id_to_piece(index) for index in range(290))


def test_files_given_twice_are_read_once(folder):
    text = Text([str(folder), str(folder / "deep" / "0.txt")], "unused")
    assert len(text.files()) == 11


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.txt", "caf\xe9 ".encode("latin-1"), r"a\.txt is not UTF-8 .*; convert it"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', r"a\.jsonl line 2 is not UTF-8 JSON"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            r'line 1 has no string under the key "text"; set data.source.init_args.jsonl_field',
        ),
        ("a.jsonl", b'["text"]\n', r'line 1 has no string under the key "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, wrong):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wrong):
        Text([str(tmp_path / name)], str(tmp_path / "cache")).prepare()


def test_jsonl_field(tmp_path):
    lines = [json.dumps({"body": story(seed)}) for seed in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    text = Text([str(tmp_path)], str(tmp_path / "cache"), 290, 0.2, jsonl_field="body")
    text.prepare()
    assert text.corpus().train_tokens > 100


def test_paths_are_checked(tmp_path):
    (tmp_path / "a.pdf").touch()
    for path, wrong in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, r"no \.txt or \.jsonl file in"),
        (tmp_path / "a.pdf", r"is neither \.txt nor \.jsonl"),
    ):
        with pytest.raises(ValueError, match=wrong):
            Text([str(path)], str(tmp_path / "cache")).prepare()


@pytest.mark.parametrize(
    "settings",
    [
        {"paths": []},
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"shard_tokens": 0},
        {"workers": 0},
        {"tokenizer_characters": 0},
        {"document_separator": ""},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is "):
        Text(**{"paths": ["x"], **settings})


def test_hash_fraction_is_even():
    values = np.array([build.hash_fraction(str(index)) for index in range(2000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert np.histogram(values, bins=10, range=(0, 1))[0].min() > 140
    assert build.hash_fraction("a") != build.hash_fraction("a", salt="b")


def test_default_is_all_processors():
    assert Text(["x"]).build_settings.threads == os.cpu_count()
    assert Text(["x"], workers=1).build_settings.threads == 1
