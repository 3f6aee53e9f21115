"""Packs: the tokens of one large file or of many small ones, written once and read as memory maps.

A pack is a folder that appears whole or not at all. `tokens.bin` holds the documents' tokens one after the other; the
other arrays have an entry per document or per block of tokens (ARRAYS). `meta.json` holds the sizes and checksums of
all of them, and how much of the pack is each source file's, so that a new pack can copy what has not changed.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import ConfigError
from moescale.data.documents import BadDocument, Document
from moescale.data.tokenizer import Tokenizer, with_boundaries
from moescale.files.reading import read_json

FORMAT = 4  # of the folder and of what stands around a document; a change renews every cache
LARGEST_LIST = 2**30  # bytes of a list of files
BLOCK_TOKENS = 2**15  # that share a checksum
MAX_KINDS, OTHER_KIND = 255, "other"  # all that come later are one kind, so that a byte holds their number
ARRAYS: dict[str, np.dtype] = {
    "starts": np.dtype(np.int64),  # of each document, its first token
    "texts": np.dtype(np.uint64),  # of each document, a hash of its text
    "text_bytes": np.dtype(np.uint32),  # of each document, the size of its text in UTF-8
    "kinds": np.dtype(np.uint8),  # of each document, a number in meta.json's `kinds`
    "blocks": np.dtype(np.uint32),  # of each block of tokens, its CRC-32
}


@dataclass(frozen=True)
class PackedFile:
    """What a pack holds of one source file.

    key: of its content and kind. digest: a hash of its tokens and the lengths of its documents. skipped: documents
    that could not be read. first_bad: the first of them.
    """

    key: str
    documents: int
    tokens: int
    digest: str
    skipped: int = 0
    first_bad: BadDocument | None = None


@dataclass(frozen=True, eq=False)
class Pack:
    """An open pack. The arrays are those of the folder; checked: [blocks] bool, whose checksum was found right."""

    directory: Path
    tokens: np.ndarray
    starts: np.ndarray
    texts: np.ndarray
    text_bytes: np.ndarray
    kinds: np.ndarray
    blocks: np.ndarray
    kind_names: tuple[str, ...]
    vocab_size: int
    options: str
    files: tuple[PackedFile, ...]
    checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checked", np.zeros(len(self.blocks), dtype=bool))

    def read(self, begin: int, end: int) -> np.ndarray:
        """Give the tokens from begin up to end; raises ConfigError when the disk has damaged them."""
        tokens = self.tokens[begin:end]
        if not self.is_sound(begin, end) or (len(tokens) and tokens.max() >= self.vocab_size):
            with contextlib.suppress(OSError):
                (self.directory / "meta.json").unlink()  # so that the next start writes it anew
            raise ConfigError(f"data.cache_dir: {self.directory} was damaged on the disk after it was written: start "
                              "again, its files are then tokenized anew")
        return tokens

    def is_sound(self, begin: int, end: int) -> bool:
        """Say whether the blocks of these tokens have the checksums that they were written with."""
        for block in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
            if not self.checked[block]:
                tokens = self.tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
                if zlib.crc32(tokens.data) != self.blocks[block]:
                    return False
                self.checked[block] = True
        return True

    def holds(self, number: int) -> bool:
        """Say whether the tokens of a source file are as they were written."""
        before = sum(file.tokens for file in self.files[:number])
        return self.is_sound(before, before + self.files[number].tokens)


def open_pack(directory: Path) -> Pack | None:
    """Open a pack; None when it is absent, or its sizes or the checksums of all but its tokens are not right."""
    try:
        stored = read_json(directory / "meta.json", LARGEST_LIST)
        meta = stored["meta"]
        if stored["crc32"] != zlib.crc32(_canonical(meta)):
            return None
        arrays = {name: _map(directory / f"{name}.bin", dtype, meta["lengths"][name])
                  for name, dtype in {"tokens": np.dtype(meta["dtype"]), **ARRAYS}.items()}
        if any(zlib.crc32(arrays[name].data) != meta["crc32"][name] for name in ARRAYS):
            return None
        files = tuple(PackedFile(**{**file, "first_bad": file["first_bad"] and BadDocument(**file["first_bad"])})
                      for file in meta["files"])
        return Pack(directory, **arrays, kind_names=tuple(meta["kinds"]), vocab_size=meta["vocab_size"],
                    options=meta["options"], files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    if path.stat().st_size != length * dtype.itemsize:  # a map that ends behind the file ends the process with a signal
        raise ValueError(f"{path} is damaged")
    if length == 0:
        return np.empty(0, dtype=dtype)  # nothing to map
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def block_checksums(tokens: np.ndarray) -> np.ndarray:
    """Give the checksum of each block of tokens."""
    blocks = (tokens[begin : begin + BLOCK_TOKENS] for begin in range(0, len(tokens), BLOCK_TOKENS))
    return np.array([zlib.crc32(block.data) for block in blocks], dtype=np.uint32)


def text_hash(content: bytes) -> int:
    """Hash a document's text, in UTF-8, to 64 bits; equal texts are held out or trained on together."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


# ---- writing


class PackWriter:
    """Writes a pack into a folder: `begin` a file, append its documents, and `finish` after the last one."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, options: str) -> None:
        self.directory, self.tokenizer, self.options = directory, tokenizer, options
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.files: list[dict[str, Any]] = []
        self.kinds: dict[str, int] = {}
        self.arrays: dict[str, array.array[int]] = {
            "starts": array.array("q"), "texts": array.array("Q"), "text_bytes": array.array("I"),
            "kinds": array.array("B")}
        self.num_tokens = 0
        self._tokens = open(directory / "tokens.bin", "wb")  # noqa: SIM115 - see close

    def begin(self, key: str) -> int:
        """Begin a source file. Returns its number, which its documents are appended with."""
        self.files.append({"key": key, "documents": 0, "tokens": 0, "skipped": 0, "first_bad": None})
        return len(self.files) - 1

    def skip(self, file: int, bad: BadDocument) -> None:
        """Count a document that could not be read."""
        self.files[file]["skipped"] += 1
        self.files[file]["first_bad"] = self.files[file]["first_bad"] or asdict(bad)

    def append(self, documents: Sequence[tuple[int, Document]]) -> None:
        """Tokenize documents and write them, each with the number of its file; files in the order they began in."""
        encoded = iter(self.tokenizer.encode_batch(
            [document.text for _, document in documents if document.ids is None]))
        for file, document in documents:
            ids = next(encoded) if document.ids is None else document.ids
            assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
            content = document.text.encode()
            tokens = with_boundaries(self.tokenizer, ids, self.dtype)
            self._write(file, tokens, text_hash(content), len(content), document.kind)

    def copy(self, file: int, pack: Pack, number: int) -> None:
        """Write the documents of the file `number` of another pack."""
        before = pack.files[:number]
        first, token = sum(other.documents for other in before), sum(other.tokens for other in before)
        ends = np.append(pack.starts, len(pack.tokens))
        for document in range(first, first + pack.files[number].documents):
            tokens = pack.read(token, int(ends[document + 1]))
            token += len(tokens)
            self._write(file, tokens, int(pack.texts[document]), int(pack.text_bytes[document]),
                        pack.kind_names[pack.kinds[document]])
        skipped, bad = pack.files[number].skipped, pack.files[number].first_bad
        self.files[file].update(skipped=skipped, first_bad=bad and asdict(bad))

    def _write(self, file: int, tokens: np.ndarray, text: int, text_bytes: int, kind: str) -> None:
        kind = kind if kind in self.kinds or len(self.kinds) < MAX_KINDS else OTHER_KIND
        values = (self.num_tokens, text, text_bytes, self.kinds.setdefault(kind, len(self.kinds)))
        for values_so_far, value in zip(self.arrays.values(), values, strict=True):
            values_so_far.append(value)
        self._tokens.write(tokens.data)
        self.num_tokens += len(tokens)
        self.files[file]["documents"] += 1
        self.files[file]["tokens"] += len(tokens)

    def finish(self) -> None:
        """Write everything but the tokens."""
        self._tokens.close()
        tokens = _map(self.directory / "tokens.bin", self.dtype, self.num_tokens)
        arrays = {name: np.asarray(values).astype(ARRAYS[name]) for name, values in self.arrays.items()}
        arrays["blocks"] = block_checksums(tokens)
        for name, values in arrays.items():
            (self.directory / f"{name}.bin").write_bytes(values.tobytes())
        lengths, document, token = np.diff(arrays["starts"], append=self.num_tokens), 0, 0
        for file in self.files:
            parts = lengths[document : document + file["documents"]], tokens[token : token + file["tokens"]]
            file["digest"] = hashlib.sha256(b"".join(hashlib.sha256(part.data).digest() for part in parts)).hexdigest()
            document, token = document + file["documents"], token + file["tokens"]
        meta = {"format": FORMAT, "options": self.options, "vocab_size": self.tokenizer.vocab_size,
                "dtype": self.dtype.name, "kinds": list(self.kinds), "files": self.files,
                "lengths": {"tokens": self.num_tokens, **{name: len(values) for name, values in arrays.items()}},
                "crc32": {name: zlib.crc32(values.data) for name, values in arrays.items()}}
        text = json.dumps({"crc32": zlib.crc32(_canonical(meta)), "meta": meta})
        (self.directory / "meta.json").write_text(text + "\n", encoding="utf-8")

    def close(self) -> None:
        self._tokens.close()


def _canonical(meta: Any) -> bytes:
    return json.dumps(meta, sort_keys=True).encode()
