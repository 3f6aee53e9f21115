"""Write a corpus once as memory-mapped token shards, and read windows of them.

A cache is a folder named by the hash of everything its tokens depend on. It is written beside its place and renamed
into it, so it is whole or absent, whoever is killed. `<split>-00000.bin` and following hold the tokens, one after the
other, `<split>-starts.bin` the documents' first tokens, `<split>-kinds.bin` a byte for each document's kind,
`meta.json` the counts and the names of the kinds.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moescale.config import ConfigError, DataConfig
from moescale.data.corpus import SPLITS, Corpus, Document, open_corpus, split_documents
from moescale.data.publish import lock, publish, remove_leftovers, temporary_beside
from moescale.data.tokenizer import Tokenizer, configured_tokenizer, with_boundaries

FORMAT = 3  # of the folder and of the split; a change renews every cache
SHARD_TOKENS = 2**28
MAX_KINDS, OTHER_KIND = 255, "other"  # all that come later are one kind, so that a byte holds their number
CHUNK_CHARACTERS = 2**22  # handed to the tokenizer at a time


@dataclass(frozen=True)
class TokenSplit:
    """A stream of tokens, document after document.

    shards: [tokens] each, in order. starts: [documents] int64, each document's beginning token.
    kinds: [documents] uint8, numbers in kind_names.
    text_bytes: of the UTF-8 text that the tokens stand for. vocab_size: of the tokenizer. directory: for errors.
    """

    shards: tuple[np.ndarray, ...]
    starts: np.ndarray
    text_bytes: int
    vocab_size: int
    directory: str
    kinds: np.ndarray
    kind_names: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens start, start + 1, ... and how far each is from its document's or the window's first token.

        -> tokens [length] int64, positions [length] int64
        """
        assert length >= 1
        assert 0 <= start <= self.num_tokens - length
        tokens = np.empty(length, dtype=np.int64)
        first = 0  # of this shard, in the stream
        for shard in self.shards:
            begin, end = max(start, first), min(start + length, first + len(shard))
            if begin < end:
                tokens[begin - start : end - start] = shard[begin - first : end - first]
            first += len(shard)
        self._refuse_damage("token", tokens, self.vocab_size)
        inside = self.starts[slice(*np.searchsorted(self.starts, (start, start + length)))] - start
        origin = np.zeros(length, dtype=np.int64)
        origin[inside] = inside
        return tokens, np.arange(length) - np.maximum.accumulate(origin)

    def kinds_of(self, start: int, length: int) -> list[str]:
        """-> which kind of document each of these tokens is from"""
        kinds = self.kinds[np.searchsorted(self.starts, np.arange(start, start + length), side="right") - 1]
        self._refuse_damage("kind", kinds, len(self.kind_names))
        return [self.kind_names[kind] for kind in kinds.tolist()]

    def _refuse_damage(self, what: str, numbers: np.ndarray, limit: int) -> None:
        if numbers.max() >= limit:
            raise ConfigError(f"data.cache_dir: {self.directory} holds the {what} {numbers.max()}, where {limit - 1} "
                              "is the last: the disk damaged it, so delete this folder and start again")


@dataclass(frozen=True)
class TokenCorpus:
    """A tokenized corpus.

    directory: where its shards are kept. fingerprint: a hash of the tokens and document starts of both splits, the
    same wherever the files lie.
    """

    train: TokenSplit
    held_out: TokenSplit
    directory: Path
    fingerprint: str


def prepare_tokens(config: DataConfig) -> TokenCorpus:
    """Give the tokens of the configured corpus, writing them to the cache when they are not there yet.

    Any number of processes may call this at once. Raises ConfigError for a corpus, a tokenizer or a cache that does
    not work.
    """
    tokenizer = configured_tokenizer(config)
    corpus = open_corpus(config.files)
    key = _cache_key(corpus, tokenizer, config.held_out)
    cache = Path(config.cache_dir).expanduser()
    for _ in range(10):  # a damaged cache may be replaced between two looks
        tokens = _load(cache / key)
        if tokens is not None:
            return tokens
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with lock(cache / f"{key}.lock") as alone:
                if _load(cache / key) is None:
                    if alone:
                        remove_leftovers(cache / key)
                    _write_cache(cache / key, corpus, tokenizer, config.held_out)
        except OSError as error:  # the corpus turns its own into ConfigError
            raise ConfigError(f"data.cache_dir={config.cache_dir}: cannot write tokens to {cache} "
                              f"({error.strerror or error}): make room there or name another directory") from None
    raise ConfigError(f"data.cache_dir={config.cache_dir}: {cache / key} cannot be read back after writing it: "
                      "name another directory")


def _cache_key(corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> str:
    files = [(file.path, file.size_bytes, file.modified_ns) for file in corpus.files]
    parts = (FORMAT, files, corpus.is_default, tokenizer.fingerprint, held_out)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


# ---- reading


def _load(directory: Path) -> TokenCorpus | None:
    """Open a cache; None when it is absent or its files are not as its counts say."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        train, held_out = (_load_split(directory, name, meta) for name in SPLITS)
        fingerprint = str(meta["corpus_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenCorpus(train, held_out, directory, fingerprint)


def _load_split(directory: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    counts = meta["splits"][name]
    shards = tuple(_map(directory / f"{name}-{index:05d}.bin", meta["dtype"], length)
                   for index, length in enumerate(counts["shard_tokens"]))
    starts = _map(directory / f"{name}-starts.bin", "int64", counts["documents"])
    kinds = _map(directory / f"{name}-kinds.bin", "uint8", counts["documents"])
    return TokenSplit(shards, starts, counts["text_bytes"], meta["vocab_size"], str(directory), kinds,
                      tuple(meta["kinds"]))


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged")
    if length == 0:
        return np.empty(0, dtype=dtype)  # nothing to map
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


# ---- writing


class _SplitWriter:
    """Append documents to the shards of one split."""

    def __init__(self, directory: Path, name: str, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.directory, self.name, self.tokenizer, self.dtype = directory, name, tokenizer, dtype
        self.shard_tokens: list[int] = []
        self.starts, self.kinds = array.array("q"), array.array("B")
        self.num_tokens = self.text_bytes = 0
        self.digest = hashlib.sha256()
        self._shard: BinaryIO | None = None

    def append(self, ids: np.ndarray, text_bytes: int, kind: int) -> None:
        assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
        document = with_boundaries(self.tokenizer, ids, self.dtype)
        self.digest.update(len(document).to_bytes(8, "little") + document.tobytes())
        self.starts.append(self.num_tokens)
        self.kinds.append(kind)
        self.num_tokens += len(document)
        self.text_bytes += text_bytes
        while len(document):
            if self._shard is None or self.shard_tokens[-1] == SHARD_TOKENS:
                self._next_shard()
            part, document = np.split(document, [SHARD_TOKENS - self.shard_tokens[-1]])
            assert self._shard is not None
            self._shard.write(part.data)
            self.shard_tokens[-1] += len(part)

    def _next_shard(self) -> None:
        self.close()
        self._shard = open(self.directory / f"{self.name}-{len(self.shard_tokens):05d}.bin", "wb")  # noqa: SIM115 - see close
        self.shard_tokens.append(0)

    def finish(self) -> dict[str, Any]:
        """Write the documents' starts and kinds. -> the counts for meta.json"""
        (self.directory / f"{self.name}-starts.bin").write_bytes(self.starts.tobytes())
        (self.directory / f"{self.name}-kinds.bin").write_bytes(self.kinds.tobytes())
        return {"shard_tokens": self.shard_tokens, "documents": len(self.starts), "text_bytes": self.text_bytes}

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()


def _write_cache(place: Path, corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> None:
    temporary = temporary_beside(place)
    temporary.mkdir()
    try:
        _write_tokens(temporary, corpus, tokenizer, held_out)
        publish(temporary, place, lambda: _load(place) is not None)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


def _write_tokens(directory: Path, corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {name: _SplitWriter(directory, name, tokenizer, dtype) for name in SPLITS}
    kinds: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        for chunk in _chunks(split_documents(corpus.documents(), held_out)):
            texts = [document.text for _, document in chunk]
            for (name, document), ids in zip(chunk, tokenizer.encode_batch(texts), strict=True):
                kind = document.kind if document.kind in kinds or len(kinds) < MAX_KINDS else OTHER_KIND
                writers[name].append(ids, len(document.text.encode()), kinds.setdefault(kind, len(kinds)))
    fingerprint = hashlib.sha256(b"".join(writers[name].digest.digest() for name in SPLITS)).hexdigest()
    meta = {"format": FORMAT, "corpus_fingerprint": fingerprint, "tokenizer": tokenizer.name,
            "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name,
            "files": len(corpus.files), "kinds": list(kinds),
            "splits": {name: writer.finish() for name, writer in writers.items()}}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _chunks(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    chunk: list[tuple[str, Document]] = []
    characters = 0
    for each in documents:
        chunk.append(each)
        characters += len(each[1].text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
