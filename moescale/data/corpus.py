"""Find text files and read them as documents, one at a time; the default is the running Python's own library source."""

from __future__ import annotations

import glob
import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from moescale.config import ConfigError

TEXT_SUFFIXES = (".txt", ".py", ".md")  # a document a file
LINE_SUFFIXES = (".jsonl",)  # a document a line
KIND_FIELDS = ("language", "lang", "source")  # of a line: what kind of document it is, the first that is there
SPLITS = ("train", "held_out")
MAX_KIND_LETTERS = 40
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}  # below the library's folder, but not part of it


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, with what tells whether it has changed since."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Document:
    """A text, and what kind of file it is: the name's ending, or what its line says it is."""

    text: str
    kind: str


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus in reading order. is_default: they are the running Python's library."""

    files: tuple[SourceFile, ...]
    is_default: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not blank, in order, holding one file or line at a time.

        Raises ConfigError with the file (and line) that cannot be read as text, or when nothing is left.
        """
        found = False
        for file in self.files:
            try:
                for document in _read_documents(file.path):
                    if document.text and not document.text.isspace():
                        found = True
                        yield document
            except _NotTextError as error:
                if not self.is_default:  # the library keeps a few files in other encodings, for its own tests
                    raise ConfigError(str(error)) from None
        if not found:
            raise ConfigError(f"data.files: all {len(self.files)} files are empty (the first is {self.files[0].path}): "
                              "name files that hold text")


def open_corpus(files: Sequence[str]) -> Corpus:
    """Resolve paths and globs to a sorted corpus without duplicates; no paths give the default corpus.

    Raises ConfigError with the path that is missing, a directory, or of an unknown kind.
    """
    if not files:
        return _library_source()
    found = {path: file for pattern in files for path, file in _expand(pattern)}
    return Corpus(tuple(found[path] for path in sorted(found)))


def _library_source() -> Corpus:
    root = os.path.realpath(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        paths = (os.path.join(folder, name) for name in names if name.endswith(".py"))
        files += [_describe(path) for path in paths if os.path.isfile(path)]  # distributions leave dangling links
    if not files:
        raise ConfigError(f"this Python keeps no library source in {root}: name text files in data.files")
    return Corpus(tuple(sorted(files, key=lambda file: Path(file.path).parts)), is_default=True)


def _expand(pattern: str) -> Iterable[tuple[str, SourceFile]]:
    path = os.path.expanduser(pattern)
    is_glob = glob.has_magic(path) and not os.path.lexists(path)  # a name may hold brackets itself
    paths = [match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)] if is_glob else [path]
    if not paths:
        raise ConfigError(f"data.files: {pattern} matches no file: check the pattern (** stands for any folders)")
    for match in paths:
        known = TEXT_SUFFIXES + LINE_SUFFIXES
        if os.path.isdir(match):
            raise ConfigError(f"data.files: {match} is a directory: name its files, e.g. "
                              f"{os.path.join(match, '**', '*.txt')}")
        if os.path.lexists(match) and _suffix(match) not in known:
            raise ConfigError(f"data.files: {match} is of an unknown kind: use {', '.join(known)}, each also with .gz")
        resolved = os.path.realpath(match)
        yield resolved, _describe(resolved)


def _suffix(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _describe(path: str) -> SourceFile:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ConfigError(f"data.files: no such file: {path}: check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.files: {path!r} cannot be read ({_reason(error)}): check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"data.files: {path} is not a regular file: save its text to one")
    return SourceFile(path, status.st_size, status.st_mtime_ns)


def split_documents(documents: Iterable[Document], held_out: float) -> Iterator[tuple[str, Document]]:
    """Say for each document whether it is trained on or held out, by its number alone.

    The last document goes to the split that is still empty, if one is; an only document is cut in two.
    held_out: share of the documents. -> pairs of a split's name and a document
    """
    used: set[str] = set()
    last: Document | None = None
    index = -1
    for index, document in enumerate(documents):
        if last is not None:
            name = _split_of(index - 1, held_out)
            used.add(name)
            yield name, last
        last = document
    if last is None:
        return
    if index == 0:
        text = last.text
        cut = max(1, min(len(text) - 1, len(text) - round(len(text) * held_out)))
        yield "train", replace(last, text=text[:cut])
        if text[cut:]:
            yield "held_out", replace(last, text=text[cut:])
        return
    missing = [name for name in SPLITS if name not in used]
    yield missing[0] if missing else _split_of(index, held_out), last


def _split_of(index: int, held_out: float) -> str:
    mixed = (index + 1) * 0x9E3779B97F4A7C15 % 2**64  # the finalizer of splitmix64: neighbours get unrelated numbers
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return "held_out" if (mixed ^ mixed >> 31) < held_out * 2**64 else "train"


class _NotTextError(Exception):
    """The file holds something other than UTF-8 text."""


def _read_documents(path: str) -> Iterator[Document]:
    try:
        with _open(path) as file:
            if _suffix(path) in LINE_SUFFIXES:
                yield from _read_lines(file, path)
            else:
                yield Document(_decode(file.read(), path), _suffix(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # the first is an OSError too
        raise ConfigError(f"data.files: {path} is not a whole gzip file ({error}): copy or compress it again") from None
    except PermissionError:
        raise ConfigError(f"data.files: {path} may not be read: give yourself permission, e.g. chmod u+r") from None
    except OSError as error:
        raise ConfigError(f"data.files: {path} cannot be read ({_reason(error)}): check the file") from None


def _open(path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")


def _read_lines(file: IO[bytes], path: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        where = f"{path} line {number}"
        decoded = _decode(line, where)
        if not decoded.strip():
            continue
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise ConfigError(f"data.files: {where} is not JSON ({reason}): "
                              'write one object a line, e.g. {"text": "..."}') from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"data.files: {where} has no string `text`: "
                              'write one object a line, e.g. {"text": "..."}')
        named = (record[field] for field in KIND_FIELDS if isinstance(record.get(field), str))
        kind = next((" ".join(name.split())[:MAX_KIND_LETTERS] for name in named if name.strip()), _suffix(path))
        yield Document(_without_lone_surrogates(text), _without_lone_surrogates(kind))


def _decode(content: bytes, where: str) -> str:
    if b"\0" not in content:
        try:
            return content.decode("utf-8-sig")  # some editors put a mark before the first character
        except UnicodeDecodeError:
            pass
    raise _NotTextError(f"data.files: {where} is not UTF-8 text: convert it (e.g. with iconv), or leave it out")


def _without_lone_surrogates(text: str) -> str:
    """JSON can spell half a character; no tokenizer takes it, so it becomes the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
