"""FineWeb against a hub on this machine that fails in every way seen in practice."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pgl.data.shards import read_shard, write_shard
from pgl.data.sources import DownloadError, FineWeb
from pgl.data.sources.hub import HubFiles
from pgl.data.tokenizer import train_tokenizer

DATASET = "datasets/datasets/fineweb10B_sp1024"
FIRST = f"{DATASET}/fineweb_train_000000.bin"
VAL = f"{DATASET}/fineweb_val_000000.bin"
VOCAB_SIZE = 300


def shard_bytes(folder: Path, seed: int, tokens: int = 3000) -> bytes:
    path = folder / f"{seed}.bin"
    write_shard(path, np.random.default_rng(seed).integers(0, VOCAB_SIZE, tokens))
    return path.read_bytes()


@pytest.fixture(scope="module")
def tokenizer_bytes() -> bytes:
    return train_tokenizer(
        ["the quick brown fox jumps over the lazy dog and runs away quietly "], VOCAB_SIZE
    )


@pytest.fixture
def stocked(hub, tokenizer_bytes, tmp_path):
    manifest = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1},
            }
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    hub.files["datasets/tokenizers/fineweb_1024_bpe.model"] = tokenizer_bytes
    (tmp_path / "made").mkdir()
    for index in range(3):
        name = f"{DATASET}/fineweb_train_{index:06d}.bin"
        hub.files[name] = shard_bytes(tmp_path / "made", index)
    hub.files[VAL] = shard_bytes(tmp_path / "made", 99)
    return hub


def source(tmp_path: Path, **settings) -> FineWeb:
    settings = {"train_shards": 2, "backoff_seconds": 0.0, "attempts": 3, **settings}
    return FineWeb(str(tmp_path / "cache"), repo_id="someone/golf", **settings)


def damage_manifest(hub, change) -> None:
    manifest = json.loads(hub.files["datasets/manifest.json"])
    change(manifest)
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()


def test_downloads_what_is_asked_for(stocked, tmp_path):
    fineweb = source(tmp_path)
    with pytest.raises(ValueError, match="has not been downloaded"):
        fineweb.corpus()
    fineweb.prepare()
    corpus = fineweb.corpus()
    assert corpus.name == "fineweb10B_sp1024"
    assert corpus.vocab_size == VOCAB_SIZE
    assert (corpus.train_tokens, corpus.val_tokens) == (6000, 3000)
    assert corpus.tokenizer_path.name == "fineweb_1024_bpe.model"
    assert [path.name for path in corpus.train_shards] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    assert corpus.train_shards[0].read_bytes() == stocked.files[FIRST]
    expected = np.random.default_rng(99).integers(0, VOCAB_SIZE, 3000)
    np.testing.assert_array_equal(read_shard(corpus.val_shards[0]), expected)
    assert f"{DATASET}/fineweb_train_000002.bin" not in stocked.gets()


def test_leaves_nothing_but_the_challenge_layout(stocked, tmp_path):
    fineweb = source(tmp_path)
    fineweb.prepare()
    files = {str(path.relative_to(fineweb.root)) for path in fineweb.root.rglob("*.*")}
    assert files - {".lock"} == {
        "manifest.json",
        "tokenizers/fineweb_1024_bpe.model",
        "datasets/fineweb10B_sp1024/fineweb_train_000000.bin",
        "datasets/fineweb10B_sp1024/fineweb_train_000001.bin",
        "datasets/fineweb10B_sp1024/fineweb_val_000000.bin",
    }


def test_files_of_another_revision_are_other_files(stocked, tmp_path):
    source(tmp_path).prepare()
    stocked.requests.clear()
    with pytest.raises(ValueError, match="someone/golf at v2 cannot be had"):
        source(tmp_path, revision="v2").prepare()
    assert all("/resolve/v2/" in name for _, name in stocked.requests)


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_files_are_loaded_at_a_time_as_configured(stocked, tmp_path, monkeypatch, threads):
    under_way, most = [], [0]
    fetch = HubFiles.fetch

    def slow_fetch(self, remote, *arguments):
        under_way.append(remote)
        most[0] = max(most[0], len(under_way))
        threading.Event().wait(0.2)
        fetch(self, remote, *arguments)
        under_way.remove(remote)

    monkeypatch.setattr(HubFiles, "fetch", slow_fetch)
    source(tmp_path, download_threads=threads).prepare()
    assert most[0] == threads


def test_second_prepare_needs_no_network(stocked, tmp_path):
    source(tmp_path).prepare()
    stocked.requests.clear()
    source(tmp_path).prepare()
    assert stocked.requests == []


def test_keeps_valid_files_and_replaces_damaged_ones(stocked, tmp_path):
    fineweb = source(tmp_path)
    fineweb.prepare()
    damaged = fineweb.corpus().train_shards[1]
    damaged.write_bytes(damaged.read_bytes()[:-2])
    stocked.requests.clear()
    fineweb.prepare()
    assert f"{DATASET}/fineweb_train_000001.bin" in stocked.gets()
    assert FIRST not in stocked.gets()
    assert damaged.read_bytes() == stocked.files[f"{DATASET}/fineweb_train_000001.bin"]


def test_more_shards_later_load_only_the_new_ones(stocked, tmp_path):
    source(tmp_path).prepare()
    stocked.requests.clear()
    source(tmp_path, train_shards=3).prepare()
    shards = [name for name in stocked.gets() if name.endswith(".bin")]
    assert shards == [f"{DATASET}/fineweb_train_000002.bin"]


@pytest.mark.parametrize("fault", ["empty", "short", "head_503", "get_503", "dies"])
@pytest.mark.parametrize("name", [FIRST, "datasets/manifest.json"])
def test_recovers_from_one_fault(stocked, tmp_path, fault, name):
    stocked.faults[name].append(fault)
    fineweb = source(tmp_path)
    fineweb.prepare()
    assert fineweb.corpus().train_shards[0].read_bytes() == stocked.files[FIRST]
    assert not stocked.faults[name]


def test_broken_connection_is_taken_up_where_it_broke(stocked, tmp_path):
    # Above a chunk of the client, so that there is something on disk to go on from.
    stocked.files[FIRST] = shard_bytes(tmp_path / "made", 7, tokens=16_000_000)
    stocked.faults[FIRST].append("dies")
    source(tmp_path, train_shards=1).prepare()
    assert stocked.ranges


@pytest.mark.parametrize("fault", ["empty", "short", "get_503"])
def test_gives_up_after_its_attempts_and_leaves_no_half_file(stocked, tmp_path, fault):
    stocked.faults[FIRST].extend([fault] * 50)
    fineweb = source(tmp_path, attempts=2)
    with pytest.raises(DownloadError, match=r"fineweb_train_000000\.bin .* in 2 attempts .*again"):
        fineweb.prepare()
    assert not (fineweb.root / "datasets/fineweb10B_sp1024/fineweb_train_000000.bin").exists()
    assert len(stocked.faults[FIRST]) == 48
    stocked.faults[FIRST].clear()
    fineweb.prepare()
    assert fineweb.corpus().train_tokens == 6000


def test_waits_longer_from_attempt_to_attempt(stocked, tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    stocked.faults[VAL].extend(["empty"] * 3)
    source(tmp_path, attempts=4, backoff_seconds=30.0).prepare()
    assert pauses == [30.0, 60.0, 60.0]


def test_refuses_shards_of_another_vocabulary(stocked, tmp_path):
    write_shard(tmp_path / "made/odd.bin", np.array([1, VOCAB_SIZE, 5]))
    stocked.files[VAL] = (tmp_path / "made/odd.bin").read_bytes()
    with pytest.raises(DownloadError, match=f"token {VOCAB_SIZE} at position 1"):
        source(tmp_path).prepare()


def test_too_many_shards_asked_for(stocked, tmp_path):
    with pytest.raises(ValueError, match="train_shards is 4, but someone/golf has 3 training"):
        source(tmp_path, train_shards=4).prepare()


def test_missing_variant_lists_what_there_is(stocked, tmp_path):
    with pytest.raises(
        ValueError, match=r"no data set fineweb10B_sp8192, it has fineweb10B_sp1024"
    ):
        source(tmp_path, variant="sp8192").prepare()


def test_missing_tokenizer_lists_what_there_is(stocked, tmp_path):
    damage_manifest(stocked, lambda m: m["tokenizers"][0].update(name="other"))
    with pytest.raises(ValueError, match="no tokenizer sp_bpe_1024, it has other"):
        source(tmp_path).prepare()


@pytest.mark.parametrize("model", ["../../evil.model", "/etc/evil.model", "tokens.json", None])
def test_refuses_odd_tokenizer_paths(stocked, tmp_path, model):
    damage_manifest(stocked, lambda m: m["tokenizers"][0].update(model_path=model))
    with pytest.raises(ValueError, match="as the model of tokenizer sp_bpe_1024"):
        source(tmp_path).prepare()


def test_manifest_without_counts(stocked, tmp_path):
    damage_manifest(stocked, lambda m: m["datasets"][0].pop("stats"))
    with pytest.raises(ValueError, match=r"stats\.files_train=None"):
        source(tmp_path).prepare()


def test_manifest_that_is_none(stocked, tmp_path):
    stocked.files["datasets/manifest.json"] = b"<html>"
    with pytest.raises(DownloadError, match="does not list datasets and tokenizers"):
        source(tmp_path).prepare()


def test_missing_repository_is_not_tried_again(stocked, tmp_path):
    fineweb = FineWeb(str(tmp_path), repo_id="nobody/nothing", train_shards=1)
    with pytest.raises(ValueError, match="nobody/nothing at main cannot be had"):
        fineweb.prepare()
    assert len(stocked.requests) == 1


def test_host_that_does_not_answer(stocked, tmp_path):
    stocked.shutdown()
    stocked.server_close()
    with pytest.raises(DownloadError, match=r"manifest\.json .* in 3 attempts"):
        source(tmp_path).prepare()


def test_missing_file_is_not_tried_again(stocked, tmp_path):
    del stocked.files[VAL]
    with pytest.raises(
        ValueError, match=r"fineweb_val_000000\.bin of someone/golf .* cannot be had"
    ):
        source(tmp_path).prepare()
    assert [name for _, name in stocked.requests].count(VAL) == 1


def test_other_prefix(stocked, tmp_path):
    stocked.files = {name.split("/", 1)[1]: content for name, content in stocked.files.items()}
    source(tmp_path, remote_prefix=".").prepare()


@pytest.mark.parametrize(
    "settings", [{"train_shards": 0}, {"attempts": 0}, {"backoff_seconds": -1.0}]
)
def test_settings_out_of_range(tmp_path, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; give at least"):
        source(tmp_path, **settings)
