"""Directories that hold shards already."""

import numpy as np
import pytest

from pgl.data.shards import ShardError, write_shard
from pgl.data.sources import Shards
from pgl.data.tokenizer import save_tokenizer, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away quietly "


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer([TEXT], 300)


def fill(directory, train=3):
    for index in range(train):
        write_shard(directory / f"fineweb_train_{index:06d}.bin", np.full(10 + index, index))
    write_shard(directory / "fineweb_val_000000.bin", np.full(5, 7))


@pytest.fixture
def layout(tmp_path, model):
    fill(tmp_path / "datasets" / "mine")
    save_tokenizer(tmp_path / "tokenizers" / "mine.model", model)
    return tmp_path


def test_challenge_layout(layout):
    source = Shards(str(layout))
    source.prepare()
    corpus = source.corpus()
    assert corpus.name == "mine"
    assert corpus.tokenizer_path == layout / "tokenizers" / "mine.model"
    assert [path.name for path in corpus.train_shards] == [
        f"fineweb_train_{index:06d}.bin" for index in range(3)
    ]
    assert (corpus.vocab_size, corpus.train_tokens, corpus.val_tokens) == (300, 33, 5)
    assert corpus.val_xz_bits_per_byte is None


def test_directory_of_the_shards_itself(layout):
    inner = Shards(str(layout / "datasets" / "mine")).corpus()
    assert inner.train_shards == Shards(str(layout)).corpus().train_shards
    assert inner.tokenizer_path.samefile(layout / "tokenizers" / "mine.model")


def test_flat_directory(tmp_path, model):
    fill(tmp_path / "flat")
    save_tokenizer(tmp_path / "elsewhere.model", model)
    with pytest.raises(
        ValueError, match=r"no \*\.model in .*; set data\.source\.init_args\.tokenizer_path"
    ):
        Shards(str(tmp_path / "flat")).corpus()
    corpus = Shards(str(tmp_path / "flat"), str(tmp_path / "elsewhere.model")).corpus()
    assert corpus.vocab_size == 300
    save_tokenizer(tmp_path / "flat" / "beside.model", model)
    assert Shards(str(tmp_path / "flat")).corpus().tokenizer_path.name == "beside.model"


def test_max_train_shards(layout):
    corpus = Shards(str(layout), max_train_shards=2).corpus()
    assert len(corpus.train_shards) == 2
    assert corpus.train_tokens == 21
    assert Shards(str(layout), max_train_shards=9).corpus().train_tokens == 33
    with pytest.raises(ValueError, match="max_train_shards is 0"):
        Shards(str(layout), max_train_shards=0)


def test_several_data_sets_or_tokenizers(layout, model):
    save_tokenizer(layout / "tokenizers" / "other.model", model)
    with pytest.raises(ValueError, match=r"several tokenizers .*mine\.model.*other\.model"):
        Shards(str(layout)).corpus()
    fill(layout / "datasets" / "other")
    with pytest.raises(ValueError, match=r"several data sets .*mine.*other"):
        Shards(str(layout)).corpus()


def test_directory_without_shards(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        Shards(str(tmp_path / "none")).prepare()
    with pytest.raises(ValueError, match=r"has neither fineweb_\*\.bin nor"):
        Shards(str(tmp_path)).prepare()


def test_missing_split_and_damaged_shard(layout):
    val = layout / "datasets" / "mine" / "fineweb_val_000000.bin"
    val.write_bytes(val.read_bytes()[:-1])
    with pytest.raises(ShardError, match="header promises 5 tokens"):
        Shards(str(layout)).prepare()
    val.unlink()
    with pytest.raises(ShardError, match="no fineweb_val_"):
        Shards(str(layout)).prepare()


def test_damaged_tokenizer(layout):
    (layout / "tokenizers" / "mine.model").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Shards(str(layout)).prepare()
