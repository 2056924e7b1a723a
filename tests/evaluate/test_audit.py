import dataclasses
import time

import numpy as np
import pytest
import torch

from pgl.evaluate import ByteAuditError, ByteTable, audit_bytes


def table_of(processor) -> ByteTable:
    return ByteTable.from_tokenizer(processor, processor.vocab_size())


def encode(processor, texts: list[str]) -> np.ndarray:
    return np.array([t for text in texts for t in [1, *processor.encode(text)]], dtype=np.uint16)


def test_counts(tokenizer, table, tokens, documents):
    report = audit_bytes(table, tokenizer, tokens)

    text = [tokenizer.decode(tokenizer.encode(document)) for document in documents]
    assert report == (len(documents), len(tokens), sum(len(t.encode()) for t in text))
    assert report.bytes == sum(len(document.encode()) for document in documents)


def test_every_cut_passes_even_within_a_character(tokenizer, table, tokens):
    assert tokenizer.piece_to_id("<0xF0>") in tokens  # a character of four bytes
    for cut in range(1, len(tokens)):
        head = audit_bytes(table, tokenizer, tokens[:cut])
        tail = audit_bytes(table, tokenizer, tokens[cut:])
        assert len(tokens) - 3 <= head.tokens + tail.tokens + 1 <= len(tokens) + 1
    for start in range(len(tokens) - 37):
        audit_bytes(table, tokenizer, tokens[start : start + 37])


def test_max_tokens_limits_the_audit(tokenizer, table, tokens):
    broken = tokens.copy()
    broken[-5] = 3  # unknown
    with pytest.raises(ByteAuditError):
        audit_bytes(table, tokenizer, broken, max_tokens=None)
    assert audit_bytes(table, tokenizer, broken, max_tokens=20).tokens == 20


@pytest.mark.parametrize("options", [{"add_dummy_prefix": True}, {"split_digits": False}])
def test_other_tokenizers_that_can_be_accounted_for(train_tokenizer, documents, options):
    processor = train_tokenizer(**options)

    report = audit_bytes(table_of(processor), processor, encode(processor, documents))

    assert report.bytes == sum(len(document.encode()) for document in documents)


def test_spaces_at_the_start_of_a_document_are_kept_out(train_tokenizer):
    processor = train_tokenizer(
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False
    )
    tokens = encode(processor, [" the dog", "the  dog "])

    # The challenge's rule does not count a space that follows BOS; the others are counted.
    assert audit_bytes(table_of(processor), processor, tokens).bytes == 7 + 9


def test_control_tokens_within_documents_separate(tokenizer, table):
    dog, fox = tokenizer.encode("lazy dog"), tokenizer.encode("the fox")
    tokens = np.array([1, *dog, 2, 1, *fox, 2, 0, 0, 1])

    assert audit_bytes(table, tokenizer, tokens) == (3, len(tokens), 15)


def broken(table: ByteTable, name: str, change) -> ByteTable:
    return dataclasses.replace(table, **{name: change(getattr(table, name).clone())})


def test_space_counted_twice_is_found(tokenizer, table, tokens):
    doubled = broken(table, "base_bytes_V", lambda base: base + table.has_leading_space_V)

    with pytest.raises(ByteAuditError, match=r"given as a processor: document 0 \(token 1"):
        audit_bytes(doubled, tokenizer, tokens)


def test_byte_pieces_counted_as_text_are_found(tokenizer, table, tokens):
    def three_bytes(base):
        base[4:260] = 3
        return base

    with pytest.raises(ByteAuditError, match=r"document 2 .* decodes to 85 bytes"):
        audit_bytes(broken(table, "base_bytes_V", three_bytes), tokenizer, tokens)


def test_space_after_bos_counted_is_found(train_tokenizer, documents):
    processor = train_tokenizer(add_dummy_prefix=True)
    table = broken(table_of(processor), "is_boundary_V", torch.zeros_like)

    with pytest.raises(ByteAuditError, match="document 0"):
        audit_bytes(table, processor, encode(processor, documents))


def test_control_ids_with_bytes_are_found(tokenizer, table, tokens):
    def with_bytes(base):
        base[1] = 3
        return base

    with pytest.raises(ByteAuditError, match="document 0"):
        audit_bytes(broken(table, "base_bytes_V", with_bytes), tokenizer, tokens)


def test_unknown_tokens_are_refused_with_the_reason(train_tokenizer, documents):
    processor = train_tokenizer(byte_fallback=False, vocab_size=100)
    tokens = encode(processor, [documents[0], "Ж is not in the vocabulary"])

    with pytest.raises(ByteAuditError, match=r"document 1 .*unknown tokens, .*byte_fallback"):
        audit_bytes(table_of(processor), processor, tokens)


def test_invalid_utf8_is_refused_with_the_reason(tokenizer, table):
    stray = tokenizer.piece_to_id("<0x80>")
    tokens = np.array([1, *tokenizer.encode("the"), stray, *tokenizer.encode(" dog")])

    with pytest.raises(ByteAuditError, match="not valid UTF-8"):
        audit_bytes(table, tokenizer, tokens)


def test_replacement_character_in_the_text_is_fine(tokenizer, table):
    spelt = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in "\ufffd".encode()]
    tokens = np.array([1, *tokenizer.encode("the"), *spelt, *tokenizer.encode("dog")])

    assert audit_bytes(table, tokenizer, tokens).bytes == len("the\ufffddog".encode())


def test_another_tokenizers_data_is_refused(tokenizer, table):
    with pytest.raises(ValueError, match="token id outside"):
        audit_bytes(table, tokenizer, np.array([1, 60000], dtype=np.uint16))


def test_another_tokenizers_table_is_refused(train_tokenizer, table, tokens):
    with pytest.raises(ValueError, match="build the table from the same tokenizer"):
        audit_bytes(table, train_tokenizer(vocab_size=320), tokens)


def test_bos_that_is_text_is_refused(tokenizer, table, tokens):
    with pytest.raises(ValueError, match="bos_id is 50"):
        audit_bytes(table, tokenizer, tokens, bos_id=50)


def test_nothing_to_audit_is_refused(tokenizer, table, tokens):
    with pytest.raises(ValueError, match="no text"):
        audit_bytes(table, tokenizer, tokens[:0])


@pytest.mark.slow
def test_speed(tokenizer, table, tokens):
    many = np.tile(tokens, 1_600_000 // len(tokens) + 1)
    start = time.process_time()
    audit_bytes(table, tokenizer, many)
    assert time.process_time() - start < 5
