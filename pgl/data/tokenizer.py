"""SentencePiece as the challenge uses it: train, load, encode.

Specials: pad 0, bos 1, eos 2, unk 3; bytes are ids 4..259. A document is BOS followed by its
pieces, without EOS. The nmt_nfkc normalisation turns newlines into spaces and joins runs of them.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from pgl.io import atomic_write

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MAX_VOCAB_SIZE = 1 << 16  # a token is stored as uint16

_TRAINING_OPTIONS = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": PAD_ID,
    "bos_id": BOS_ID,
    "eos_id": EOS_ID,
    "unk_id": UNK_ID,
    "hard_vocab_limit": False,
    # SentencePiece would otherwise leave out every document above 4,192 bytes.
    "max_sentence_length": 1 << 30,
    "minloglevel": 2,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> bytes:
    """Train a BPE tokenizer with the challenge's options.

    The same texts in the same order give the same bytes.

    Args:
        texts: Documents; NUL becomes a space, outer whitespace goes, empty ones are skipped.
        vocab_size: Number of pieces, with the 4 specials and the 256 bytes among them.

    Returns:
        The serialised model, as stored in a ``.model`` file.

    Raises:
        ValueError: If ``vocab_size`` does not fit uint16, or the texts are too small for it.
    """
    if not 4 + 256 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"data.source.init_args.vocab_size is {vocab_size}; give a number above 260 (specials "
            f"and bytes) and at most {MAX_VOCAB_SIZE}."
        )
    model = io.BytesIO()
    counted = _Counted(_cleaned(texts))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            vocab_size=vocab_size,
            **_TRAINING_OPTIONS,
        )
    except RuntimeError as error:
        if counted.failure is not None:
            raise counted.failure from None
        if counted.documents == 0:
            raise ValueError("the tokenizer has no text to train on; give more text.") from error
        if "smaller than required_chars" in str(error):
            raise ValueError(
                f"data.source.init_args.vocab_size={vocab_size} does not hold the characters of "
                "this text; raise it."
            ) from error
        raise
    trained_size = _processor(model.getvalue()).vocab_size()
    if trained_size != vocab_size:
        raise ValueError(
            f"{counted.characters} characters of text give only {trained_size} of "
            f"vocab_size={vocab_size} pieces; give more text or lower "
            "data.source.init_args.vocab_size."
        )
    return model.getvalue()


def save_tokenizer(path: str | os.PathLike[str], model: bytes) -> None:
    """Write a serialised model to a file, which appears only when complete."""
    with atomic_write(path) as file:
        file.write(model)


def load_tokenizer(path: str | os.PathLike[str]) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model that has a BOS piece.

    Raises:
        ValueError: If the file is missing, is no SentencePiece model, or has no BOS.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"tokenizer {path} is not a file; check the path or prepare the data first."
        )
    try:
        # SentencePiece takes nothing for a model without pieces, and grumbles only later.
        tokenizer = _processor(path.read_bytes() or b"empty")
    except RuntimeError as error:
        raise ValueError(
            f"tokenizer {path} is not a SentencePiece model; give the .model file of the data."
        ) from error
    if tokenizer.bos_id() < 0 or not 0 < tokenizer.vocab_size() <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer {path} has BOS id {tokenizer.bos_id()} and {tokenizer.vocab_size()} "
            f"pieces; give one with a BOS piece and at most {MAX_VOCAB_SIZE} pieces."
        )
    return tokenizer


def encode_documents(
    tokenizer: sentencepiece.SentencePieceProcessor, texts: Sequence[str], threads: int
) -> list[np.ndarray]:
    """Encode documents on SentencePiece's own threads.

    Returns:
        For each, BOS and the ids of its text, no EOS; uint16 of shape (tokens,).
    """
    bos = tokenizer.bos_id()
    ids_of_texts = tokenizer.encode(list(texts), num_threads=threads)
    return [np.array([bos, *ids], dtype=np.uint16) for ids in ids_of_texts]


def decode_documents(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: Sequence[np.ndarray], threads: int
) -> list[str]:
    """Return the (normalised) texts of documents encoded by :func:`encode_documents`."""
    return tokenizer.decode([ids[1:].tolist() for ids in documents], num_threads=threads)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _cleaned(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        cleaned = text.replace("\0", " ").strip()
        if cleaned:
            yield cleaned


class _Counted:
    """Counts what SentencePiece takes, for error messages, and keeps what the texts raise.

    SentencePiece turns an exception of the iterator into a RuntimeError of its own.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.documents = 0
        self.characters = 0
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                self.documents += 1
                self.characters += len(text)
                yield text
        except Exception as failure:
            self.failure = failure
            raise
