"""The cache of the user's own text: when it is used, built anew, cleaned up or shared."""

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from pgl.data.sources import build
from tests.data.sources.stories import source, story


def test_cache_is_used_again(folder):
    text = source(folder)
    text.prepare()
    stamps = {path: path.stat().st_mtime_ns for path in text.corpus().train_shards}
    source(folder).prepare()
    assert stamps == {path: path.stat().st_mtime_ns for path in text.corpus().train_shards}


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 291},
        {"val_fraction": 0.3},
        {"shard_tokens": 400},
        {"tokenizer_characters": 5000},
        {"document_separator": " no "},
    ],
)
def test_other_settings_build_anew(folder, change):
    first, second = source(folder), source(folder, **change)
    first.prepare()
    second.prepare()
    assert first.corpus() != second.corpus()
    first.corpus()


def test_other_bytes_build_anew(folder):
    text = source(folder)
    text.prepare()
    before = text.corpus()
    (folder / "deep" / "3.txt").write_text(story(77))
    with pytest.raises(ValueError, match="has not been built"):
        text.corpus()
    text.prepare()
    assert text.corpus() != before


def test_damaged_cache_is_built_anew(folder):
    text = source(folder)
    text.prepare()
    shard = text.corpus().train_shards[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    text.prepare()
    assert shard.read_bytes() == good


@pytest.mark.parametrize("step", ["train_tokenizer", "encode_documents", "atomic_write"])
def test_interrupted_build_leaves_nothing_and_is_repeated(folder, monkeypatch, step):
    def interrupt(*args):
        raise KeyboardInterrupt

    text = source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(build, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            text.prepare()
    assert not [path for path in (folder.parent / "cache").iterdir() if path.is_dir()]
    text.prepare()
    text.corpus()


def test_killed_build_is_swept_away(folder):
    text = source(folder)
    text.prepare()
    directory = text.corpus().tokenizer_path.parent
    shutil.copytree(directory, directory.with_name(directory.name + ".building"))
    (directory / "manifest.json").unlink()
    text.prepare()
    text.corpus()
    assert not directory.with_name(directory.name + ".building").exists()


def prepare_and_report(folder: str, barrier, queue) -> None:
    text = source(Path(folder))
    encode = build.encode_documents

    def slow(*args):
        time.sleep(0.2)
        return encode(*args)

    build.encode_documents = slow
    barrier.wait()
    started = build.train_tokenizer
    trained = []
    build.train_tokenizer = lambda *args: trained.append(1) or started(*args)
    text.prepare()
    queue.put((len(trained), text.corpus().train_tokens))


def test_two_processes_build_once(folder):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=prepare_and_report, args=(str(folder), barrier, queue))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(trained for trained, _ in results) == [0, 1]
    assert results[0][1] == results[1][1]
