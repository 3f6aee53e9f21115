"""Give a corpus as two streams of tokens, one to train on and one held out, tokenizing what has not been before.

Files are tokenized whole into packs, and a document is held out or not by a hash of its text, which the pack keeps: a
split is a list of runs of consecutive documents, and another share or another set of files tokenizes nothing again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moescale.config import ConfigError, DataConfig
from moescale.data.blend import Blend
from moescale.data.cache import CHECKED_AT_START_BYTES, TokenCache, content_hash
from moescale.data.corpus import Corpus, open_corpus
from moescale.data.documents import (
    BLOCK_BYTES,
    LINE_SUFFIXES,
    BadDocument,
    Document,
    SourceFile,
    read_documents,
)
from moescale.data.indexed import read_indexed
from moescale.data.pack import FORMAT, Pack, PackWriter
from moescale.data.progress import Reading, reading
from moescale.data.split import TokenSplit, held_out_documents
from moescale.data.tokenizer import Tokenizer, configured_tokenizer
from moescale.files.publish import publish, remove_leftovers, temporary_folder

PACK_BYTES = 2**24  # of source files that share a pack; a file that is as large has its own
CHUNK_CHARACTERS = 2**22  # handed to the tokenizer at a time


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """A tokenized corpus.

    train: all that is trained on. blend: the same, as data.weights takes from it. fingerprint: a hash of the tokens and
    document starts of both splits, and of the blend, the same wherever the files lie. notes: lines for the user, on
    documents that were left out. is_default: it is the running Python's library. cache: which holds on to the packs.
    """

    train: TokenSplit
    blend: Blend | None
    held_out: TokenSplit
    fingerprint: str
    notes: tuple[str, ...]
    is_default: bool
    cache: TokenCache


@dataclass(frozen=True)
class _Recipe:
    """A pack to be: its files, the key of each, and the pack's own. cut: the share that is cut off each document."""

    files: tuple[SourceFile, ...]
    keys: tuple[str, ...]
    key: str
    corpus: Corpus
    cut: float | None = None


def prepare_tokens(config: DataConfig) -> TokenCorpus:
    """Give the tokens of the configured corpus, writing them to the cache when they are not there yet.

    Any number of processes may call this at once. Raises ConfigError for a corpus, a tokenizer or a cache that does
    not work.
    """
    tokenizer = configured_tokenizer(config)
    entries = [(entry,) for entry in config.files] if config.weights else [config.files]
    corpora = [open_corpus(entry, config.text_field, config.bad_documents) for entry in entries]
    if config.held_out_files:
        corpora.append(open_corpus(config.held_out_files, config.text_field, config.bad_documents,
                                   "data.held_out_files"))
    options = _hash(FORMAT, tokenizer.fingerprint, tokenizer.vocab_size, config.text_field)
    patterns = [[os.path.abspath(os.path.expanduser(path)) for path in paths]
                for paths in (config.files, config.held_out_files)]
    cache = TokenCache(Path(config.cache_dir).expanduser(), _hash(patterns, options)[:20])
    _refuse_binary(corpora)
    hashes = cache.content_hashes([file for corpus in corpora for file in corpus.files])
    recipes = [_plan(corpus, hashes, options) for corpus in corpora]
    # a corpus of one text has a pack in which each document is cut in two
    keys = tuple(key for recipe in recipes[0] for key in recipe.keys)
    halves = _Recipe(corpora[0].files, keys, _hash(options, keys, config.held_out), corpora[0], config.held_out)
    cache.claim([recipe.key for recipe in (*itertools.chain(*recipes), halves)])
    try:
        packs = [_obtain(cache, some, tokenizer, options) for some in recipes]
        if len(packs) == 1 and _is_one_text(packs[0]):
            packs, recipes = [_obtain(cache, [halves], tokenizer, options)], [[halves]]
    except OSError as error:  # the corpus turns its own into ConfigError
        raise ConfigError(f"data.cache_dir={config.cache_dir}: cannot write tokens to {cache.directory} "
                          f"({error.strerror or error}): make room there or name another directory") from None
    return _corpus(cache, packs, recipes, config)


def _refuse_binary(corpora: Sequence[Corpus]) -> None:
    """Refuse large files that begin with what is no text before anything reads all of them."""
    for corpus in corpora:
        for file in corpus.files:
            if file.suffix in LINE_SUFFIXES and not file.compression and file.size_bytes > PACK_BYTES:
                with file.readable_errors(), open(file.path, "rb") as source:
                    before, zero, _ = source.read(BLOCK_BYTES).partition(b"\0")
                if zero:
                    corpus.refuse(file, BadDocument(f"line {before.count(10) + 1}", "is not UTF-8 text",
                                                    "convert it, leave it out"))


def _plan(corpus: Corpus, hashes: dict[str, str], options: str) -> list[_Recipe]:
    """Share files out over packs, in order."""
    recipes: list[_Recipe] = []
    some: list[SourceFile] = []
    size = 0
    for file in (*corpus.files, None):
        if some and (file is None or size + file.size_bytes > PACK_BYTES):
            keys = tuple(hashes[other.path] + other.kind for other in some)
            recipes.append(_Recipe(tuple(some), keys, _hash(options, keys), corpus))
            some, size = [], 0
        if file is not None:
            some.append(file)
            size += file.size_bytes
    return recipes


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _is_one_text(packs: Sequence[Pack]) -> bool:
    """Say whether all documents have the same text."""
    texts = [pack.texts for pack in packs if len(pack.texts)]
    return bool(texts) and all(bool((part == texts[0][0]).all()) for part in texts)


# ---- writing


def _obtain(cache: TokenCache, recipes: Sequence[_Recipe], tokenizer: Tokenizer, options: str) -> list[Pack]:
    """Open packs, writing those that are not there."""
    for _ in range(10):  # a damaged pack may be replaced between two looks
        packs = _open(cache, recipes)
        if None not in packs:
            return [pack for pack in packs if pack is not None]
        with cache.building():
            missing = [recipe for recipe, pack in zip(recipes, _open(cache, recipes), strict=True) if pack is None]
            if missing:
                others = cache.files_of_other_packs(options)
                with reading("tokenizing", sum(file.size_bytes for one in missing for file in one.files)) as shown:
                    done = 0
                    for recipe in missing:
                        _write_pack(cache, recipe, tokenizer, options, others, shown, done)
                        done += sum(file.size_bytes for file in recipe.files)
                cache.clean()
    raise ConfigError(f"data.cache_dir={cache.directory} cannot be read back after writing it: name another directory")


def _open(cache: TokenCache, recipes: Sequence[_Recipe]) -> list[Pack | None]:
    packs, left = [], CHECKED_AT_START_BYTES
    for recipe in recipes:
        pack = cache.open(recipe.key, left)
        packs.append(pack)
        left -= 0 if pack is None else min(pack.tokens.nbytes, left)
    return packs


def _write_pack(
    cache: TokenCache, recipe: _Recipe, tokenizer: Tokenizer, options: str, others: dict[str, tuple[Pack, int]],
    shown: Reading, done_bytes: int,
) -> None:
    folder = cache.packs / recipe.key
    remove_leftovers(folder)
    with temporary_folder(folder) as temporary:
        writer = PackWriter(temporary, tokenizer, options if recipe.cut is None else f"{options} cut")
        try:
            chunk = _Chunk(writer)
            for file, key in zip(recipe.files, recipe.keys, strict=True):
                number = writer.begin(key)
                known = others.get(key) if recipe.cut is None else None
                if known is None or not known[0].holds(known[1]):
                    _read_file(recipe, file, number, chunk, functools.partial(shown.advance, done_bytes, file.path))
                    if content_hash(file) + file.kind != key:
                        raise file.error(" was changed while it was read: start again when it is complete")
                else:
                    chunk.write()
                    writer.copy(number, *known)
                done_bytes += file.size_bytes
            chunk.write()
            writer.finish()
        finally:
            writer.close()
        publish(temporary, folder, lambda: cache.open(recipe.key, CHECKED_AT_START_BYTES) is not None)


class _Chunk:
    """Documents to be tokenized together."""

    def __init__(self, writer: PackWriter) -> None:
        self.writer, self.documents, self.characters = writer, list[tuple[int, Document]](), 0

    def add(self, file: int, document: Document) -> None:
        self.documents.append((file, document))
        self.characters += len(document.text)
        if self.characters >= CHUNK_CHARACTERS:
            self.write()

    def write(self) -> None:
        self.writer.append(self.documents)
        self.documents, self.characters = [], 0


def _read_file(
    recipe: _Recipe, file: SourceFile, number: int, chunk: _Chunk, position: Callable[[int], None]
) -> None:
    documents = (read_documents(file, recipe.corpus.text_field, position) if file.index is None
                 else read_indexed(file, chunk.writer.tokenizer, position))
    for each in documents:
        if isinstance(each, BadDocument):
            recipe.corpus.refuse(file, each)
            chunk.writer.skip(number, each)
        else:
            for document in _halves(each, recipe.cut):
                chunk.add(number, document)


def _halves(document: Document, cut: float | None) -> Iterable[Document]:
    """Cut a document's text in two, the second part being the share `cut`; None leaves it whole."""
    text = document.text
    if cut is None:
        return (document,)
    end = max(1, min(len(text) - 1, len(text) - round(len(text) * cut)))
    return replace(document, text=text[:end], ids=None), replace(document, text=text[end:], ids=None)


# ---- splitting


def _corpus(
    cache: TokenCache, packs: Sequence[Sequence[Pack]], recipes: Sequence[Sequence[_Recipe]], config: DataConfig
) -> TokenCorpus:
    """Part the documents into those to train on and those held out.

    packs, recipes: of each entry of a blend, or of all files; then those of data.held_out_files, if there are some.
    """
    notes = []
    for some, written in zip(packs, recipes, strict=True):
        notes += _find_bad(some, written)
        if not any(len(pack.starts) for pack in some):
            raise ConfigError("; ".join([str(written[0].corpus.empty()), *notes]))
    entries = packs[: max(1, len(config.weights))]
    files = [pack for entry in entries for pack in entry]
    texts = [pack.texts for pack in files]
    if config.held_out_files:
        held_out = TokenSplit.of(packs[-1], [np.ones(len(pack.texts), dtype=bool) for pack in packs[-1]])
        left_out = [np.isin(part, np.concatenate([pack.texts for pack in packs[-1]])) for part in texts]
        count = sum(int(part.sum()) for part in left_out)
        if count:
            notes.append(f"{count:,} documents of data.files are not trained on: data.held_out_files has their texts")
    else:
        if recipes[0][0].cut is None:
            left_out = held_out_documents(texts, config.held_out)
        else:
            left_out = [np.arange(len(part)) % 2 == 1 for part in texts]
        held_out = TokenSplit.of(files, left_out)
    trained = [~part for part in left_out]
    train = TokenSplit.of(files, trained)
    fingerprint, blend = _hash(train.fingerprint(), held_out.fingerprint()), None
    if config.weights:
        blend = _blend(config, entries, trained)
        notes += [f"data.weights takes {share:.3%} of the sequences from {name}: {part.num_tokens:,} tokens of "
                  f"{part.num_documents:,} documents"
                  for share, name, part in zip(blend.shares, blend.names, blend.parts, strict=True)]
        fingerprint = _hash(fingerprint, [part.fingerprint() for part in blend.parts], blend.shares)
    return TokenCorpus(train, blend, held_out, fingerprint, tuple(notes), recipes[0][0].corpus.is_default, cache)


def _blend(config: DataConfig, entries: Sequence[Sequence[Pack]], trained: Sequence[np.ndarray]) -> Blend:
    """Make a stream of each entry's documents to train on. trained: of each pack of all entries, [documents] bool"""
    masks = iter(trained)
    parts = tuple(TokenSplit.of(entry, [next(masks) for _ in entry]) for entry in entries)
    return Blend(parts, config.files, config.weights)


def _find_bad(packs: Sequence[Pack], recipes: Sequence[_Recipe]) -> list[str]:
    """Refuse documents that could not be read, or say how many there are."""
    count, first = 0, ""
    for pack, recipe in zip(packs, recipes, strict=True):
        for file, packed in zip(recipe.files, pack.files, strict=True):
            if packed.first_bad is not None and not recipe.corpus.is_default:
                recipe.corpus.refuse(file, packed.first_bad)
                count += packed.skipped
                first = first or " ".join(f"{file.path} {packed.first_bad.where} {packed.first_bad.fault}".split())
    return [f"{count:,} documents could not be read and are left out, the first: {first}"] if count else []
