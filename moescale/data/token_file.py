"""Tokens written once as memory-mapped files, keyed by what they were made of, and reused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moescale.config import ConfigError, DataConfig
from moescale.data.corpus import find_files, read_documents
from moescale.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
CHUNK = 4_000_000  # characters that are tokenized at a time
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class SplitCounts:
    num_tokens: int
    num_documents: int
    text_bytes: int


class TokenSplit:
    """One stream of documents, each beginning with the boundary token.

    text_bytes: of the text that the tokens stand for, in UTF-8.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, text_bytes: int) -> None:
        """tokens: [tokens], any integer dtype, may be memory-mapped. starts: [documents] int64, where each begins."""
        self._tokens, self._starts = tokens, starts
        self.num_tokens, self.num_documents, self.text_bytes = len(tokens), len(starts), text_bytes

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens and their positions, counted from the later of the document's and the window's start.

        -> tokens, positions: [length] int64
        """
        index = np.arange(start, start + length)
        document = self._starts[np.searchsorted(self._starts, index, side="right") - 1]
        return self._tokens[start : start + length].astype(np.int64), index - np.maximum(document, start)


@dataclass(frozen=True)
class TokenCorpus:
    train: TokenSplit
    held_out: TokenSplit


def prepare_tokens(config: DataConfig) -> TokenCorpus:
    """Tokenize the corpus unless that was done before. Several processes may call at once; one of them works.

    Raises ConfigError for files that cannot be read, an empty corpus, a cache that cannot be written.
    """
    files, tokenizer = find_files(config.files), load_tokenizer(config.tokenizer)
    cache = Path(config.cache_dir).expanduser()
    folder = cache / _key(files, tokenizer, config.held_out)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _write(folder, read_documents(files, skip_undecodable=not config.files), tokenizer, config.held_out)
    except OSError as error:
        raise ConfigError(f"tokens cannot be kept in {cache}: {error.strerror}: make room, "
                          "or write another data.cache_dir") from None
    counts = _read_counts(folder)
    return TokenCorpus(*(_open(folder, split, counts[split]) for split in SPLITS))


def _key(files: list[Path], tokenizer: Tokenizer, held_out: float) -> str:
    """Name the cache after everything that its tokens depend on."""
    digest = hashlib.sha256(f"{FORMAT}/{tokenizer.fingerprint}/{held_out}".encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path}/{stat.st_size}/{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, documents: Iterator[str], tokenizer: Tokenizer, held_out: float) -> None:
    """Write both splits beside their place, then rename."""
    beside = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".partial", dir=folder.parent))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        counts = _write_splits(beside, _split(documents, held_out), tokenizer, dtype)
        if not all(counts[split].num_tokens for split in SPLITS):
            raise ConfigError("data.files: the corpus is empty: give files with some text in them")
        meta = {"dtype": dtype.name, **{split: asdict(counts[split]) for split in SPLITS}}
        (beside / "meta.json").write_text(json.dumps(meta))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_splits(
    folder: Path, documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: np.dtype
) -> dict[str, SplitCounts]:
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    outputs = {split: (folder / f"{split}.tokens").open("wb") for split in SPLITS}
    try:
        for chunk in _chunks(documents):
            encoded = tokenizer.encode_batch([text for _, text in chunk])
            for (split, text), ids in zip(chunk, encoded, strict=True):
                outputs[split].write(np.concatenate(([tokenizer.boundary], ids)).astype(dtype).tobytes())
                lengths[split].append(len(ids) + 1)
                text_bytes[split] += len(text.encode("utf-8", errors="replace"))
    finally:
        for file in outputs.values():
            file.close()
    for split in SPLITS:
        np.save(folder / f"{split}.starts.npy", np.cumsum([0, *lengths[split]], dtype=np.int64)[:-1])
    return {split: SplitCounts(sum(lengths[split]), len(lengths[split]), text_bytes[split]) for split in SPLITS}


def _split(documents: Iterator[str], held_out: float) -> Iterator[tuple[str, str]]:
    """Assign each document to a split by its number alone; the first trains, the second is held out.

    A single document is cut: its end is held out.
    """
    first = next(documents, None)
    second = next(documents, None)
    if first is None:
        return
    if second is None:
        cut = int(len(first) * (1 - held_out))
        yield from ((split, part) for split, part in zip(SPLITS, (first[:cut], first[cut:]), strict=True) if part)
        return
    yield from zip(SPLITS, (first, second), strict=True)
    for number, document in enumerate(documents, 2):
        draw = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") / 2**64
        yield SPLITS[draw < held_out], document


def _chunks(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    size = 0
    for item in documents:
        chunk.append(item)
        size += len(item[1])
        if size > CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _read_counts(folder: Path) -> dict[str, SplitCounts]:
    meta = json.loads((folder / "meta.json").read_text())
    return {split: SplitCounts(**meta[split]) for split in SPLITS}


def _dtype(folder: Path) -> np.dtype:
    return np.dtype(json.loads((folder / "meta.json").read_text())["dtype"])


def _is_whole(folder: Path) -> bool:
    """Whether the files are as long as the counts say; anything else is written anew."""
    try:
        counts, item = _read_counts(folder), _dtype(folder).itemsize
        return all(
            (folder / f"{split}.tokens").stat().st_size == counts[split].num_tokens * item
            and len(np.load(folder / f"{split}.starts.npy", mmap_mode="r")) == counts[split].num_documents
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(folder: Path, split: str, counts: SplitCounts) -> TokenSplit:
    tokens = np.memmap(folder / f"{split}.tokens", dtype=_dtype(folder), mode="r")
    return TokenSplit(tokens, np.load(folder / f"{split}.starts.npy"), counts.text_bytes)
