from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgl.evaluate import ByteTable
from pgl.evaluate.byte_table import check_space_convention


def naive_bytes(table: ByteTable, previous: int, target: int) -> int:
    count = int(table.base_bytes_V[target])
    if table.has_leading_space_V[target] and not table.is_boundary_V[previous]:
        count += 1
    return count


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_bytes_of_a_document_are_those_of_its_decoded_text(tokenizer, table, text):
    ids = [1, *tokenizer.encode(text)]
    previous, target = torch.tensor(ids[:-1]).long(), torch.tensor(ids[1:]).long()

    counted = table.target_bytes(previous, target)

    assert int(counted.sum()) == len(tokenizer.decode(ids).encode())
    assert counted.tolist() == [naive_bytes(table, *pair) for pair in pairwise(ids)]


def test_every_pair_and_index_dtype(table):
    generator = torch.Generator().manual_seed(0)
    previous = torch.randint(table.vocab_size, (20, 50), generator=generator)
    target = torch.randint(table.vocab_size, (20, 50), generator=generator)

    counted = table.target_bytes(previous, target)

    assert counted.shape == (20, 50)
    pairs = torch.stack([previous, target], dim=-1).view(-1, 2).tolist()
    expected = [naive_bytes(table, *pair) for pair in pairs]
    assert counted.view(-1).tolist() == expected
    assert torch.equal(counted, table.target_bytes(previous.int(), target.int()))


def test_specials_have_no_bytes_and_bytes_have_one(tokenizer, table):
    assert table.is_boundary_V.nonzero().view(-1).tolist() == [0, 1, 2, 3]
    assert table.base_bytes_V[:4].tolist() == [0, 0, 0, 0]
    assert table.base_bytes_V[4:260].tolist() == [1] * 256
    assert not table.has_leading_space_V[:260].any()
    bare = tokenizer.piece_to_id("\u2581")
    assert table.base_bytes_V[bare] == 0
    assert table.has_leading_space_V[bare]


def test_file_and_processor_give_the_same_table(tokenizer, table, tmp_path):
    path = tmp_path / "tiny.model"
    path.write_bytes(tokenizer.serialized_model_proto())

    from_file = ByteTable.from_tokenizer(path, tokenizer.vocab_size())

    assert torch.equal(from_file.base_bytes_V, table.base_bytes_V)
    assert torch.equal(from_file.has_leading_space_V, table.has_leading_space_V)
    assert torch.equal(from_file.is_boundary_V, table.is_boundary_V)
    assert from_file.tokenizer_sha256 == table.tokenizer_sha256
    assert from_file.tokenizer_name == "tiny.model"


def test_wrong_vocabulary_size_is_refused(tokenizer):
    with pytest.raises(ValueError, match="vocab_size is 1024"):
        ByteTable.from_tokenizer(tokenizer, 1024)


def test_spaces_without_a_piece_are_refused(train_tokenizer):
    processor = train_tokenizer(["abc", "bcd", "cde"], vocab_size=265)
    space_as_bytes = [processor.id_to_piece(i) for i in processor.encode("a b")]
    assert "<0xE2>" in space_as_bytes

    with pytest.raises(ValueError, match=r"no piece U\+2581"):
        ByteTable.from_tokenizer(processor, processor.vocab_size())


def test_spaces_at_the_end_of_pieces_are_refused(train_tokenizer):
    processor = train_tokenizer(treat_whitespace_as_suffix=True)

    with pytest.raises(ValueError, match="after its first character"):
        ByteTable.from_tokenizer(processor, processor.vocab_size())


def test_pieces_across_words_are_refused(train_tokenizer):
    processor = train_tokenizer(split_by_whitespace=False)

    with pytest.raises(ValueError, match="after its first character"):
        ByteTable.from_tokenizer(processor, processor.vocab_size())


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        ByteTable.from_tokenizer(tmp_path / "absent.model", 1024)
    path = tmp_path / "noise.model"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        ByteTable.from_tokenizer(path, 1024)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        ByteTable.from_tokenizer(path, 1024)


def test_a_piece_counts_its_bytes_not_its_characters(train_tokenizer):
    processor = train_tokenizer(["naïve café, naïve café " * 3] * 20, vocab_size=285)
    counted = ByteTable.from_tokenizer(processor, processor.vocab_size()).base_bytes_V
    pieces = [processor.id_to_piece(token) for token in range(260, processor.vocab_size())]
    assert any(not piece.isascii() and "é" in piece for piece in pieces)
    expected = [len(piece.removeprefix("\u2581").encode()) for piece in pieces]
    assert counted[260:].tolist() == expected


@pytest.mark.parametrize("piece", ["a\u2581", "\u2581\u2581", "ab\u2581c"])
def test_a_space_anywhere_behind_the_first_character_is_refused(piece):
    class Pieces:
        texts = ("<unk>", "\u2581", piece)

        def vocab_size(self):
            return len(self.texts)

        def piece_to_id(self, text):
            return self.texts.index(text)

        def id_to_piece(self, token):
            return self.texts[token]

        def is_unknown(self, token):
            return token == 0

        def is_control(self, token):
            return False

        is_unused = is_control

    with pytest.raises(ValueError, match=r"U\+2581 after its first character"):
        check_space_convention(Pieces(), "made-up.model")
