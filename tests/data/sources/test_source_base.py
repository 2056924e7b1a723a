"""What all sources share."""

import threading

import numpy as np
import pytest

from pgl.data.shards import ShardError, write_shard
from pgl.data.sources import Corpus
from pgl.data.sources.base import one_at_a_time
from pgl.data.tokenizer import save_tokenizer, train_tokenizer


def test_corpus_counts_from_headers(tmp_path):
    paths = [tmp_path / f"{index}.bin" for index in range(3)]
    for index, path in enumerate(paths):
        write_shard(path, np.arange(10 + index))
    save_tokenizer(tmp_path / "t.model", train_tokenizer(["a rose is a rose is a rose"], 272))
    corpus = Corpus.from_files("rose", paths[:2], paths[2:], tmp_path / "t.model", 2.5)
    assert (corpus.train_tokens, corpus.val_tokens, corpus.vocab_size) == (21, 12, 272)
    assert corpus.val_xz_bits_per_byte == 2.5
    assert corpus == Corpus.from_files("rose", paths[:2], paths[2:], tmp_path / "t.model", 2.5)
    paths[2].write_bytes(b"")
    with pytest.raises(ShardError, match=r"2\.bin is empty"):
        Corpus.from_files("rose", paths[:2], paths[2:], tmp_path / "t.model")


def test_one_at_a_time_waits_and_says_so(tmp_path, capfd):
    lock, order = tmp_path / "new" / "lock", []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with one_at_a_time(lock, "building something"):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second():
        with one_at_a_time(lock, "building something"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]
    assert "Another process is building something; waiting" in capfd.readouterr().err


def test_one_at_a_time_lets_go_after_an_error(tmp_path):
    with pytest.raises(KeyError), one_at_a_time(tmp_path / "lock", "x"):
        raise KeyError
    with one_at_a_time(tmp_path / "lock", "x"):
        pass
