"""A small tokenizer, a text in documents, and a tiny GPT with all that mixes positions."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import sentencepiece
import torch

from pgl.evaluate import ByteTable
from pgl.model import GPT, GPTConfig

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 42 people said: 'it is not a bug'; nobody laughed.",
    "Ünïcödé text, naïve café, 東京 and 🙂🙃 emoji, and more text behind them.",
    "A short one.",
    "Words words words, and the same words again and again and again.",
]
# The other characters are left to the byte pieces.
TRAINING = [text for text in DOCUMENTS if text.isascii()]


def train(texts: list[str] = TRAINING, **options) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer with the challenge's options, but for ``options``."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "character_coverage": 0.999,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "nmt_nfkc",
        "add_dummy_prefix": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    } | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3), model_writer=model, **settings
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., sentencepiece.SentencePieceProcessor]:
    return train


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return DOCUMENTS


@pytest.fixture(scope="session")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return train()


@pytest.fixture(scope="session")
def table(tokenizer) -> ByteTable:
    return ByteTable.from_tokenizer(tokenizer, tokenizer.vocab_size())


@pytest.fixture(scope="session")
def tokens(tokenizer) -> np.ndarray:
    """The documents as a shard holds them: BOS and pieces, end to end."""
    stream = [token for text in DOCUMENTS for token in [1, *tokenizer.encode(text)]]
    return np.array(stream, dtype=np.uint16)


@pytest.fixture
def make_gpt() -> Callable[..., GPT]:
    """A GPT of 4 layers and width 16 over 32 tokens, with weights far from their start."""

    def make(seed: int = 0, **changes) -> GPT:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 32,
            "num_layers": 4,
            "model_dim": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            "mlp_hidden": 32,
            "smear_gate": True,
            "bigram_buckets": 29,
            "bigram_dim": 8,
            "value_embedding_layers": [3],
            "value_embedding_dim": 8,
            "xsa_last_layers": 2,
            "cache_layer": 1,
            "backout": True,
        }
        gpt = GPT(GPTConfig(**settings | changes))
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return gpt

    return make


@pytest.fixture
def small_table() -> ByteTable:
    """A table for 32 ids without a tokenizer: id 1 is BOS, odd ids begin with a space."""
    id_V = torch.arange(32)
    return ByteTable(
        torch.where(id_V < 4, 0, id_V % 5).to(torch.int16),
        (id_V % 2 == 1) & (id_V >= 4),
        id_V < 4,
        "small",
        "",
    )


@pytest.fixture
def stream() -> Callable[[int], np.ndarray]:
    """Random tokens of 32 ids with a BOS now and then."""

    def make(count: int, seed: int = 0) -> np.ndarray:
        generator = np.random.default_rng(seed)
        tokens = generator.integers(4, 32, count, dtype=np.uint16)
        tokens[generator.random(count) < 0.05] = 1
        return tokens

    return make
