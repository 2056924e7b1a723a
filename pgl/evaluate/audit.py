"""Does the byte table count the bytes that the tokens really decode to?

A wrong byte count is the most frequent way to a wrong score (openai/parameter-golf #897, #1289,
#1719, #1804), and nothing else in a run notices it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from pgl.evaluate.byte_table import ByteTable

RUNS_AT_ONCE = 4096


class ByteAuditError(ValueError):
    """The byte table and the decoded text disagree: bits per byte would be wrong."""


class AuditReport(NamedTuple):
    """What was compared and found equal."""

    documents: int
    tokens: int
    bytes: int


class _Run(NamedTuple):
    """Tokens between two control ids."""

    document: int
    start: int
    ids: list[int]
    table_bytes: int


def audit_bytes(
    table: ByteTable,
    processor: SentencePieceProcessor,
    tokens: np.ndarray,
    bos_id: int = 1,
    max_tokens: int | None = 2_000_000,
) -> AuditReport:
    """Compare the table's bytes with the UTF-8 length of the text, document by document.

    The text is decoded by SentencePiece itself, so the check shares no arithmetic with the table.
    It follows the challenge's rule in one point: a space right after a control id is not counted.
    ``tokens`` may begin or end within a document, and within a character spelt in bytes: the bytes
    of such a cut character are left out on both sides.
    1.6 M tokens take 0.6 s on one core.

    Args:
        table: The table that scores will be computed with.
        processor: The tokenizer of ``tokens``.
        tokens: Token ids of the validation data, any integer dtype.
        bos_id: The id that starts each document.
        max_tokens: Audit no more than this many tokens from the start; None audits all.

    Returns:
        Documents (or parts of one), tokens and bytes that were compared.

    Raises:
        ByteAuditError: Naming the tokenizer and the first document that differs.
        ValueError: The arguments do not belong together; see the message.
    """
    tokens = np.asarray(tokens[:max_tokens])
    _check_arguments(table, processor, tokens, bos_id)
    tokens = _whole_characters(processor, tokens)
    if len(tokens) == 0:
        raise ValueError("there is no text to audit; give the validation data's tokens")
    anchor = _anchor(processor)
    anchor_bytes = len(processor.decode([anchor]).encode())
    total_bytes = 0
    batch: list[_Run] = []
    for run in _runs(table, processor, tokens, bos_id):
        batch.append(run)
        if len(batch) == RUNS_AT_ONCE:
            total_bytes += _compare(table, processor, batch, anchor, anchor_bytes)
            batch = []
    total_bytes += _compare(table, processor, batch, anchor, anchor_bytes)
    num_documents = int((tokens == bos_id).sum()) + int(tokens[0] != bos_id)
    return AuditReport(num_documents, len(tokens), total_bytes)


def _runs(
    table: ByteTable, processor: SentencePieceProcessor, tokens: np.ndarray, bos_id: int
) -> Iterator[_Run]:
    is_control_V = np.array([processor.is_control(i) for i in range(table.vocab_size)])
    # int64, since PyTorch cannot index with uint16.
    ids_N = torch.from_numpy(tokens.astype(np.int64))
    # What precedes the first token is unknown; like a control id, it takes the space away.
    previous_N = torch.cat([torch.tensor([bos_id]), ids_N[:-1]])
    # Summed in front of each token, so that a run's bytes are a difference. The bytes of the
    # control id itself belong to the run that it opens; they must be 0.
    bytes_before_N1 = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum(table.target_bytes(previous_N, ids_N).numpy(), out=bytes_before_N1[1:])
    is_open_N = is_control_V[tokens]
    is_open_N[0] = True
    opens = np.flatnonzero(is_open_N)
    stops = np.append(opens[1:], len(tokens))
    documents = np.cumsum(tokens[opens] == bos_id) - int(tokens[0] == bos_id)
    table_bytes = bytes_before_N1[stops] - bytes_before_N1[opens]
    firsts = opens + is_control_V[tokens[opens]]
    for document, first, stop, count in zip(documents, firsts, stops, table_bytes, strict=True):
        yield _Run(int(document), int(first), tokens[first:stop].tolist(), int(count))


def _compare(
    table: ByteTable,
    processor: SentencePieceProcessor,
    runs: list[_Run],
    anchor: int,
    anchor_bytes: int,
) -> int:
    # Decoders drop a space at the start of a text or keep it, as the tokenizer's normaliser says.
    # Behind an anchor they always keep it, and the rule's exception is applied to what is there.
    texts = processor.decode([[anchor, *run.ids] for run in runs]) if runs else []
    total_bytes = 0
    for run, text in zip(runs, texts, strict=True):
        encoded = text.encode()[anchor_bytes:]
        decoded_bytes = len(encoded) - encoded.startswith(b" ")
        if decoded_bytes != run.table_bytes:
            raise ByteAuditError(
                f"tokenizer {table.tokenizer_name}: document {run.document} (token {run.start} "
                f"on, {len(run.ids)} tokens, {encoded[:40].decode(errors='ignore')!r}...) decodes "
                f"to {decoded_bytes} bytes of text but the byte table counts {run.table_bytes}"
                f"{_reason(processor, run.ids, text)}; bits per byte would be wrong"
            )
        total_bytes += decoded_bytes
    return total_bytes


def _reason(processor: SentencePieceProcessor, ids: list[int], text: str) -> str:
    if any(processor.is_unknown(token) for token in set(ids)):
        return (
            " (it has unknown tokens, whose text is lost: train the tokenizer with byte_fallback)"
        )
    if "\ufffd" in text:
        return " (its byte tokens are not valid UTF-8)"
    return ""


def _anchor(processor: SentencePieceProcessor) -> int:
    for token in range(processor.vocab_size()):
        special = (
            processor.is_control(token)
            or processor.is_unknown(token)
            or processor.is_unused(token)
            or processor.is_byte(token)
        )
        if not special and len(processor.decode([token])) > 0:
            return token
    raise ValueError("the tokenizer has no piece of plain text, so no text can be decoded with it")


def _whole_characters(processor: SentencePieceProcessor, tokens: np.ndarray) -> np.ndarray:
    """Leave out what the two cuts left of a character that is spelt in byte tokens."""
    head = [_byte_value(processor, token) for token in tokens[:3].tolist()]
    start = 0
    while start < len(head) and 0x80 <= head[start] < 0xC0:
        start += 1
    tail = [_byte_value(processor, token) for token in tokens[start:][-3:].tolist()]
    for count in range(1, len(tail) + 1):
        value = tail[-count]
        if not 0x80 <= value < 0xC0:
            length = 4 if value >= 0xF0 else 3 if value >= 0xE0 else 2 if value >= 0xC0 else 1
            return tokens[start : len(tokens) - count if length > count else None]
    return tokens[start:]


def _byte_value(processor: SentencePieceProcessor, token: int) -> int:
    """The byte of a piece ``<0xNN>``, -1 for other ids."""
    return int(processor.id_to_piece(token)[3:5], 16) if processor.is_byte(token) else -1


def _check_arguments(
    table: ByteTable, processor: SentencePieceProcessor, tokens: np.ndarray, bos_id: int
) -> None:
    if processor.vocab_size() != table.vocab_size:
        raise ValueError(
            f"the byte table of {table.tokenizer_name} has {table.vocab_size} ids but the "
            f"tokenizer has {processor.vocab_size()}; build the table from the same tokenizer"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < table.vocab_size:
        raise ValueError(
            f"the data has a token id outside 0..{table.vocab_size - 1}, so it was not made with "
            f"tokenizer {table.tokenizer_name}"
        )
    if not (0 <= bos_id < table.vocab_size and processor.is_control(bos_id)):
        raise ValueError(
            f"bos_id is {bos_id} but that is not a control id of tokenizer {table.tokenizer_name}; "
            "give the id that starts each document"
        )
