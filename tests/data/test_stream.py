import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.data import BatchLayout, ShardError, TokenStream, TrainLoader, write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"fineweb_train_{i:06d}.bin" for i in range(3)]
    # Each token is its own position, so that a read can be checked at sight.
    for path, (start, end) in zip(paths, [(0, 500), (500, 507), (507, 1200)], strict=True):
        write_shard(path, np.arange(start, end, dtype=np.uint16))
    return paths


@pytest.fixture(scope="module")
def stream(shards):
    return TokenStream(shards, vocab_size=1200)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10_000), count=st.integers(1, 3_000))
def test_read_is_the_repeated_concatenation(stream, position, count):
    np.testing.assert_array_equal(
        stream.read(position, count), np.arange(position, position + count) % 1200
    )


def test_a_token_outside_the_vocabulary_names_the_file_and_the_position_in_it(shards):
    # The third shard begins with token 507.
    with pytest.raises(ShardError, match=r"000002\.bin has token 1000 at position 493,"):
        TokenStream(shards, vocab_size=1000).read(900, 200)


def reference_step(stream: TokenStream, layout: BatchLayout, step: int) -> np.ndarray:
    """The order of the reference loader, word for word: spans of local + 1 tokens in a row."""
    local = layout.batch_tokens // layout.spans_per_batch
    rows = []
    for span in range(layout.spans_per_batch):
        tokens = stream.read((step * layout.spans_per_batch + span) * (local + 1), local + 1)
        inputs = tokens[:-1].reshape(-1, layout.seq_len)
        targets = tokens[1:].reshape(-1, layout.seq_len)
        rows.append(np.concatenate([inputs, targets[:, -1:]], axis=1))
    return np.concatenate(rows)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_tokens", [16, 32, 64])
def test_every_world_size_and_micro_batch_sees_the_same_step(
    stream, world_size, micro_batch_tokens
):
    def layout(rank):
        return BatchLayout(512, 16, micro_batch_tokens, 8, world_size, rank)

    for step in (0, 1, 7):
        parts = [
            layout(rank).read_micro_batch(stream, step, micro_step)
            for micro_step in range(layout(0).accumulate)
            for rank in range(world_size)
        ]
        np.testing.assert_array_equal(
            np.concatenate(parts), reference_step(stream, layout(0), step)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((500, 16, 16), "batch_tokens=500 must be a multiple"),
        ((512, 16, 24), "micro_batch_tokens=24 must be a multiple"),
        ((512, 16, 64, 8, 3), "over 3 devices"),
        ((512, 0, 64), "seq_len must be positive"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchLayout(*arguments)


def test_loader_resumes_without_losing_or_repeating_a_batch(stream):
    layout = BatchLayout(256, 16, 64)
    whole = [batch.numpy() for batch in itertools.islice(TrainLoader(stream, layout), 12)]
    first = TrainLoader(stream, layout)
    iterator = iter(first)
    for _ in range(8):
        next(iterator)
    second = TrainLoader(stream, layout)
    second.load_state_dict(first.state_dict())
    for expected, batch in zip(whole[8:], second, strict=False):
        np.testing.assert_array_equal(batch.numpy(), expected)


def test_a_step_that_was_cut_short_is_read_again(stream):
    loader = TrainLoader(stream, BatchLayout(256, 16, 64))
    iterator = iter(loader)
    for _ in range(6):  # one whole step of 4 micro-batches, and a half
        next(iterator)
    assert loader.state_dict() == {"step": 1}


def test_loader_has_a_length_and_hands_errors_to_the_reader(shards):
    loader = TrainLoader(TokenStream(shards, vocab_size=100), BatchLayout(256, 16, 64))
    assert len(loader) > 10**6
    with pytest.raises(ShardError, match="fineweb_train_000000"):
        list(itertools.islice(loader, 10))


def test_a_process_ends_cleanly_with_a_loader_half_read(shards):
    program = (
        "import sys\n"
        "from pgl.data import BatchLayout, TokenStream, TrainLoader\n"
        "from pathlib import Path\n"
        "stream = TokenStream([Path(path) for path in sys.argv[1:]], 1200)\n"
        "iterator = iter(TrainLoader(stream, BatchLayout(256, 16, 64)))\n"
        "next(iterator)\n"
        "keep = [iterator]; keep.append(keep)  # nothing collects it before the end\n"
        "sys.modules['keep'] = keep\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, shards)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
