"""Which documents are trained on and which are held out, and both as streams of tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moescale.data.pack import Pack


def held_out_documents(texts: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """Choose the documents to hold out, by the hashes of their texts alone.

    So a document stays where it is whatever else comes or goes, and equal texts stay together. Where one split would be
    empty it gets the text with the lowest or the highest hash. texts: [documents] uint64 each. Returns [documents] bool
    each.
    """
    limit = np.uint64(int(share * 2**64))
    chosen = [part < limit for part in texts]
    filled = [part for part in texts if len(part)]
    if not any(part.any() for part in chosen):
        lowest = min(part.min() for part in filled)
        chosen = [part == lowest for part in texts]
    elif all(part.all() for part in chosen):
        highest = max(part.max() for part in filled)
        chosen = [part != highest for part in texts]
    return chosen


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """A stream of tokens, document after document, that lies in runs of consecutive documents of packs.

    pack: [runs], which one. begin: [runs], a run's first token there. first: [runs + 1], its first token in this
    stream; the last entry is the stream's length. text_bytes: of the UTF-8 text that the tokens stand for.
    """

    packs: tuple[Pack, ...]
    pack: np.ndarray
    begin: np.ndarray
    first: np.ndarray
    num_documents: int
    text_bytes: int

    @classmethod
    def of(cls, packs: Sequence[Pack], chosen: Sequence[np.ndarray]) -> TokenSplit:
        """Give the stream of some documents of packs, in order. chosen: of each pack, [documents] bool."""
        which, begins, ends = [], [], []
        for number, (pack, mask) in enumerate(zip(packs, chosen, strict=True)):
            edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
            bounds = np.append(pack.starts, len(pack.tokens))
            begins.append(bounds[np.flatnonzero(edges == 1)])
            ends.append(bounds[np.flatnonzero(edges == -1)])
            which.append(np.full(len(begins[-1]), number))
        begin = np.concatenate(begins)
        first = np.concatenate([[0], np.cumsum(np.concatenate(ends) - begin)])
        return cls(tuple(packs), np.concatenate(which), begin, first,
                   sum(int(mask.sum()) for mask in chosen),
                   sum(int(pack.text_bytes[mask].sum()) for pack, mask in zip(packs, chosen, strict=True)))

    def fingerprint(self) -> str:
        """Hash the tokens and document starts, however they are shared out over packs."""
        files = [file.digest for pack in self.packs for file in pack.files if file.documents]
        before = np.cumsum([0, *(len(pack.tokens) for pack in self.packs)])
        begin = self.begin + before[self.pack]
        end = begin + np.diff(self.first)
        joined = begin[1:] == end[:-1]  # a run that only the end of a pack had parted
        runs = np.stack([begin[np.append(True, ~joined)], end[np.append(~joined, True)]]) if len(begin) else begin
        return hashlib.sha256(json.dumps(files).encode() + runs.astype("<i8").tobytes()).hexdigest()

    @property
    def num_tokens(self) -> int:
        return int(self.first[-1])

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss in nats per token of this text to bits per byte of it."""
        return loss * self.num_tokens / self.text_bytes / math.log(2)

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens start, start + 1, ... and how far each is from its document's or the window's first token.

        Returns tokens [length] int64 and positions [length] int64.
        """
        tokens, origin = np.empty(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        for pack, begin, end, offset in self._parts(start, length):
            tokens[offset : offset + end - begin] = pack.read(begin, end)
            inside = pack.starts[slice(*np.searchsorted(pack.starts, (begin, end)))] - begin + offset
            origin[inside] = inside
        return tokens, np.arange(length) - np.maximum.accumulate(origin)

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, with those that begin and end it."""
        for number, begin, end in zip(self.pack, self.begin, self.begin + np.diff(self.first), strict=True):
            pack = self.packs[number]
            starts = pack.starts[slice(*np.searchsorted(pack.starts, (begin, end)))]
            for first, last in pairwise([*starts.tolist(), int(end)]):
                yield pack.read(first, last)

    def kinds_of(self, start: int, length: int) -> list[str]:
        """Say which kind of document each of these tokens is from."""
        names: list[str] = []
        for pack, begin, end, _ in self._parts(start, length):
            documents = np.searchsorted(pack.starts, np.arange(begin, end), side="right") - 1
            names += [pack.kind_names[kind] for kind in pack.kinds[documents].tolist()]
        return names

    def _parts(self, start: int, length: int) -> Iterator[tuple[Pack, int, int, int]]:
        """Yield where a part of the stream lies: pack, first token there, end there, place in the part."""
        assert length >= 1
        assert 0 <= start <= self.num_tokens - length
        run = int(np.searchsorted(self.first, start, side="right")) - 1
        offset = 0
        while offset < length:
            skipped = start + offset - int(self.first[run])
            count = min(int(self.first[run + 1] - self.first[run]) - skipped, length - offset)
            begin = int(self.begin[run]) + skipped
            yield self.packs[self.pack[run]], begin, begin + count, offset
            offset, run = offset + count, run + 1
