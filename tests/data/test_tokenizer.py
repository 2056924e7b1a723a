"""The tokenizer: the challenge's options, repeatable, and silent."""

import numpy as np
import pytest
import sentencepiece

from pgl.data.tokenizer import (
    decode_documents,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "  In 1859 the book cost 12 shillings; by 1900 it cost 3.\nA second line\tfollows.  ",
    "naïve café — “quoted” text, and so on and so forth, time after time after time",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    save_tokenizer(path, model)
    return load_tokenizer(path)


def test_specials_and_bytes_are_where_the_challenge_has_them(tokenizer):
    assert tokenizer.vocab_size() == 320
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3)
    assert tokenizer.id_to_piece(4) == "<0x00>"
    assert tokenizer.id_to_piece(259) == "<0xFF>"
    assert all(tokenizer.is_byte(index) for index in range(4, 260))


def test_document_is_bos_and_pieces(tokenizer):
    tokens, empty = encode_documents(tokenizer, [TEXTS[0], ""], threads=1)
    assert tokens.dtype == np.uint16
    assert tokens[0] == 1
    assert 2 not in tokens
    assert tokens[1:].tolist() == tokenizer.encode(TEXTS[0])
    assert empty.tolist() == [1]


def test_digits_are_split_and_no_space_is_put_in_front(tokenizer):
    pieces = tokenizer.encode("1859", out_type=str)
    assert pieces == ["1", "8", "5", "9"]
    assert tokenizer.encode("time", out_type=str)[0][0] == "t"


@pytest.mark.parametrize("text", ["plain text", "日本語 🙂", "tab\tnew\nline  two spaces", "é" * 3])
def test_every_text_comes_back_normalised(tokenizer, text):
    [tokens] = encode_documents(tokenizer, [text], threads=1)
    assert tokenizer.unk_id() not in tokens
    assert decode_documents(tokenizer, [tokens], threads=1) == [" ".join(text.split())]


def test_threads_do_not_matter(tokenizer):
    one = encode_documents(tokenizer, TEXTS, threads=1)
    each = [encode_documents(tokenizer, [text], threads=1)[0] for text in TEXTS]
    for other in (encode_documents(tokenizer, TEXTS, threads=3), each):
        assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in other]


def test_same_texts_give_the_same_bytes(model):
    assert train_tokenizer(iter(TEXTS), vocab_size=320) == model
    assert train_tokenizer(TEXTS[:2], vocab_size=320) != model


def test_nul_outer_whitespace_and_empty_texts_change_nothing(model):
    spoiled = ["", f"\n{TEXTS[0]}  ", "  \n", TEXTS[1].replace(" book", "\0book"), TEXTS[2], "\0"]
    assert train_tokenizer(spoiled, vocab_size=320) == model


def test_long_documents_count_too():
    long = " ".join(f"word{index % 7} appears" for index in range(1000))
    assert len(long) > 4192
    pieces = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer([long], 290))
    assert "▁appears" in [pieces.id_to_piece(index) for index in range(290)]


def test_silent(capfd):
    train_tokenizer(TEXTS, vocab_size=320)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("texts", "vocab_size", "wrong"),
    [
        (["hello world"], 1024, "11 characters of text give only .* of vocab_size=1024"),
        ([], 300, "no text to train on"),
        ([" ", "\0"], 300, "no text to train on"),
        (TEXTS, 265, "vocab_size=265 does not hold the characters"),
        (TEXTS, 260, "above 260"),
        (TEXTS, 65537, "at most 65536"),
    ],
)
def test_vocabulary_and_text_must_fit(texts, vocab_size, wrong):
    with pytest.raises(ValueError, match=wrong):
        train_tokenizer(texts, vocab_size)


def test_error_while_reading_the_texts_is_passed_on():
    def texts():
        yield TEXTS[0]
        raise ValueError("line 7 is bad")

    with pytest.raises(ValueError, match=r"^line 7 is bad$"):
        train_tokenizer(texts(), 320)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_load_refuses_what_is_no_model(tmp_path, content, capfd):
    path = tmp_path / "broken.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer .*broken\.model is not a"):
        load_tokenizer(path)
    assert capfd.readouterr().err == ""


def test_load_refuses_a_model_without_bos(tmp_path):
    with open(tmp_path / "nobos.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            model_type="bpe",
            vocab_size=60,
            bos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match=r"nobos\.model has BOS id -1"):
        load_tokenizer(tmp_path / "nobos.model")
