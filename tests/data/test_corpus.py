"""Every kind of file becomes documents, and every file that cannot is refused in one line that names it."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from moescale.config import ConfigError
from moescale.data import documents as documents_module
from moescale.data.corpus import open_corpus


def read(*files: object) -> list[str]:
    return [document.text for document in open_corpus([str(file) for file in files]).documents()]


def test_reads_every_kind_sorted_and_once(tmp_path: Path) -> None:
    deep = tmp_path / "b" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n")  # an editor's mark goes, line ends stay
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (deep / "b.md").write_text("zweites äöü")
    (deep / "c.py.gz").write_bytes(gzip.compress(b"print()"))
    (deep / "d.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": " \\n"}\n{"text": "half \\ud800", "n": 1}')
    (deep / "e.JSONL.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "two"}\n'))
    (deep / "f[1].txt").write_text("brackets")
    (deep / "g.txt").write_text("")
    expected = ["first\r\n", "zweites äöü", "print()", "one", "half \ufffd", "two", "brackets"]
    assert read(tmp_path / "**" / "*.*", tmp_path / "a.txt", deep / "f[1].txt") == expected


def test_every_document_has_a_kind(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": "b", "lang": "Rust"}, {"text": "c", "source": "x", "language": " Go \n  2 "},
             {"text": "d", "source": "s" * 99}, {"text": "e", "lang": "", "source": 7}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    (tmp_path / "b.MD").write_text("f")
    (tmp_path / "c.py.gz").write_bytes(gzip.compress(b"g"))
    kinds = [document.kind for document in open_corpus([str(tmp_path / "*.*")]).documents()]
    assert kinds == [".jsonl", "Rust", "Go 2", "s" * 40, ".jsonl", ".md", ".py"]


def test_expands_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert read("~/a.txt") == read("~/*.txt") == ["at home"]


def test_default_is_the_standard_library() -> None:
    corpus = open_corpus(())
    root = os.path.realpath(sysconfig.get_path("stdlib"))
    relative = [Path(file.path).relative_to(root) for file in corpus.files]
    assert corpus.is_default
    assert Path("argparse.py") in relative
    assert relative == sorted(relative)
    assert not {"site-packages", "dist-packages", "__pycache__"} & {part for path in relative for part in path.parts}
    documents = list(corpus.documents())
    assert len(corpus.files) / 2 < len(documents) <= len(corpus.files)


BAD_FILES = {
    "nul.txt": (b"a\0b", "nul.txt is not UTF-8 text"),
    "latin.md": ("ä".encode("latin-1"), "latin.md is not UTF-8 text"),
    "kind.pdf": (b"%PDF", "kind.pdf is of an unknown kind"),
    "kind.gz": (b"", "kind.gz is of an unknown kind"),
    "plain.txt.gz": (b"not compressed", "plain.txt.gz is not a whole gzip file"),
    "cut.txt.gz": (gzip.compress(b"hello" * 1000)[:-9], "cut.txt.gz is not a whole gzip file"),
    "broken.jsonl.gz": (gzip.compress(b"x" * 50)[:12] + b"\xff" * 30, "broken.jsonl.gz is not a whole gzip file"),
    "words.jsonl": (b'{"text": "a"}\nhello\n', "words.jsonl line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl line 1 is not JSON"),
    "list.jsonl": (b'["text"]\n', "list.jsonl line 1 has no string `text`"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 1}\n', "number.jsonl line 3 has no string `text`"),
    "field.jsonl": (b'{"body": "a"}\n', "field.jsonl line 1 has no string `text`"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "bytes.jsonl line 1 is not UTF-8 text"),
    "blank.txt": (b" \n", "all 1 files are empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses_bad_content_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path / name, message)


def test_refuses_bad_paths_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.txt")
    check_refused(tmp_path / "none.txt", "no such file: ")
    check_refused(tmp_path / "none" / "**" / "*.txt", "matches no file")
    check_refused(tmp_path, "is a directory: name its files")
    check_refused(tmp_path / "dangling.txt", "no such file: ")
    check_refused(tmp_path / "pipe.txt", "is not a regular file")
    check_refused(tmp_path / ("x" * 300 + ".txt"), "cannot be read")


def test_refuses_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("secret")
    monkeypatch.setattr(documents_module, "open", refuse, raising=False)  # root may read everything
    check_refused(tmp_path / "a.txt", "a.txt may not be read")


def check_refused(path: Path, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.files: ")


def test_holds_one_document_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)) + "broken")
    documents = open_corpus([str(tmp_path / "a.jsonl")]).documents()
    assert [next(documents).text for _ in range(9)] == [str(n) for n in range(9)]  # the tenth line is not looked at yet
    with pytest.raises(ConfigError, match="line 10"):
        next(documents)
