"""Every format gives the same documents, bad ones are counted or refused, and no file takes all memory or time."""

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moescale.config import ConfigError
from moescale.data import corpus as corpus_module
from moescale.data import documents as documents_module
from moescale.data.corpus import open_corpus
from moescale.data.documents import BadDocument, read_documents

RECORDS = [{"text": "one", "body": "eins", "lang": "Rust"}, {"text": "zwei äöü🙂", "body": "zwei"},
           {"text": " ", "body": "drei"}, {"text": "vier\nzeilen", "body": "vier", "source": "s"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(path: Path, **columns: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def read(path: Path, **keys: str) -> list[tuple[str, str]]:
    return [(document.text, document.kind) for document in open_corpus([str(path)], **keys).documents()]


def refused(path: Path, **keys: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert message.startswith("data.files: ")
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(("name", "pack"), [
    ("a.jsonl", bytes), ("a.json", bytes), ("a.json.gz", gzip.compress), ("a.jsonl.zst", zstd),
    ("a.JSON.ZST", lambda content: zstd(content[:100]) + zstd(content[100:])), ("a.parquet", None),
])
def test_all_formats_give_the_same(tmp_path: Path, name: str, pack: Callable[[bytes], bytes] | None) -> None:
    path = tmp_path / name
    if pack is None:
        parquet(path, **{key: [record.get(key) for record in RECORDS] for key in ("text", "body", "lang", "source")})
    else:
        path.write_bytes(pack(LINES))
    suffix = name.lower().removesuffix(".gz").removesuffix(".zst")[1:]
    assert read(path) == [("one", "Rust"), ("zwei äöü🙂", suffix), ("vier\nzeilen", "s")]
    assert [text for text, _ in read(path, text_field="body")] == ["eins", "zwei", "drei", "vier"]
    assert "data.text_field" in refused(path, text_field="lorem")
    link = tmp_path / "named.parquet" if pack is None else tmp_path / f"named{suffix}{name[len(suffix) + 1:]}"
    blob = tmp_path / "blobs-0f3a"
    path.rename(blob)
    link.symlink_to(blob)  # as download caches have it
    assert len(read(link)) == 3


def test_parquet_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, text=pyarrow.array(["a", None, "b"], pyarrow.large_string()), lang=[1, 2, 3])
    assert "row 2" in refused(path)
    assert read(path, bad_documents="skip") == [("a", ".parquet"), ("b", ".parquet")]
    parquet(path, text=pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert [text for text, _ in read(path)] == ["a", "b", "a"]
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"),
                                                               pyarrow.py_buffer(b"a\xff")])
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), path)
    assert "row 2" in refused(path)
    assert read(path, bad_documents="skip") == [("a", ".parquet")]
    parquet(path, text=[1, 2], words=["a", "b"])
    assert "words" in refused(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "whole Parquet file" in refused(path)


def test_bad_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "cut\n\n{"text": "\xff"}\n{"text": 5}\n' + b"[" * 100_000 + b"\n[]\n"
                     + b'{"text": "b", "n": ' + b"9" * 5000 + b'}\n{"text": "c"}')
    assert [text for text, _ in read(path, bad_documents="skip")] == ["a", "c"]
    (file,) = open_corpus([str(path)]).files
    bad = [each.where for each in read_documents(file, "text") if isinstance(each, BadDocument)]
    assert bad == [f"line {number}" for number in (2, 4, 5, 6, 7, 8)]
    message = refused(path)
    assert "line 2" in message
    assert "data.bad_documents=skip" in message


@pytest.mark.parametrize("content", [b'[{"text": "a"}, {"text": "b"}]', b'[\n{"text": "a"}\n]', b'{\n"text": "a"\n}'])
def test_other_json_says_what_to_write(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert "one object a line" in refused(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.jsonl.zst", "a.txt.zst"])
def test_damaged_packing_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = "gzip" if name.endswith(".gz") else "zstd"
    whole = (gzip.compress if kind == "gzip" else zstd)(LINES * 50)
    path.write_bytes(whole)
    assert read(path)
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"text", whole + b"rubbish"):
        path.write_bytes(damaged)
        for bad_documents in ("refuse", "skip"):  # the file is bad, not a document
            assert f"whole {kind} file" in refused(path, bad_documents=bad_documents)


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.jsonl.gz", gzip.compress),
                                            ("a.txt.zst", zstd), ("a.jsonl.zst", zstd)])
def test_files_that_unpack_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(documents_module, "GROWTH_FROM_BYTES", 2**20)
    path = tmp_path / name
    path.write_bytes(pack(b'{"text": "aaaaaaaaaaaaaaa"}\n' * 150_000))
    assert "times its size" in refused(path, bad_documents="skip")


def test_long_documents_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents_module, corpus_module):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": letter * size}) + "\n"
                            for letter, size in (("a", 900), ("b", 980), ("c", 5000), ("d", 3))))
    assert "line 3" in refused(path)
    assert [text[0] for text, _ in read(path, bad_documents="skip")] == ["a", "b", "d"]
    for name, pack in (("b.txt", bytes), ("b.txt.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(os.urandom(990).hex().encode()))
        assert len(read(path)[0][0]) == 1980
        path.write_bytes(pack(os.urandom(1001).hex().encode()))
        assert "MiB" in refused(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_holes_are_not_read_to_their_end(tmp_path: Path, name: str) -> None:
    from moescale.config import DataConfig
    from moescale.data.token_file import prepare_tokens

    path = tmp_path / name
    path.write_text('{"text": "a"}\n')
    os.truncate(path, 10**12)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=name):
        prepare_tokens(DataConfig(files=(str(path),), cache_dir=str(tmp_path / "cache")))
    assert time.monotonic() - started < 5


def test_folders_that_link_back_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_REPEATS", 30)
    (tmp_path / "a.txt").write_text("a")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^data\.files: .*over and over"):
        open_corpus([f"{tmp_path}/**/*.txt"])
    assert time.monotonic() - started < 5


def test_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setattr(documents_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install pyarrow" in refused(tmp_path / "a.jsonl.zst")
