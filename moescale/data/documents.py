"""Read one file as documents, one at a time, in bounded memory.

A document is a whole text file, a line of JSON, or a row of a Parquet file. What cannot be read as one is handed on as
a BadDocument, and whoever reads decides; what is wrong with the file itself raises ConfigError.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from moescale.config import ConfigError

TEXT_SUFFIXES = (".txt", ".py", ".md")  # a document per file
LINE_SUFFIXES = (".jsonl", ".json")  # a document per line
PARQUET = ".parquet"  # a document per row
INDEXED, INDEX = ".bin", ".idx"  # tokens of documents, and where each of them begins and ends
COMPRESSED = (".gz", ".zst")
KIND_FIELDS = ("language", "lang", "source")  # of a line or row: what kind of document it is, the first that is there
MAX_KIND_LETTERS = 40
MAX_DOCUMENT_BYTES = 2**30
MAX_LINE_BYTES = 2**26  # JSON of many small values takes twenty times its size
MAX_GROWTH, GROWTH_FROM_BYTES = 200, 2**26  # text shrinks tenfold; only what is made to fill a disk grows more
BLOCK_BYTES = 2**20
STAMP = 5  # numbers of a stamp, a path: size, times of change of content and of inode, inode, device


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    path: with links resolved. kind: the ending of the name that the user gave, `.gz` or `.zst` included. key: of the
    configuration, which names it. stamp: size, inode and times, which no change of the content leaves as they are, of
    each path. index: of a file of tokens, the path of what says where its documents lie.
    """

    path: str
    kind: str
    key: str
    size_bytes: int
    stamp: tuple[int, ...]
    index: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """List the files on whose content the documents depend."""
        return (self.path,) if self.index is None else (self.path, self.index)

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.kind)[0] if self.compression else self.kind

    @property
    def compression(self) -> str:
        return next((ending for ending in COMPRESSED if self.kind.endswith(ending)), "")

    def error(self, fault: str) -> ConfigError:
        """Give the error that names this file."""
        return ConfigError(f"{self.key}: {self.path}{fault}")

    @contextlib.contextmanager
    def readable_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into a ConfigError that names this file."""
        try:
            yield
        except PermissionError:
            raise self.error(" may not be read: give yourself permission, e.g. chmod u+r") from None
        except OSError as error:
            raise self.error(f" cannot be read ({error.strerror or error}): check the file") from None


@dataclass(frozen=True)
class Document:
    """A text, and what kind of file it is: the name's ending, or what its line says it is.

    ids: [tokens], those of the text without beginning and end, where the file holds tokens.
    """

    text: str
    kind: str
    ids: np.ndarray | None = None


@dataclass(frozen=True)
class BadDocument:
    """What stands in a file where a document should. place: the line or row, nothing for a whole file."""

    where: str
    fault: str
    advice: str

    def error(self, file: SourceFile) -> ConfigError:
        """Give the error that refuses it."""
        where = f" {self.where}" if self.where else ""
        return file.error(f"{where} {self.fault}: {self.advice}, or write data.bad_documents=skip")


def kind_of(name: str) -> str | None:
    """Give the part of a file's name that says how to read it, in lower case; None when nothing reads it."""
    lower = name.lower()
    compression = next((ending for ending in COMPRESSED if lower.endswith(ending)), "")
    suffix = os.path.splitext(lower.removesuffix(compression))[1]
    known = TEXT_SUFFIXES + LINE_SUFFIXES + (() if compression else (PARQUET, INDEXED, INDEX))
    return suffix + compression if suffix in known else None


def check_packages(file: SourceFile) -> None:
    """Raise ConfigError when a package that this kind of file needs is missing."""
    if (file.suffix == PARQUET or file.compression == ".zst") and importlib.util.find_spec("pyarrow") is None:
        raise file.error(" needs the package pyarrow: pip install pyarrow")


def read_documents(
    file: SourceFile, text_field: str, position: Callable[[int], None] = lambda _: None
) -> Iterator[Document | BadDocument]:
    """Yield what stands in a file, document by document; blank ones are left out.

    position: is told how many bytes of the file have been read. Raises ConfigError when the file cannot be read.
    """
    if file.size_bytes == 0:  # as the system's own files seem to be, which may never end
        return
    reader = _read_rows if file.suffix == PARQUET else _read_stream
    try:
        with file.readable_errors():
            for each in reader(file, text_field, position):
                if isinstance(each, BadDocument) or (each.text and not each.text.isspace()):
                    yield each
    except _DamagedError as error:
        raise file.error(f" is not a whole {error}: copy or write it again") from None


class _DamagedError(Exception):
    """What packs or frames the text is cut or damaged."""


# ---- streams of bytes


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a compressed file; one that unpacks to far more than it holds is refused."""

    def __init__(self, file: SourceFile, raw: BinaryIO) -> None:
        self.file, self.raw, self.count = file, raw, 0
        if file.compression == ".zst":
            from moescale.data.pyarrow import ZstdStream

            self.source = cast(BinaryIO, ZstdStream(raw))
        else:
            self.source = cast(BinaryIO, gzip.GzipFile(fileobj=raw))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            block = self.source.read(len(buffer))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # the first is an OSError too
            raise _DamagedError(f"gzip file ({error})") from None
        except ValueError as error:
            raise _DamagedError(f"zstd file ({error})") from None
        buffer[: len(block)] = block
        self.count += len(block)
        if self.count > max(GROWTH_FROM_BYTES, MAX_GROWTH * self.raw.tell()):
            raise self.file.error(f" unpacks to more than {MAX_GROWTH} times its size, as no text does: leave it out")
        return len(block)


def _read_stream(
    file: SourceFile, text_field: str, position: Callable[[int], None]
) -> Iterator[Document | BadDocument]:
    with open(file.path, "rb") as raw:
        stream = cast(BinaryIO, io.BufferedReader(_Unpacked(file, raw), BLOCK_BYTES) if file.compression else raw)
        if file.suffix in TEXT_SUFFIXES:
            yield _whole_text(stream, file)
            return
        for number, line in enumerate(_lines(stream), start=1):
            position(raw.tell())
            found = _line(line, f"line {number}", text_field, file.suffix)
            if found is not None:
                yield found


def _whole_text(stream: BinaryIO, file: SourceFile) -> Document | BadDocument:
    blocks, size = [], 0
    while block := stream.read(BLOCK_BYTES):
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            return _too_long(MAX_DOCUMENT_BYTES, "split it into several files")
        if b"\0" in block:
            return _not_text("")
        blocks.append(block)
    text = _decode(b"".join(blocks))
    return _not_text("") if text is None else Document(text, file.suffix)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a stream, None for one that is too long."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK_BYTES)
        yield None


def _line(line: bytes | None, where: str, text_field: str, suffix: str) -> Document | BadDocument | None:
    """Read a line of JSON; None when it is blank."""
    if line is None:
        return _too_long(MAX_LINE_BYTES, "write shorter documents", where)
    decoded = _decode(line)
    if decoded is None:
        return _not_text(where)
    if not decoded.strip():
        return None
    advice = f'write one object a line, e.g. {{"{text_field}": "..."}}'
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        if where == "line 1" and suffix == ".json" and decoded.lstrip()[0] in "[{":
            advice += " (jq -c '.[]' makes lines of an array)"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return BadDocument(where, f"is not JSON ({reason})", advice)
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fault = f"has no string `{text_field}`"
        if isinstance(record, dict):
            others = [name for name, value in record.items() if isinstance(value, str) and len(name) < 40][:5]
            advice += f", or name another field in data.text_field ({', '.join(others)})" if others else ""
        elif suffix == ".json" and isinstance(record, list):
            advice += " (jq -c '.[]' makes lines of an array)"
        return BadDocument(where, fault, " ".join(advice.split()))
    kind = _kind([record.get(field) for field in KIND_FIELDS], suffix)
    return Document(_without_lone_surrogates(text), _without_lone_surrogates(kind))


def _read_rows(
    file: SourceFile, text_field: str, position: Callable[[int], None]
) -> Iterator[Document | BadDocument]:
    from moescale.data.pyarrow import read_rows

    try:
        for number, (fraction, row) in enumerate(read_rows(file.path, (text_field, *KIND_FIELDS)), start=1):
            position(int(fraction * file.size_bytes))
            text = row[0]
            if text is None:
                yield BadDocument(f"row {number}", f"has no string `{text_field}`", "write one, or leave the row out")
            elif len(text) > MAX_DOCUMENT_BYTES:
                yield _too_long(MAX_DOCUMENT_BYTES, "write shorter documents", f"row {number}")
            else:
                decoded = _decode(text, allow_zero=True)
                kinds = [kind.decode(errors="replace") if kind else None for kind in row[1:]]
                yield (_not_text(f"row {number}") if decoded is None
                       else Document(decoded, _kind(kinds, file.suffix)))
    except KeyError as error:
        raise file.error(f" has no column `{text_field}` of strings: name one in data.text_field "
                         f"({error.args[0]})") from None
    except ValueError as error:
        raise _DamagedError(f"Parquet file ({error})") from None


# ---- text


def _decode(content: bytes, allow_zero: bool = False) -> str | None:
    if allow_zero or b"\0" not in content:
        try:
            return content.decode("utf-8-sig")  # some editors put a mark before the first character
        except UnicodeDecodeError:
            pass
    return None


def _not_text(where: str) -> BadDocument:
    return BadDocument(where, "is not UTF-8 text", "convert it (e.g. with iconv), leave it out")


def _too_long(limit: int, advice: str, where: str = "") -> BadDocument:
    return BadDocument(where, f"is longer than {limit >> 20} MiB", advice)


def _kind(named: Sequence[object], suffix: str) -> str:
    texts = (" ".join(name.split())[:MAX_KIND_LETTERS] for name in named if isinstance(name, str))
    return next((text for text in texts if text), suffix)


def _without_lone_surrogates(text: str) -> str:
    """Replace half a character, which JSON can spell and no tokenizer takes, by the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
