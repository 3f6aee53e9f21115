"""What experts have in common: the kinds of text they get, the tokens that follow each other, the pairs they form."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import numpy as np

from moescale.record.held_out import HeldOutRouting

CLASSES = ("identifier", "keyword", "number", "white space", "punctuation", "other")
TOKEN = re.compile(r"(?P<word>[^\W\d]\w*)|(?P<number>\d[\w.]*)|(?P<space>\s+)|(?P<other>.)", re.DOTALL)


def content_classes(routing: HeldOutRouting) -> np.ndarray:
    """Say what each token is part of, by its first character that is not a space. -> [tokens] int, -1 = padding

    Numbers count in CLASSES. Keywords are Python's.
    """
    classes = np.full(len(routing.pieces), -1)
    for begin in range(0, len(routing.pieces), routing.seq_len):
        pieces = [str(piece) for piece in routing.pieces[begin : begin + routing.seq_len]]
        of_characters = [kind for match in TOKEN.finditer("".join(pieces)) for kind in [_kind(match)] * len(match[0])]
        first_letter = 0
        for index, piece in enumerate(pieces):
            if routing.kinds[begin + index] and of_characters:
                blank = min(len(piece) - 1, len(piece) - len(piece.lstrip())) if piece else 0
                letter = first_letter + blank
                classes[begin + index] = of_characters[min(letter, len(of_characters) - 1)]  # part of the one to come
            first_letter += len(piece)
    return classes


def _kind(match: re.Match[str]) -> int:
    text = match[0]
    if match.lastgroup == "word":
        return 1 if keyword.iskeyword(text) else 0
    if match.lastgroup == "other":
        return 4 if text.isascii() else 5
    return 2 if match.lastgroup == "number" else 3


def file_kinds(routing: HeldOutRouting) -> tuple[list[str], np.ndarray]:
    """List the kinds of file, those of most tokens first, and of which each token is, [tokens] int, -1 = padding."""
    names, tokens = np.unique(routing.kinds[routing.kinds != ""], return_counts=True)
    ordered = names[np.argsort(-tokens, kind="stable")].tolist()
    numbers = {name: number for number, name in enumerate(ordered)}
    return ordered, np.array([numbers.get(kind, -1) for kind in routing.kinds.tolist()])


def preference(routing: HeldOutRouting, kinds: np.ndarray, num_kinds: int, num_experts: int) -> np.ndarray:
    """Compute each expert's share of the rows of a kind of token, over an even share. [layers, kinds, experts]"""
    result = np.zeros((len(routing.layers), num_kinds, num_experts))
    for kind in range(num_kinds):
        counts = _counts(routing.expert[:, kinds == kind], num_experts)
        result[:, kind] = counts * num_experts / np.maximum(counts.sum(1, keepdims=True), 1)
    return result


def pair_preference(routing: HeldOutRouting, num_experts: int) -> np.ndarray:
    """Count how often two experts share a token, over what their loads alone would give. [layers, experts, experts]"""
    result = np.ones((len(routing.layers), num_experts, num_experts))
    for layer, expert in enumerate(routing.expert):
        chosen = np.zeros((len(expert), num_experts + 1))  # the last one takes what is none
        np.put_along_axis(chosen, expert.astype(int), 1, axis=1)
        pairs = chosen[:, :-1].T @ chosen[:, :-1]
        load = pairs.diagonal()
        by_load = np.outer(load, load)
        for matrix in (pairs, by_load):
            np.fill_diagonal(matrix, 0)
        if pairs.sum():
            result[layer] = pairs * by_load.sum() / pairs.sum() / np.maximum(by_load, 1)
            np.fill_diagonal(result[layer], 1)
    return result


@dataclass(frozen=True)
class Repetition:
    """Shares of consecutive tokens, each beside that of tokens in random order (Mixtral of Experts, table 5).

    first: of those with the same first expert. either: of those with an expert in common.
    """

    first: float
    either: float
    first_by_chance: float
    either_by_chance: float


def repetition(routing: HeldOutRouting) -> list[Repetition]:
    """Compare neighbours in each layer, within sequences; chance is the same tokens in a random order."""
    valid = routing.kinds != ""
    follows = valid[1:] & valid[:-1] & (np.arange(1, len(valid)) % routing.seq_len != 0)
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(valid))
    return [Repetition(*_alike(expert[:-1][follows], expert[1:][follows]),
                       *_alike(expert[shuffled[:-1]], expert[shuffled[1:]]))
            for expert in routing.expert]


def _alike(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Compute the shares of pairs with the same first expert, and with one in common. ours, theirs: [pairs, top_k]"""
    if not len(ours):
        return 0.0, 0.0
    common = ((ours[:, :, None] == theirs[:, None]) & (ours >= 0)[:, :, None]).any((1, 2))
    return float(((ours[:, 0] == theirs[:, 0]) & (ours[:, 0] >= 0)).mean()), float(common.mean())


def _counts(expert: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the tokens of each expert. expert: [layers, tokens, top_k]. Returns [layers, experts] int64."""
    return np.stack([np.bincount(each[each >= 0], minlength=num_experts) for each in expert])
