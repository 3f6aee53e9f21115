"""The house keeps its walls: who imports whom, and who may read the environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moescale"
MAY_IMPORT: dict[str, set[str]] = {  # besides `errors`
    "errors": set(), "files": set(), "spec": set(), "config": {"files", "spec"}, "comm": set(), "ops": {"comm"},
    "data": {"config", "files"}, "optim": {"comm", "config", "ops", "spec"}, "layers": {"comm", "ops", "spec"},
    "mixers": {"comm", "layers", "ops"}, "moe": {"comm", "layers", "ops", "spec"},
    "model": {"comm", "config", "layers", "mixers", "moe", "ops", "spec"},
    "parallel": {"cluster", "comm", "config", "layers", "mixers", "moe", "model", "ops", "planner",
                 "spec"},
    "checkpoint": {"config", "files"}, "cluster": {"checkpoint", "config", "files"},
    "convert": {"checkpoint", "config", "data", "files", "optim", "record", "spec"},
    "planner": {"config", "spec"}, "record": {"files"}, "report": {"config", "files", "planner", "record"},
    "monitor": {"config", "engine", "files", "moe", "planner", "record", "report"},
    "verify": {"checkpoint", "comm", "config", "convert", "data", "engine", "files", "model", "moe", "monitor",
               "optim", "parallel", "record", "spec"},
    "engine": {"checkpoint", "comm", "config", "convert", "data", "files", "layers", "model", "moe", "optim",
               "parallel", "spec"},
}
FREE = {"audit", "cli", "doctor", "trainer", "evaluate", "generate", "scoring", "resume", "rollback", "saving",
        "spikes", "start", "warm", "__init__", "__main__"}
FOREIGN = {"deepspeed", "megatron", "wandb", "wandb_workspaces", "transformers", "triton"}
ENVIRONMENT = {"cluster/launch.py", "parallel/ranks.py", "cli.py", "warm.py"}
AT_HOME = {"fcntl": "files/locks.py", "fsync": "files/writing.py"}  # a name and the one file that may say it
FOREIGN_ATTRIBUTES = {"sys.stdout", "self._backend.encode_special_tokens"}  # switches of others without a method
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_keeps_to_its_room(path: Path) -> None:
    tree, here = ast.parse(path.read_text()), room(path)
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "moescale" and here not in FREE:
            assert len(parts) > 1, "import from the room, not from the package"
            assert parts[1] in {here, "errors"} | MAY_IMPORT[here], f"{here} may not import {name}"
        if parts[0] in FOREIGN:
            allowed = path.stem == parts[0] or (parts[0] == "triton" and path.stem.endswith("_triton"))
            assert allowed, f"{parts[0]} belongs into a file named after it"
        assert not (here == "planner" and parts[0] == "torch"), "the planner runs without torch"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), "no global statement"
        name = str(getattr(node, "id", getattr(node, "attr", "")))
        assert path.as_posix().endswith(AT_HOME.get(name, "")), f"{name} belongs into {AT_HOME[name]}"
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
            assert path.relative_to(PACKAGE).as_posix() in ENVIRONMENT, "environment read elsewhere"


def pokes(scope: ast.AST, function: ast.FunctionDef | None = None) -> Iterator[tuple[int, str]]:
    """Find where an attribute of another object is set, or `forward` of one's own.

    Allowed are attributes of `self`, of what `cls(...)` made in the same function, and of the `ctx` of an autograd
    function.
    """
    owners = set()
    if function is not None:
        owners = {"self", "ctx"} & {argument.arg for argument in function.args.args[:1]}
        for node in function.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("cls("):
                owners |= {ast.unparse(target) for target in node.targets}
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) not in owners or node.attr == "forward":
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and re.match(r".*\bsetattr\(|.*__setattr__\((?!self,)", ast.unparse(node)):
            yield node.lineno, ast.unparse(node)
        yield from pokes(node, node if isinstance(node, ast.FunctionDef) else function)


def test_attributes_are_set_by_their_own_object() -> None:
    found = [(f"{path.relative_to(PACKAGE).as_posix()}:{line}: sets {poke}", poke)
             for path in FILES for line, poke in pokes(ast.parse(path.read_text()))]
    assert not [where for where, poke in found if poke not in FOREIGN_ATTRIBUTES], "give the object a method for it"


@pytest.mark.parametrize("line", [
    "router.look = look", "scope.counted += own", "model.head: Linear = head", "setattr(joined, name, part)",
    "self.statistics.watching = True", "self.forward = again", "for layer.chunks in range(3): pass",
    "with checkpoint() as block.state: pass", "a, (b, layer.budget) = parts",
])
def test_setting_what_belongs_to_another_object_is_found(line: str) -> None:
    assert list(pokes(ast.parse(f"def attach(self):\n    {line}")))
    assert not list(pokes(ast.parse("def attach(self):\n    self.chunks, self.budget = parts")))


def test_every_room_is_known_and_imports_only_run_downhill() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError
    assert {room(path) for path in FILES} == set(MAY_IMPORT) | FREE
    assert not {path.name for path in PACKAGE.rglob("*")} & {"utils", "common", "helpers", "core", "misc"}


def test_nobody_looks_behind_an_engine() -> None:
    base = ast.parse((PACKAGE / "engine/base.py").read_text())
    (protocol,) = (node for node in base.body if isinstance(node, ast.ClassDef) and node.name == "Engine")
    shown = {node.name for node in protocol.body if isinstance(node, ast.FunctionDef)}
    found = []
    for path in (path for path in FILES if room(path) != "engine"):
        tree = ast.parse(path.read_text())
        found += [f"{path}: imports {name}" for name in imports(tree)
                  if name.startswith("moescale.engine") and name != "moescale.engine.base"]
        found += [f"{path}:{node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and node.attr not in shown
                  and getattr(node.value, "id", getattr(node.value, "attr", None)) == "engine"]
    assert not found


def test_no_test_reaches_into_another_or_into_private_names() -> None:
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"moescale", "tests"}:
                where = f"{path.name}, line {node.lineno}"
                assert ".test_" not in f".{node.module}", f"{where}: what tests share lies in tests/support"
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{where}: {private} is another file's own"


def test_import_needs_torch_alone() -> None:
    code = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "yaml", "typer", "rich", "tokenizers", "wandb", "transformers", "triton"}:
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
import moescale
assert callable(moescale.load)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
