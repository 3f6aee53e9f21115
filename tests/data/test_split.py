"""Which documents are held out depends on their texts alone, and both streams are those documents in order."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from moescale.config import ConfigError, DataConfig
from moescale.data.split import held_out_documents
from moescale.data.token_file import TokenCorpus, prepare_tokens


def texts_of(corpus: TokenCorpus) -> tuple[list[str], list[str]]:
    """Read both splits back as lists of texts, which are bytes after the token 256."""
    lists = []
    for split in (corpus.train, corpus.held_out):
        tokens = split.window(0, split.num_tokens)[0] if split.num_tokens else np.array([256])
        documents = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
        lists.append([bytes(document[1:].tolist()).decode() for document in documents])
        assert split.num_documents == len(lists[-1])
    return lists[0], lists[1]


class Texts:
    """A folder of texts, a file each, as a corpus."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def add(self, *texts: str) -> None:
        for text in texts:
            self.number += 1
            (self.folder / f"{self.number:04}.txt").write_text(text)

    def prepare(self, held_out: float = 0.1, **keys: object) -> TokenCorpus:
        return prepare_tokens(DataConfig(files=(f"{self.folder}/[0-9]*.txt",), cache_dir=str(self.folder / "cache"),
                                         held_out=held_out, **keys))


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    return Texts(tmp_path)


def test_more_files_move_no_document_across(texts: Texts) -> None:
    texts.add(*(f"text {number}" for number in range(200)))
    train, held_out = map(set, texts_of(texts.prepare()))
    assert 8 < len(held_out) < 35
    assert len(train) + len(held_out) == 200
    expected = {text for text in train | held_out
                if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < 0.1 * 2**64}
    assert held_out == expected
    texts.add(*(f"another {number}" for number in range(99)))
    for path in sorted(texts.folder.glob("0*.txt"))[:40]:
        path.rename(path.with_name("9" + path.name))  # to the end
    more_train, more_held_out = map(set, texts_of(texts.prepare()))
    assert train <= more_train
    assert held_out <= more_held_out
    for path in sorted(texts.folder.glob("0*.txt"))[:100]:
        path.unlink()
    less_train, less_held_out = map(set, texts_of(texts.prepare()))
    assert less_train <= more_train
    assert less_held_out <= more_held_out
    assert less_held_out


def test_equal_texts_stay_together(texts: Texts) -> None:
    texts.add(*(f"text {number % 40}" for number in range(120)))
    train, held_out = texts_of(texts.prepare())
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 120


def test_no_split_is_empty() -> None:
    generator = np.random.default_rng(0)
    for count in range(2, 12):
        hashes = [generator.integers(0, 2**64, size, dtype=np.uint64) for size in (count, 0, 1)]
        for share in (1e-18, 1e-9, 0.5, 1 - 1e-9, 1 - 2**-53):
            chosen = np.concatenate(held_out_documents(hashes, share))
            assert chosen.any()
            assert not chosen.all()
    same = [np.full(3, 5, dtype=np.uint64), np.full(2, 7, dtype=np.uint64)]
    assert [part.tolist() for part in held_out_documents(same, 1e-9)] == [[True] * 3, [False] * 2]


@pytest.mark.parametrize(("words", "held_out", "expected"), [
    (["0123456789"], 0.2, (["01234567"], ["89"])), (["ä" * 10], 1e-9, (["ä" * 9], ["ä"])),
    (["ab"], 0.999, (["a"], ["b"])), (["0123456789"] * 2, 0.5, (["01234"] * 2, ["56789"] * 2)),
])
def test_an_only_text_is_cut(texts: Texts, words: list[str], held_out: float, expected: tuple[list[str], ...]) -> None:
    texts.add(*words)
    assert texts_of(texts.prepare(held_out)) == expected
    again = texts.prepare(held_out)
    assert texts_of(again) == expected
    assert again.fingerprint == texts.prepare(held_out).fingerprint


def test_own_held_out_files(texts: Texts) -> None:
    texts.add(*(f"text {number}" for number in range(30)))
    own = texts.folder / "own.txt"
    own.write_text("what is held out")
    corpus = texts.prepare(0.5, held_out_files=(str(own),))
    assert texts_of(corpus) == ([f"text {number}" for number in range(30)], ["what is held out"])
    assert corpus.notes == ()
    before = corpus.fingerprint
    own.write_text("text 7")
    corpus = texts.prepare(0.5, held_out_files=(str(own),))
    train, held_out = texts_of(corpus)
    assert held_out == ["text 7"]
    assert train == [f"text {number}" for number in range(30) if number != 7]
    assert corpus.fingerprint != before
    assert "data.held_out_files" in corpus.notes[0]
    with pytest.raises(ConfigError, match=r"^data\.held_out_files: no such file"):
        texts.prepare(held_out_files=("none.txt",))
    own.write_text("")
    with pytest.raises(ConfigError, match=r"^data\.held_out_files: all 1 files are empty"):
        texts.prepare(held_out_files=(str(own),))


def test_fingerprint_is_of_the_tokens_and_the_split_alone(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    texts.add(*(f"text {number} " * 9 for number in range(60)))
    first = texts.prepare().fingerprint
    assert texts.prepare(held_out=0.1 + 1e-12).fingerprint == first, "no document moved"
    assert texts.prepare(held_out=0.3).fingerprint != first
    texts.folder.joinpath("0000.txt").write_text(" ")  # no document
    assert texts.prepare().fingerprint == first
    path = texts.folder / "0006.txt"
    path.write_text(path.read_text()[:-1] + "x")
    assert texts.prepare().fingerprint != first
    path.write_text(path.read_text()[:-1] + " ")
    moved = Texts(texts.folder / "elsewhere")
    moved.folder.mkdir()
    moved.add(*(path.read_text() for path in sorted(texts.folder.glob("*.txt"))))
    with monkeypatch.context() as patch:
        patch.setattr("moescale.data.token_file.PACK_BYTES", 300)
        assert moved.prepare().fingerprint == first
    assert len(moved.prepare().train.packs) == 1
    assert len(list((moved.folder / "cache" / "packs").iterdir())) == 1
