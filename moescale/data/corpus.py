"""Find the files of a corpus; the default is the running Python's own library source."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moescale.config import ConfigError
from moescale.data.documents import (
    COMPRESSED,
    INDEX,
    INDEXED,
    LINE_SUFFIXES,
    MAX_DOCUMENT_BYTES,
    PARQUET,
    TEXT_SUFFIXES,
    BadDocument,
    Document,
    SourceFile,
    check_packages,
    kind_of,
    read_documents,
)

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}  # below the library's folder, but not part of it
_REPEATS = 10_000  # of files that a glob may find again through links; more are links that lead back


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus in reading order, and how to read them.

    skip_bad: whether documents that cannot be read are left out. is_default: the files are the running Python's
    library.
    """

    files: tuple[SourceFile, ...]
    text_field: str = "text"
    skip_bad: bool = False
    is_default: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not blank, in order, holding one at a time.

        Raises ConfigError with the file (and line) that cannot be read as text, or when nothing is left.
        """
        found = False
        for file in self.files:
            for each in read_documents(file, self.text_field):
                if isinstance(each, Document):
                    found = True
                    yield each
                else:
                    self.refuse(file, each)
        if not found:
            raise self.empty()

    def refuse(self, file: SourceFile, bad: BadDocument) -> None:
        """Raise ConfigError for a document that cannot be read, unless those are skipped."""
        if not self.skip_bad:
            raise bad.error(file)

    def empty(self) -> ConfigError:
        """Give the error for a corpus without a document."""
        first = self.files[0]
        return ConfigError(f"{first.key}: all {len(self.files)} files are empty (the first is {first.path}): "
                           "name files that hold text")


def open_corpus(
    files: Sequence[str], text_field: str = "text", bad_documents: str = "refuse", key: str = "data.files"
) -> Corpus:
    """Resolve paths and globs to a sorted corpus without duplicates; no paths give the default corpus.

    key: of the configuration, for errors. Raises ConfigError with the path that is missing, a directory, or of an
    unknown kind.
    """
    if not files:
        return _library_source()
    found = {file.path: file for pattern in files for file in _expand(pattern, key)}
    return Corpus(tuple(found[path] for path in sorted(found)), text_field, bad_documents == "skip")


def _library_source() -> Corpus:
    root = os.path.realpath(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        paths = (os.path.join(folder, name) for name in names if name.endswith(".py"))
        # Distributions leave links behind that lead nowhere.
        files += [describe(path, ".py", "data.files") for path in paths if os.path.isfile(path)]
    if not files:
        raise ConfigError(f"this Python keeps no library source in {root}: name text files in data.files")
    # The library keeps a few files in other encodings, for its own tests.
    return Corpus(tuple(sorted(files, key=lambda file: Path(file.path).parts)), skip_bad=True, is_default=True)


def _expand(pattern: str, key: str) -> Iterable[SourceFile]:
    path = os.path.expanduser(pattern)
    is_glob = glob.has_magic(path) and not os.path.lexists(path)  # a name may hold brackets itself
    paths = _matches(path, key) if is_glob else [path]
    if not paths:
        raise ConfigError(f"{key}: {pattern} matches no file: check the pattern (** stands for any folders)")
    for match in paths:
        if os.path.isdir(match):
            raise ConfigError(f"{key}: {match} is a directory: name its files, e.g. "
                              f"{os.path.join(match, '**', '*.txt')}")
        kind = kind_of(match)  # of the name as given: a link may lead to a blob without an ending
        if kind is None and os.path.lexists(match):
            raise ConfigError(f"{key}: {match} is of an unknown kind: use {', '.join(TEXT_SUFFIXES + LINE_SUFFIXES)}, "
                              f"each also with {' or '.join(COMPRESSED)}, {PARQUET}, or {INDEXED} beside {INDEX}")
        if kind in (INDEXED, INDEX):
            yield _describe_indexed(match[: -len(INDEXED)], key)
            continue
        file = describe(os.path.realpath(match), kind or "", key)
        check_packages(file)
        if file.suffix in TEXT_SUFFIXES and not file.compression and file.size_bytes > MAX_DOCUMENT_BYTES:
            raise file.error(f" is one document of more than {MAX_DOCUMENT_BYTES >> 20} MiB: split it into several "
                             "files, or write one document a line as .jsonl")
        yield file


def _matches(path: str, key: str) -> list[str]:
    matches: list[str] = []
    distinct: set[str] = set()
    for match in glob.iglob(path, recursive=True):
        if not os.path.isdir(match):
            matches.append(match)
            distinct.add(os.path.realpath(match))
            if len(matches) > len(distinct) + _REPEATS:
                raise ConfigError(f"{key}: {path} finds the same files over and over, the last one as {match}: "
                                  "a folder links back to one above it, so name folders without it")
    return matches


def describe(path: str, kind: str, key: str) -> SourceFile:
    """Look a file up. kind: how to read it. key: of the configuration. Raises ConfigError when it is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        advice = f"write {path}{INDEXED}" if os.path.isfile(path + INDEXED) else "check the path"
        raise ConfigError(f"{key}: no such file: {path}: {advice}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{key}: {path!r} cannot be read ({reason}): check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{key}: {path} is not a regular file: save its text to one")
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return SourceFile(path, kind, key, status.st_size, stamp)


def _describe_indexed(prefix: str, key: str) -> SourceFile:
    """Look up a file of tokens and its index, by the name that both begin with."""
    for here, other in ((INDEXED, INDEX), (INDEX, INDEXED)):
        if os.path.lexists(prefix + here) and not os.path.lexists(prefix + other):
            raise ConfigError(f"{key}: {prefix}{here} needs {os.path.basename(prefix)}{other} beside it, and there is "
                              "none: copy both")
    tokens, index = (describe(os.path.realpath(prefix + ending), INDEXED, key) for ending in (INDEXED, INDEX))
    return replace(tokens, stamp=tokens.stamp + index.stamp, index=index.path)
