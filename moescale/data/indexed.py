"""Megatron's indexed datasets: `NAME.bin` holds the tokens of documents, `NAME.idx` says where each of them lies.

The index is a header of 34 bytes (a mark, a version, the dtype of the tokens, how many sequences there are, how many
bounds of documents) and three arrays: the length of each sequence, its offset in bytes, and, of each document, the
number of the sequence that it begins with, one more at the end. A document is some sequences in a row. It is read and
written here without Megatron; as of Megatron-Core 0.16.
"""

from __future__ import annotations

import array
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moescale.config import ConfigError
from moescale.data.documents import INDEX, INDEXED, BadDocument, Document, SourceFile
from moescale.data.tokenizer import Tokenizer
from moescale.files.reading import open_regular
from moescale.files.writing import replacing

HEADER = struct.Struct("<9sQBQQ")
MARK, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floating point
CODES = {dtype: code for code, dtype in DTYPES.items()}
AGAIN = "copy or write it again"
LARGEST_SHORT = 65500  # ids with which Megatron chooses 16 bits


@dataclass(frozen=True, eq=False)
class IndexedTokens:
    """The tokens of documents, one after another. bounds: [documents + 1], where each begins, and the end."""

    tokens: np.ndarray
    bounds: np.ndarray


def open_indexed(file: SourceFile) -> IndexedTokens:
    """Map a file of tokens that is not empty, and hold it to its index.

    Raises ConfigError where one of the two is cut, damaged or of another kind.
    """
    assert file.index is not None
    with file.readable_errors(), open_regular(file.index) as source:
        header, size = source.read(HEADER.size), os.fstat(source.fileno()).st_size
    if len(header) < HEADER.size or header[: len(MARK)] != MARK:
        raise _error(file, f"is no index of Megatron's, which begins with {MARK[:7].decode()}: name a {INDEXED} whose "
                     f"{INDEX} is one")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        what = f"has version {version}" if version != VERSION else f"says that tokens have dtype {code}"
        raise _error(file, f"{what}, which MoEScale cannot read: write version {VERSION} with tokens of integers")
    wanted = HEADER.size + 12 * sequences + 8 * bounds
    if size == wanted + sequences > wanted:
        raise _error(file, "is of several media (it has modes): write one of text alone")
    if size != wanted:
        raise _error(file, f"is damaged: it has {size:,} bytes, its header describes {wanted:,}: {AGAIN}")

    # where each sequence lies: one after another, to the end of the tokens
    dtype = np.dtype(DTYPES[code])
    mapped = np.memmap(file.index, mode="r", offset=0)
    lengths, pointers, documents = (
        mapped[begin : begin + count * kind.itemsize].view(kind) for begin, count, kind in (
            (HEADER.size, sequences, np.dtype("<i4")), (HEADER.size + 4 * sequences, sequences, np.dtype("<i8")),
            (HEADER.size + 12 * sequences, bounds, np.dtype("<i8"))))
    ends = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise _error(file, "is damaged: its sequences do not lie one after another: " + AGAIN)
    if not bounds or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise _error(file, "is damaged: its documents are not all of its sequences in a row: " + AGAIN)
    if file.size_bytes != ends[-1] * dtype.itemsize:
        raise file.error(f" has {file.size_bytes:,} bytes, and {file.index} describes {ends[-1] * dtype.itemsize:,} of "
                         f"{dtype.name}: copy or write both again")
    with file.readable_errors():
        tokens = np.memmap(file.path, dtype=dtype.newbyteorder("<"), mode="r")
    return IndexedTokens(np.asarray(tokens), ends[documents])


def _error(file: SourceFile, fault: str) -> ConfigError:
    return ConfigError(f"{file.key}: {file.index} {fault}")


def read_indexed(
    file: SourceFile, tokenizer: Tokenizer, position: Callable[[int], None] = lambda _: None
) -> Iterator[Document | BadDocument]:
    """Yield the documents of a file of tokens with the texts that they stand for; blank ones are left out.

    The tokens that begin and end a document are taken off where they are there. position: is told how many bytes have
    been read. Raises ConfigError when the file cannot be read.
    """
    if file.size_bytes == 0:
        return
    indexed = open_indexed(file)
    for number in range(len(indexed.bounds) - 1):
        begin, end = map(int, indexed.bounds[number : number + 2])
        position(end * indexed.tokens.itemsize)
        ids = indexed.tokens[begin:end]
        ids = ids[1:] if len(ids) and ids[0] == tokenizer.begin else ids
        ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.end else ids
        if not len(ids):
            continue
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        if not 0 <= worst < tokenizer.vocab_size:
            yield _bad(number, worst, tokenizer)
            continue
        text = tokenizer.decode(ids.tolist())
        if text and not text.isspace():
            yield Document(text, file.kind, ids)


def _bad(number: int, token: int, tokenizer: Tokenizer) -> BadDocument:
    """Say of a document that it holds a token that no text has. number: of the document, from 0 on"""
    where = f"document {number + 1}"
    if tokenizer.vocab_size <= token < tokenizer.num_ids:
        return BadDocument(where, f"holds the special token {tokenizer.token_name(token)}", "leave it out")
    return BadDocument(where, f"holds the token {token}, and data.tokenizer={tokenizer.name} has "
                       f"{tokenizer.vocab_size} ids", "name the tokenizer that made these tokens")


# ---- writing


def refuse_existing(prefix: Path) -> None:
    """Raise ConfigError where a file of tokens or its index exists."""
    for ending in (INDEXED, INDEX):
        if os.path.lexists(f"{prefix}{ending}"):
            raise ConfigError(f"{prefix}{ending} exists already: give a name that does not")


def write_indexed(prefix: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> tuple[int, int]:
    """Write documents as `PREFIX.bin` and `PREFIX.idx`, each as Megatron's own tools lay it out, with its end.

    documents: each with the tokens that begin and end it, as a pack holds it. Returns how many documents and tokens
    were written. Raises ConfigError where one of the files exists, and OSError.
    """
    refuse_existing(prefix)
    paths = [prefix.with_name(prefix.name + ending) for ending in (INDEXED, INDEX)]
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < LARGEST_SHORT else np.int32).newbyteorder("<")
    lengths = array.array("i")
    with replacing(paths[1]) as index, replacing(paths[0]) as tokens:
        for document in documents:
            if tokenizer.begin == tokenizer.end:  # one token does both: there it ends a document
                document = np.append(document[1:], document[:1])
            tokens.write(document.astype(dtype).tobytes())
            lengths.append(len(document))
        sizes = np.array(lengths, dtype="<i4")
        ends = np.cumsum(sizes, dtype="<i8")
        index.write(HEADER.pack(MARK, VERSION, CODES[dtype.newbyteorder("=").type], len(sizes), len(sizes) + 1))
        index.write(sizes.tobytes())
        index.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        index.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return len(sizes), int(sizes.sum())
