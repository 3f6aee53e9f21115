"""Text survives the way to ids and back; whatever is no tokenizer is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moescale.config import ConfigError, DataConfig
from moescale.data.tokenizer import (
    ByteTokenizer,
    check_vocabulary,
    load_tokenizer,
    pieces,
    tokenizer_of_checkpoint,
    with_boundaries,
)

TEXT = "def hello(name):\n    return f'hello {name} äöü 🙂'\n"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([tokenizer.begin, *ids, tokenizer.end]) == text


def test_bytes_that_are_not_text() -> None:
    assert load_tokenizer("bytes").decode([0xFF, 65, 256]) == "\ufffdA"


def test_hugging_face_round_trip(train_tokenizer: Callable[..., Path]) -> None:
    path = str(train_tokenizer("tokenizer.json", "<s>", "<|endoftext|>"))
    tokenizer = load_tokenizer(path)
    texts = [TEXT, "", "mentions <|endoftext|> and <s>"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(encoded[0]) > 8
    assert (tokenizer.begin, tokenizer.end) == (0, 1), "what it puts before a text itself; the end of a text by name"
    assert all(1 not in ids and 0 not in ids for ids in encoded)
    assert tokenizer.decode([tokenizer.begin, *encoded[0], tokenizer.end]) == TEXT
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
                                          r"write model.vocab_size=257 or more \(a multiple of 8, e.g. 264\)"):
        check_vocabulary(ByteTokenizer(), 256)


def test_special_tokens_that_no_text_can_have_need_no_row(write_metaspace: Callable[..., Path]) -> None:
    plain, special, letters = (load_tokenizer(str(write_metaspace(name, extra))) for name, extra in (
        ("plain", None), ("special", {"<pad>": True, "<mask>": True}), ("letters", {"<pad>": False})))
    rows = plain.vocab_size
    assert special.vocab_size == rows
    assert special.num_ids == rows + 2
    check_vocabulary(special, rows)
    assert special.encode_batch(["a <pad> b"])[0].max() < rows
    with pytest.raises(ConfigError, match=f"model.vocab_size={rows + 1}"):
        check_vocabulary(letters, rows)


BOS, EOS = {"bos_token": "<s>"}, {"eos_token": {"content": "</s>"}}


@pytest.mark.parametrize(("settings", "keys", "expected", "stops"), [
    ({}, {}, (1, 2), {1, 2}),  # its own template, and a known name
    ({"tokenizer_config": {**BOS, **EOS}}, {}, (1, 2), {1, 2}),
    ({"config": {"bos_token_id": 1, "eos_token_id": 7}}, {}, (1, 7), {1, 7}),
    ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9, 10**9, "x"]}}, {}, (1, 8), {1, 8, 9}),
    ({"tokenizer_config": EOS, "generation_config": {"eos_token_id": 9}}, {}, (1, 2), {1, 2, 9}),
    ({"tokenizer_config": EOS}, {"begin": "</s>", "end": "<s>"}, (2, 1), {1, 2}),
    ({}, {"begin": "</s>"}, (2, 2), {2}),
])
def test_beginning_and_end_by_the_models_own_files(
    write_metaspace: Callable[..., Path], settings: dict, keys: dict, expected: tuple, stops: set
) -> None:
    tokenizer = load_tokenizer(str(path := write_metaspace("model", **settings)), **keys)
    assert (tokenizer.begin, tokenizer.end) == expected
    assert tokenizer.stops == stops
    copy = path.parent / "copy"  # as a checkpoint holds it
    copy.mkdir()
    for name, text in tokenizer.files.items():
        (copy / name).write_bytes(text)
    moved = load_tokenizer(str(copy / "tokenizer.json"), **keys)
    assert (moved.begin, moved.end, moved.stops) == (tokenizer.begin, tokenizer.end, tokenizer.stops)
    assert moved.fingerprint == tokenizer.fingerprint
    ids = np.array([40, 41])
    assert with_boundaries(tokenizer, ids, np.dtype(np.uint16)).tolist() == (
        [expected[0], 40, 41, expected[1]] if expected[0] != expected[1] else [expected[0], 40, 41])


def test_odd_settings_are_one_line(write_metaspace: Callable[..., Path]) -> None:
    path = write_metaspace("model", tokenizer_config=[1])
    with pytest.raises(ConfigError, match=r"tokenizer_config.json"):
        load_tokenizer(str(path))
    with pytest.raises(ConfigError, match=r"^data.end_token=</doc>"):
        load_tokenizer(str(write_metaspace("other")), end="</doc>")


def test_a_run_of_the_time_before_keeps_its_boundary(write_metaspace: Callable[..., Path]) -> None:
    path = write_metaspace("model")
    old, new = DataConfig(tokenizer=str(path)), DataConfig(tokenizer=str(path), begin_token=None)
    found = [tokenizer_of_checkpoint(data, path.parent, step) for data, step in ((old, 5), (old, 0), (new, 5))]
    assert [(each.begin, each.end) for each in found] == [(2, 2), (1, 2), (1, 2)]
    assert found[0].fingerprint != found[1].fingerprint


def by_probability() -> tokenizers.models.Model:
    scores = [(token, 0.0) for token in ("<unk>", "<s>", "</s>")] + [(letter, -3.0) for letter in "abs <>/"]
    return tokenizers.models.Unigram(scores, unk_id=0, byte_fallback=False)


@pytest.mark.parametrize("make", [
    by_probability,
    lambda: tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"),
], ids=["by probability", "by words"])
def test_special_tokens_in_a_text_are_letters(tmp_path: Path, make: Callable[[], tokenizers.models.Model]) -> None:
    backend = tokenizers.Tokenizer(make())
    if isinstance(backend.model, tokenizers.models.WordLevel):
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert not {1, 2} & set(tokenizer.encode_batch(["a </s> <s>"])[0].tolist())
    assert 2 in tokenizer.encode_special("a </s>").tolist()
    assert tokenizer.special_tokens("a </s>") == ["</s>"]


TEXTS = ["hello a hello", "  two  spaces ", "a\n hello", "é🙂 hello 日本", "hello�a", ""]


def test_pieces_join_to_the_text(write_metaspace: Callable[..., Path], train_tokenizer: Callable[..., Path]) -> None:
    metaspace, pairs = load_tokenizer(str(write_metaspace("m"))), load_tokenizer(str(train_tokenizer("t.json", "</s>")))
    generator = np.random.default_rng(0)
    for tokenizer in (metaspace, pairs, ByteTokenizer()):
        for text in TEXTS:
            ids = tokenizer.encode_batch([text])[0].tolist()
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text
        noise = generator.integers(3, 256, (20, 200))  # mostly bytes that are no text
        for ids in noise.tolist():
            if tokenizer is metaspace:  # a run of bytes that is not text as a whole is marks: known at its end
                ids = [index for pair in ids for index in (pair, 260 + pair % 8)]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert pieces(metaspace, metaspace.encode_batch(["hello é a"])[0].tolist()) == ["hello", " ", "", "", "é a"]


def test_a_stream_is_what_the_library_streams(write_metaspace: Callable[..., Path]) -> None:
    path = write_metaspace("model")
    tokenizer, backend = load_tokenizer(str(path)), tokenizers.Tokenizer.from_file(str(path))
    prompt, ids = [backend.encode(text, add_special_tokens=False).ids for text in ("hello", "a 日 hello a")]
    ours, theirs = tokenizer.stream(before=[1, *prompt]), tokenizers.decoders.DecodeStream(ids=prompt)
    whole = "".join(theirs.step(backend, index) or "" for index in ids)
    assert "".join(ours.push(index) for index in ids) + ours.rest() == whole == " a 日 hello a"
    long = tokenizer.encode_batch(["hello a é " * 100])[0].tolist()
    assert "".join(pieces(tokenizer, long)) == "hello a é " * 100, "however long it grows"
