"""The code speaks the words of its field: docs/glossary.md has them, and some old ones stay away."""

from __future__ import annotations

import ast
import builtins
import collections
import collections.abc
import contextlib
import dataclasses
import enum
import pathlib
import pickle
import re
import sys
import threading
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moescale"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
GLOSSARY = (PACKAGE.parent / "docs/glossary.md").read_text()
INSTEAD = {  # a pattern that no identifier may match: what to write
    r"serials?": "token_id, a token's number in the run",
    r"of_[a-z_]+": "grad_x, act_x, stride_x, ptr_x, or what it is",
    r"more": "accumulate",
    r"journeys?|set_out|arrive": "AsyncExchange.start and finish",
    r"(un)?widen(s|ed|ing)?|wide": "upcast for a dtype; gather for ranks",
    r"narrow(s|ed|ing)?": "downcast for a dtype; scatter for ranks",
    r"planes?": "moments",
    r"atoms?": "weights",
    r"twins?": "replicas",
    r"room|_room": "slots, space",
    r"walks?": "a task",
}
ALLOWED = {  # a file and an identifier
    ("checkpoint/index.py", "narrow"), ("data/corpus.py", "walk"),  # torch's and Python's own
}
TENSORS = ("ops/", "moe/", "comm/", "layers/", "mixers/")  # where of_x would be a tensor
STANDARD = {name for module in (builtins, collections, collections.abc, contextlib, dataclasses, enum, pathlib, pickle,
                                re, threading, typing) for name in dir(module)}


def identifiers(tree: ast.AST) -> Iterator[str]:
    """List the names that a file gives or uses."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_words_of_a_file(path: Path) -> None:
    file, tree = path.relative_to(PACKAGE).as_posix(), TREES[path]
    assert path.stem not in sys.stdlib_module_names, "a module of the standard library is called so"
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or "Nothing."
            assert not text.startswith("->"), f"{file}: begin with what it does: {text}"
        if isinstance(node, ast.ClassDef):
            known = node.name not in STANDARD or (file, node.name) in ALLOWED
            assert known, f"{file}: the standard library has a {node.name}"
    for name in set(identifiers(tree)):
        for pattern, instead in INSTEAD.items():
            found = re.fullmatch(pattern, name) and (not name.startswith("of_") or file.startswith(TENSORS))
            assert not found or (file, name) in ALLOWED, f"{file}: write {instead}, not {name}"


def test_glossary() -> None:
    lines = [line for line in GLOSSARY.splitlines() if line.startswith("- ")]
    order = [re.sub("[^a-z ]", "", line.partition(": ")[0].lower()).strip() for line in lines]
    assert order == sorted(order), "by the alphabet"
    assert all(": " in line for line in lines)
    for word in ("assignment", "row", "handle", "hop", "portion", "slot", "capacity", "owner", "own", "token_id",
                 "dispatch", "combine", "permute", "router", "mixer", "etp", "efsdp", "view", "cut", "piece"):
        assert any(re.search(rf"\b{word}\b", line.partition(": ")[0]) for line in lines), f"{word} has no line"
