"""The data module: accumulation, refusals, the audit, calibration and what it says of itself."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from pgl.data import Shards, TokenDataModule, write_shard
from pgl.data.tokenizer import encode_documents, load_tokenizer
from pgl.evaluate import WindowLoader
from pgl.module import GolfModule


def attach(data, world_size=1, rank=0, accumulate=1, step=0):
    data.trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulate,
        global_step=step,
        limit_train_batches=1.0,
        fast_dev_run=False,
    )
    return data.trainer


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_batch_micro_batch_and_world(tiny_data, world_size, accumulate):
    trainer = attach(tiny_data, world_size)
    tiny_data.setup("fit")
    assert trainer.accumulate_grad_batches == accumulate
    assert tiny_data.layout.accumulate == accumulate
    assert next(iter(tiny_data.train_dataloader())).shape == (2, 33)


def test_micro_batches_and_spans_are_the_configured_ones(tiny_corpus):
    # Neither is what follows from the other: 256 tokens in 2 spans would make micro-batches of 128.
    data = TokenDataModule(
        tiny_corpus, seq_len=32, batch_tokens=256, micro_batch_tokens=64, spans_per_batch=2
    )
    trainer = attach(data)
    data.setup("fit")
    assert trainer.accumulate_grad_batches == 4
    step = [data.layout.read_micro_batch(data.stream, 0, index) for index in range(4)]
    sequences = [row for micro_batch in step for row in micro_batch]
    assert [len(micro_batch) for micro_batch in step] == [2] * 4
    # Sequences of a span share a token with their neighbour; a span begins with one of its own.
    starts = [start + 32 * index for start in (0, 129) for index in range(4)]
    expected = {tuple(data.stream.read(start, 33).tolist()) for start in starts}
    assert {tuple(row.tolist()) for row in sequences} == expected


@pytest.mark.parametrize(("windows", "sizes"), [(5, [5] * 3), (8, [8] * 2), (None, [32])])
def test_windows_are_scored_in_batches_of_the_configured_size(tiny_corpus, windows, sizes):
    data = TokenDataModule(
        tiny_corpus, seq_len=32, batch_tokens=256, max_val_tokens=400, val_batch_windows=windows
    )
    data.setup("validate")
    # Thirteen windows; what is left of the last batch is padding.
    assert [len(batch.tokens_BS1) for batch in data.val_dataloader()] == sizes


def test_an_impossible_split_is_refused_with_the_numbers(tiny_data):
    attach(tiny_data, world_size=3)
    with pytest.raises(ValueError, match=r"batch_tokens=256 cannot be split evenly over 3 devices"):
        tiny_data.setup("fit")


def test_another_accumulation_is_refused(tiny_data):
    attach(tiny_data, accumulate=4)
    tiny_data.setup("fit")  # the one that follows anyway
    attach(tiny_data, accumulate=3)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=3 does not fit"):
        tiny_data.setup("fit")


@pytest.mark.parametrize(
    "setting", [{"limit_train_batches": 6}, {"limit_train_batches": 1}, {"overfit_batches": 1}]
)
def test_a_part_of_the_batches_is_refused(golf_run, setting):
    run = golf_run(fit=False, **setting)
    run.data.trainer = run.trainer
    with pytest.raises(ValueError, match=r"limit_train_batches and .* set budget\.steps"):
        run.data.setup("fit")


def test_fast_dev_run_may_cut_a_step_short(golf_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it has no logger's folder to write to
    run = golf_run(fast_dev_run=True)
    assert run.trainer.global_step == 1


def test_training_goes_on_from_the_step_of_the_trainer(tiny_data):
    attach(tiny_data, step=5)
    tiny_data.setup("fit")
    tokens = next(iter(tiny_data.train_dataloader()))
    expected = tiny_data.layout.read_micro_batch(tiny_data.stream, 5, 0)
    assert (tokens.numpy() == expected).all()


def test_another_vocabulary_than_the_models_is_refused(tiny_data, tiny_gpt):
    tiny_data.setup("fit")
    module = GolfModule(tiny_gpt.__class__(**{**vars(tiny_gpt), "vocab_size": 512}))
    module._trainer = SimpleNamespace(datamodule=tiny_data)
    with pytest.raises(ValueError, match=r"model\.gpt\.vocab_size=512 but .* has 320 tokens"):
        module.setup("validate")


def test_documents_that_begin_with_another_token_than_the_models_are_refused(tmp_path, tiny_gpt):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the model reads", "the file"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        minloglevel=2,
        pad_id=0,
        bos_id=2,
        eos_id=-1,
        unk_id=1,
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    tokens = np.concatenate(encode_documents(tokenizer, ["the model reads", "the file"] * 40, 1))
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", tokens)
    data = TokenDataModule(Shards(str(tmp_path)), seq_len=32, batch_tokens=256)
    data.setup("fit")  # the audit knows where documents begin
    module = GolfModule(replace(tiny_gpt, vocab_size=data.vocab_size))
    module._trainer = SimpleNamespace(datamodule=data)
    with pytest.raises(ValueError, match=r"model\.gpt\.bos_id=1 but .* with 2: set .* to 2"):
        module.setup("validate")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_byte_count_is_audited_before_anything_is_scored(tiny_corpus, monkeypatch, stage):
    asked = []

    def failing(table, tokenizer, tokens, bos_id, max_tokens):
        asked.append((len(tokens), bos_id, max_tokens))
        raise ValueError("the byte table is wrong")

    monkeypatch.setattr("pgl.data.datamodule.audit_bytes", failing)
    data = TokenDataModule(
        tiny_corpus, seq_len=32, batch_tokens=256, max_val_tokens=400, audit_tokens=123
    )
    with pytest.raises(ValueError, match="byte table is wrong"):
        data.setup(stage)
    assert asked == [(400, 1, 123)]


def test_prediction_needs_no_validation_text(tiny_data, monkeypatch):
    monkeypatch.setattr("pgl.data.datamodule.audit_bytes", None)
    tiny_data.setup("predict")
    tiny_data.set_prompts(["the file", "a"])
    prompts = tiny_data.predict_dataloader()
    assert [tiny_data.tokenizer.decode(ids.tolist()) for ids in prompts] == ["the file", "a"]
    assert not hasattr(tiny_data, "val_tokens")


def test_calibration_sequences_are_shared_out_once(tiny_data):
    attach(tiny_data)
    tiny_data.setup("fit")
    whole = tiny_data.calibration_layout(6)
    rows = [whole.read_micro_batch(tiny_data.stream, 0, i) for i in range(whole.accumulate)]
    expected = {row.tobytes() for micro_batch in rows for row in micro_batch}
    assert len(expected) == 6
    shared = []
    for rank in range(2):
        attach(tiny_data, world_size=2, rank=rank, accumulate=2)
        layout = tiny_data.calibration_layout(6)
        for index in range(layout.accumulate):
            micro_batch = layout.read_micro_batch(tiny_data.stream, 0, index)
            shared += [row.tobytes() for row in micro_batch]
    assert len(shared) == 6
    assert set(shared) == expected
    with pytest.raises(ValueError, match=r"calibration_sequences=7 must be a multiple of the 2"):
        tiny_data.calibration_layout(7)


def test_it_says_what_the_data_are(tiny_data):
    tiny_data.setup("fit")
    said = tiny_data.describe()
    paths = [*tiny_data.corpus.train_shards, *tiny_data.corpus.val_shards]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert {**said["train_shards"], **said["val_shards"]} == hashes
    tokenizer = tiny_data.corpus.tokenizer_path.read_bytes()
    assert said["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert said["val_targets"] == 399
    assert said["train_tokens"] == tiny_data.stream.total_tokens > 10_000


def test_validation_windows_can_be_replaced(tiny_data):
    tiny_data.setup("validate")
    loader = tiny_data.val_dataloader()
    assert (loader.seq_len, loader.stride) == (32, 32)
    other = WindowLoader(tiny_data.val_tokens, seq_len=16, stride=4)
    tiny_data.val_windows = lambda: other
    assert tiny_data.val_dataloader() is tiny_data.test_dataloader() is other


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"val_batch_windows": 0}, "val_batch_windows"),
        ({"max_val_tokens": 1}, "max_val_tokens"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 100}, "batch_tokens"),
        ({"micro_batch_tokens": 1000}, "micro_batch_tokens"),
    ],
)
def test_bad_settings_are_refused(tiny_corpus, settings, name):
    with pytest.raises(ValueError, match=f"data.{name}"):
        TokenDataModule(tiny_corpus, **settings)
