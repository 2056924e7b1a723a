"""Damaged and hostile files: one sentence with the file's name, and no code is ever run."""

import io
import json
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.data import Text
from pgl.data.shards import ShardError, read_shard, write_shard
from pgl.data.sources.fineweb import list_files
from pgl.data.tokenizer import load_tokenizer
from pgl.module import CHECKPOINT_FORMAT, check_format

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("pgl", "callbacks") for path in (REPOSITORY / folder).rglob("*.py")]


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def checkpoint_bytes() -> bytes:
    buffer = io.BytesIO()
    state = {"gpt.tok_emb.weight": torch.randn(20, 8), "gpt.gain": torch.ones(8)}
    torch.save({"state_dict": state, "pgl_format": 1, "loops": {"steps": [1, 2]}}, buffer)
    return buffer.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, cut, zero, repeat a piece, or claim an absurd size."""
    changed = bytearray(data)
    position = rng.randrange(len(data))
    kind = rng.choice(["flip", "cut", "zero", "splice", "huge"])
    if kind == "flip":
        changed[position] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[position:]
    elif kind == "zero":
        changed[position : position + 8] = bytes(8)
    elif kind == "splice":
        changed[position:position] = data[: rng.randrange(1, 100)]
    else:
        changed[position : position + 4] = b"\xff\xff\xff\x7f"
    return bytes(changed)


@pytest.mark.parametrize("way", ["zip", "legacy", "bare pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(way, tmp_path):
    path, touched = tmp_path / "evil.ckpt", tmp_path / "touched"
    contents = {"state_dict": {}, "hyper_parameters": Trap(touched)}
    if way == "bare pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(ValueError, match=r"evil\.ckpt is neither a whole Lightning checkpoint"):
        GolfCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not touched.exists()
    Trap(touched).__reduce__()[0](touched)
    assert touched.exists()  # the trap works


def test_every_load_takes_plain_values_only():
    calls = [
        call
        for path in SOURCES
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text())
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls)
    unsafe = re.compile(
        r"pickle\.loads?\(|\bUnpickler\(|allow_pickle=True|\beval\(|\bexec\(|extractall"
    )
    for path in SOURCES:
        found = [m for m in unsafe.findall(path.read_text()) if m not in ("eval(", "exec(")]
        assert found == [], path


def refusal(load: Callable[[Path], object], path: Path) -> str | None:
    """Return the sentence with which a file is refused, None if it is read."""
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_checkpoint_is_named_or_reads_as_plain_values(seed, checkpoint_bytes, tmp_path):
    path, rng = tmp_path / "damaged.ckpt", random.Random(seed)
    said = []
    for _ in range(100):
        path.write_bytes(damaged(checkpoint_bytes, rng))
        said.append(refusal(GolfCheckpointIO().load_checkpoint, path))
    refused = [line for line in said if line is not None]
    assert len(refused) > 10
    assert all("damaged.ckpt" in line and "\n" not in line for line in refused)


@pytest.mark.parametrize("size", [0, 1, 100, 1023, 1024, 1030])
def test_a_cut_shard_is_named(size, tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, torch.arange(50).numpy())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"fineweb_train_000000\.bin"):
        read_shard(path)


@pytest.mark.parametrize("claimed", [-1, 0, 49, 51, 2**31 - 1])
def test_a_shard_that_lies_about_its_size_allocates_nothing(claimed, tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, torch.arange(50).numpy())
    data = bytearray(path.read_bytes())
    data[8:12] = claimed.to_bytes(4, "little", signed=True)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"fineweb_train_000000\.bin"):
            read_shard(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_damaged_shard_keeps_its_length_or_is_named(tmp_path):
    path, rng = tmp_path / "fineweb_train_000000.bin", random.Random(0)
    write_shard(path, torch.arange(50).numpy())
    whole = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damaged(whole, rng))
        line = refusal(read_shard, path)
        assert len(read_shard(path)) == 50 if line is None else path.name in line


def test_a_damaged_tokenizer_is_named_or_loads(tiny_corpus, tmp_path):
    whole, rng = Path(tiny_corpus.tokenizer_path).read_bytes(), random.Random(0)
    path = tmp_path / "damaged.model"
    refused = 0
    for _ in range(150):
        path.write_bytes(damaged(whole, rng))
        line = refusal(load_tokenizer, path)
        assert line is None or "damaged.model" in line
        refused += line is not None
    assert refused > 10


@pytest.mark.parametrize(
    "contents", ["", "[]", "{", '{"name": 1}', "\x00", '{"splits": {"val": 0}}']
)
def test_a_damaged_corpus_manifest_is_named_and_built_again(contents, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} words and more words" for i in range(300)))
    source = Text(
        [str(tmp_path / "text.txt")],
        str(tmp_path / "cache"),
        vocab_size=290,
        val_fraction=0.1,
        document_separator="\n\n",
    )
    source.prepare()
    [manifest] = (tmp_path / "cache").rglob("manifest.json")
    whole = manifest.read_text()
    manifest.write_text(contents)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        source.corpus()
    source.prepare()
    assert json.loads(manifest.read_text()) == json.loads(whole)


@pytest.mark.parametrize("count", [0, 10**12, True + 0.5, "2", None])
def test_a_remote_manifest_with_an_absurd_count_is_refused(count):
    entry = {"name": "d", "stats": {"files_train": count, "files_val": 1}, "tokenizer_name": "t"}
    tokenizers = [{"name": "t", "model_path": "t.model"}]
    with pytest.raises(ValueError, match=r"stats\.files_train"):
        list_files({"datasets": [entry], "tokenizers": tokenizers}, "d", "someone/data")


@pytest.mark.parametrize("model", ["/etc/t.model", "../t.model", "a/../../t.model"])
def test_a_remote_manifest_cannot_name_a_file_outside(model):
    entry = {"name": "d", "stats": {"files_train": 1, "files_val": 1}, "tokenizer_name": "t"}
    tokenizers = [{"name": "t", "model_path": model}]
    with pytest.raises(ValueError, match="as the model of tokenizer t"):
        list_files({"datasets": [entry], "tokenizers": tokenizers}, "d", "someone/data")


@pytest.mark.parametrize("found", [CHECKPOINT_FORMAT + 1, 99, "1", None, [1]])
def test_a_checkpoint_of_another_format_says_who_wrote_it_and_what_reads_it(found):
    with pytest.raises(ValueError, match=r"written by pgl 7\.1\.0 in format .*reads up to format"):
        check_format({"pgl_format": found, "pgl_version": "7.1.0"})
