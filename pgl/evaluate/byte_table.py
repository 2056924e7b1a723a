"""How many bytes of text each target token stands for, by the challenge's counting rule.

Shapes: V vocabulary.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space inside its pieces."""


@dataclass(frozen=True, eq=False)
class ByteTable:
    """Byte counts of a tokenizer's pieces, as three tables indexed by token id.

    A target stands for the UTF-8 bytes of its piece without the leading U+2581, and for one more
    byte, the space, if its piece starts with U+2581 and the token before it is text. Control,
    unknown and unused ids stand for no bytes; a space right after one of them is not counted.
    Source: the scoring code of openai/parameter-golf.
    """

    base_bytes_V: Tensor
    """int16: UTF-8 bytes of the piece without its leading U+2581."""

    has_leading_space_V: Tensor
    """bool: the piece starts with U+2581."""

    is_boundary_V: Tensor
    """bool: the id is a control, unknown or unused one."""

    tokenizer_name: str
    """What messages call the tokenizer: its file name."""

    tokenizer_sha256: str
    """SHA-256 of the tokenizer model, hexadecimal."""

    @classmethod
    def from_tokenizer(
        cls, tokenizer: str | os.PathLike[str] | SentencePieceProcessor, vocab_size: int
    ) -> "ByteTable":
        """Read the table off a SentencePiece model.

        Args:
            tokenizer: Path of a ``.model`` file, or a loaded processor.
            vocab_size: Vocabulary size of the model that is scored.

        Raises:
            ValueError: The file cannot be read, its vocabulary has another size, or it marks spaces
                in a way that the counting rule miscounts (see :func:`check_space_convention`).
        """
        processor, name, sha256 = _open(tokenizer)
        if processor.vocab_size() != vocab_size:
            raise ValueError(
                f"tokenizer {name} has {processor.vocab_size()} pieces but vocab_size is "
                f"{vocab_size}; use the tokenizer that the data was made with and set vocab_size "
                "to its size"
            )
        check_space_convention(processor, name)
        base_bytes_V = np.zeros(vocab_size, dtype=np.int16)
        has_leading_space_V = np.zeros(vocab_size, dtype=bool)
        is_boundary_V = np.ones(vocab_size, dtype=bool)
        for token in range(vocab_size):
            if not _is_text(processor, token):
                continue
            is_boundary_V[token] = False
            piece = processor.id_to_piece(token)
            if processor.is_byte(token):
                base_bytes_V[token] = 1
            else:
                has_leading_space_V[token] = piece.startswith(SPACE_MARK)
                base_bytes_V[token] = len(piece.removeprefix(SPACE_MARK).encode())
        return cls(
            base_bytes_V=torch.from_numpy(base_bytes_V),
            has_leading_space_V=torch.from_numpy(has_leading_space_V),
            is_boundary_V=torch.from_numpy(is_boundary_V),
            tokenizer_name=name,
            tokenizer_sha256=sha256,
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.base_bytes_V.numel()

    def target_bytes(self, previous_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Bytes of each target; see :func:`target_bytes`."""
        return target_bytes(
            self.base_bytes_V,
            self.has_leading_space_V,
            self.is_boundary_V,
            previous_ids,
            target_ids,
        )


def target_bytes(
    base_bytes_V: Tensor,
    has_leading_space_V: Tensor,
    is_boundary_V: Tensor,
    previous_ids: Tensor,
    target_ids: Tensor,
) -> Tensor:
    """Return the bytes that each target stands for, int16, in the shape of ``target_ids``.

    Args:
        base_bytes_V: See :class:`ByteTable`; the three tables lie on the device of the ids.
        has_leading_space_V: See :class:`ByteTable`.
        is_boundary_V: See :class:`ByteTable`.
        previous_ids: The token before each target, which is the model's input at its position.
        target_ids: The targets, integers of any dtype that indexes.
    """
    space = has_leading_space_V[target_ids] & ~is_boundary_V[previous_ids]
    return base_bytes_V[target_ids] + space


def check_space_convention(processor: SentencePieceProcessor, name: str) -> None:
    """Refuse a tokenizer whose spaces the counting rule would miscount.

    Without the bare piece U+2581 a space may be spelt as its three bytes E2 96 81 and be counted
    three times; a U+2581 that is not the first character of its piece is one byte of text but
    three bytes of piece. Both have shipped wrong scores (openai/parameter-golf #897, #1719).

    Raises:
        ValueError: Naming the tokenizer and the piece.
    """
    bare = processor.piece_to_id(SPACE_MARK)
    if processor.id_to_piece(bare) != SPACE_MARK or not _is_text(processor, bare):
        raise ValueError(
            f"tokenizer {name} has no piece U+2581 for a space, so its spaces may be counted as "
            "three bytes; train it with SentencePiece's escape_whitespaces on"
        )
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token)
        if SPACE_MARK in piece[1:] and _is_text(processor, token):
            raise ValueError(
                f"tokenizer {name} has a piece with U+2581 after its first character ({piece!r}, "
                "id "
                f"{token}), whose bytes the challenge's rule miscounts; train it with "
                "split_by_whitespace on and treat_whitespace_as_suffix off"
            )


def _is_text(processor: SentencePieceProcessor, token: int) -> bool:
    return not (
        processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token)
    )


def _open(
    tokenizer: str | os.PathLike[str] | SentencePieceProcessor,
) -> tuple[SentencePieceProcessor, str, str]:
    if isinstance(tokenizer, SentencePieceProcessor):
        model = tokenizer.serialized_model_proto()
        return tokenizer, "given as a processor", hashlib.sha256(model).hexdigest()
    path = Path(tokenizer)
    if not path.is_file():
        raise ValueError(f"tokenizer {path} is not there; give the path of a SentencePiece .model")
    model = path.read_bytes()
    try:
        # An empty model would be taken for none and load.
        processor = SentencePieceProcessor(model_proto=model or b"empty")
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    return processor, path.name, hashlib.sha256(model).hexdigest()
