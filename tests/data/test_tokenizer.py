"""Text survives the way to ids and back; whatever is no tokenizer is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moescale.config import ConfigError
from moescale.data.tokenizer import ByteTokenizer, check_vocabulary, load_tokenizer

TEXT = "def hello(name):\n    return f'hello {name} äöü 🙂'\n"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([tokenizer.boundary, *ids, tokenizer.boundary]) == text


def test_bytes_that_are_not_text() -> None:
    assert load_tokenizer("bytes").decode([0xFF, 65, 256]) == "\ufffdA"


def test_hugging_face_round_trip(train_tokenizer: Callable[..., Path]) -> None:
    path = str(train_tokenizer("tokenizer.json", "<s>", "<|endoftext|>"))
    tokenizer = load_tokenizer(path)
    texts = [TEXT, "", "mentions <|endoftext|> and <s>"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(encoded[0]) > 8
    assert tokenizer.boundary == 1  # the end of a text comes before the start of a sentence
    assert all(tokenizer.boundary not in ids and 0 not in ids for ids in encoded)
    assert tokenizer.decode([tokenizer.boundary, *encoded[0]]) == TEXT
    assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(path).get_vocab_size()
    other = load_tokenizer(str(train_tokenizer("other.json", "</s>")))
    assert other.fingerprint != tokenizer.fingerprint


def test_refuses_in_one_line(tmp_path: Path, train_tokenizer: Callable[..., Path]) -> None:
    (tmp_path / "words.json").write_text('{"hello":\n "world"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0")
    train_tokenizer("bare.json")
    for name, message in {"none.json": "no such file", "words.json": "is not a Hugging Face tokenizer.json",
                          "binary.json": "is not a Hugging Face tokenizer.json", ".": "is a directory: write ",
                          "bare.json": "no token that can stand between documents"}.items():
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(f"{tmp_path}/{name}")
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"data.tokenizer={tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_vocabulary_must_hold_the_tokenizer() -> None:
    check_vocabulary(ByteTokenizer(), 257)
    with pytest.raises(ConfigError, match=r"^data.tokenizer=bytes has 257 ids but model.vocab_size=256: "
                                          r"write model.vocab_size=257 or more \(a multiple of 8, e.g. 264\)$"):
        check_vocabulary(ByteTokenizer(), 256)
