"""Pickles read into plain values: nothing that a pickle names is imported, called or built.

A pickle is a list of instructions that build objects. They are followed here with stand-ins: numbers, texts, lists,
tuples and dicts are themselves, sets become lists, an object becomes a `Record` and a bare name of a class or function
a `Name`. What comes out is a tree: nothing holds itself, and its depth and size are bounded, so that whoever walks,
compares or prints it ends soon.
"""

from __future__ import annotations

import gc
import pickletools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 1 << 28  # of a pickle, and of what its instructions copy
MOST_STEPS = 120_000_000  # instructions: an index takes 107 for each part of a tensor
DEEPEST = 200  # levels
OPEN = 0  # the size of a value that is being looked at
MOST_GROWTH = 20  # how much larger than the pickle its values may be, written out
LARGEST_KEY, LARGEST_NUMBER = 1 << 63, 1 << 127
HARMLESS_MODULES = {  # of Python's own: those whose objects are data
    "_codecs", "argparse", "array", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "io", "pathlib", "signal", "types", "typing", "uuid",
}
HARMLESS_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object", "range",
    "set", "slice", "str", "tuple", "type",
}
OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of Python 2


class PlainPickleError(ValueError):
    """A pickle that is damaged, or asks for what no checkpoint needs; the message goes on from "it ..."."""


@dataclass(frozen=True)
class Name:
    """A class or a function that a pickle mentions: `module.name`."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of a pickle, of whatever class.

    name: of its class, or of the function that makes it. args: what that was given. state: its attributes, most often
    a dict. items, values: what it holds where it is a kind of dict or list.
    """

    name: str
    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]
    values: list[Any]

    def set_state(self, state: Any) -> None:
        """Give it attributes, as the pickle says."""
        self.state = state

    def attributes(self) -> dict[str, Any]:
        """List its attributes by name; none where its state is no dict."""
        return {key: value for key, value in self.state.items() if isinstance(key, str)} \
            if isinstance(self.state, dict) else {}


def read_plain(
    data: bytes, calls: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None, *, tree: bool = True,
) -> Any:
    """Read a pickle.

    calls: functions to call where the pickle asks for one of these names, with what the pickle gives: they must stand
    anything. persistent: what stands for an object kept outside the pickle, by its id. tree: hold the values to
    what the top of this file says of them, at nearly the cost of reading them; False where the caller looks at known
    places alone, and bounds how often. Raises PlainPickleError, and what these functions raise.
    """
    if len(data) > MOST_BYTES:
        raise PlainPickleError(f"has more than {MOST_BYTES:,} bytes")
    machine = _Machine(calls or {}, persistent)
    collects = gc.isenabled()
    gc.disable()  # it would look through all that was read so far, again and again
    try:
        value = machine.run(data)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise PlainPickleError("holds instructions that make no sense") from None
    except PlainPickleError:
        raise
    except ValueError as error:
        if type(error) is ValueError or isinstance(error, UnicodeError):
            raise PlainPickleError("holds instructions that make no sense") from None
        raise
    finally:
        if collects:
            gc.enable()
    if tree:
        _bound(value, 10_000_000 + MOST_GROWTH * len(data))
    return value


class _Machine:
    """Follows a pickle's instructions."""

    def __init__(self, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lies below each mark
        self.memo: dict[int, Any] = {}
        self.left = MOST_BYTES  # that may still be copied
        self.persistent = persistent
        self.calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._dict, "collections.defaultdict": lambda *args: {},
            "torch.Size": self._copied, "_codecs.encode": self._bytes,
            "copyreg._reconstructor": lambda made, *_: _record(made.name, ()),
            **{f"builtins.{name}": self._listed for name in ("set", "frozenset")}, **calls,
        }

    def run(self, data: bytes) -> Any:
        steps = {name.removeprefix("_do_"): getattr(self, name) for name in dir(self) if name.startswith("_do_")}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MOST_STEPS:
                raise PlainPickleError(f"has more than {MOST_STEPS:,} instructions")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in PUSHED:
                if isinstance(argument, int) and abs(argument) >= LARGEST_NUMBER:
                    raise PlainPickleError("holds a number that no checkpoint needs")
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name not in IGNORED:
                step = steps.get(name)
                if step is None:
                    raise PlainPickleError(f"uses {name}, which no checkpoint needs")
                step(argument)
        raise PlainPickleError("has no end")

    # Marks, the memo, and what only moves the stack

    def _do_MARK(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        """Take what was put onto the stack since the last mark."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def _do_POP(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._marked()

    def _do_POP_MARK(self, _: Any) -> None:
        self._marked()

    def _do_DUP(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _do_MEMOIZE(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self, index: int) -> None:
        self.memo[int(index)] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[int(index)])

    _do_PUT = _do_BINPUT = _do_LONG_BINPUT = _put
    _do_GET = _do_BINGET = _do_LONG_BINGET = _get

    # Containers

    def _do_TUPLE(self, _: Any) -> None:
        found = self._marked()
        self.stack.append(tuple(found))

    def _do_LIST(self, _: Any) -> None:
        found = self._marked()
        self.stack.append(found)

    _do_FROZENSET = _do_LIST

    def _do_DICT(self, _: Any) -> None:
        found = self._marked()
        self.stack.append({})
        self._set(found)

    def _last(self, count: int) -> None:
        found = tuple(self.stack[-count:])
        if len(found) != count:
            raise PlainPickleError("holds instructions that make no sense")
        self.stack[-count:] = [found]

    def _do_TUPLE1(self, _: Any) -> None:
        self._last(1)

    def _do_TUPLE2(self, _: Any) -> None:
        self._last(2)

    def _do_TUPLE3(self, _: Any) -> None:
        self._last(3)

    def _do_APPEND(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _do_APPENDS(self, _: Any) -> None:
        self._extend(self._marked())

    _do_ADDITEMS = _do_APPENDS

    def _extend(self, items: Iterable[Any]) -> None:
        goal = self.stack[-1]
        (goal.values if isinstance(goal, Record) else goal).extend(items)

    def _do_SETITEM(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _do_SETITEMS(self, _: Any) -> None:
        self._set(self._marked())

    def _set(self, pairs: list[Any]) -> None:
        goal = self.stack[-1]
        goal = goal.items if isinstance(goal, Record) else goal
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            goal[_key(key)] = value

    # Names and objects

    def _do_GLOBAL(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _do_STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 1000:
            raise PlainPickleError("names what is no name")
        module = OLD_NAMES.get(module, module)
        top = module.partition(".")[0]
        known = name in HARMLESS_BUILTINS if module == "builtins" else top in HARMLESS_MODULES
        if top in sys.stdlib_module_names and not known:
            raise PlainPickleError(f"asks for {module}.{name}, which no checkpoint needs: it was not loaded")
        self.stack.append(Name(f"{module}.{name}"))

    def _do_NEWOBJ(self, _: Any) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        self.stack.append(_record(made.name, args))

    def _do_NEWOBJ_EX(self, _: Any) -> None:
        keywords, args, made = self.stack.pop(), self.stack.pop(), self.stack.pop()
        found = _record(made.name, args)
        self.stack.append(found)
        self._set([part for pair in keywords.items() for part in pair])

    def _do_REDUCE(self, _: Any) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        call = self.calls.get(made.name)
        self.stack.append(_record(made.name, args) if call is None else call(*args))

    def _do_BUILD(self, _: Any) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Record):
            made.set_state(state)
        elif isinstance(made, (Name, str, int, float)) or made is None:
            raise PlainPickleError("sets attributes of what has none")

    def _do_BINPERSID(self, _: Any) -> None:
        if self.persistent is None:
            raise PlainPickleError("uses BINPERSID, which no checkpoint needs")
        self.stack.append(self.persistent(self.stack.pop()))

    # What is called, with plain values

    def _charge(self, size: int) -> None:
        """Count what is copied: a short pickle can ask for many copies of something long."""
        self.left -= size
        if self.left < 0:
            raise PlainPickleError(f"copies more than {MOST_BYTES:,} bytes")

    def _copied(self, values: Any = ()) -> tuple[Any, ...]:
        self._charge(8 * len(values))
        return tuple(values)

    def _listed(self, values: Any = ()) -> list[Any]:
        return list(self._copied(values))

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        self._charge(8 * len(pairs))
        return {_key(key): value for key, value in pairs}

    def _bytes(self, text: str, encoding: str) -> bytes:
        self._charge(len(text))
        if encoding not in ("latin1", "latin-1"):
            raise PlainPickleError(f"encodes as {encoding!r:.40}")
        return text.encode("latin-1")


def _record(name: str, args: tuple[Any, ...]) -> Record:
    if not isinstance(args, tuple):
        raise PlainPickleError("holds instructions that make no sense")
    return Record(name, args, None, {}, [])


def _key(key: Any) -> Any:
    """Let through what is looked up in an instant, whatever an enemy chose."""
    if isinstance(key, tuple) and len(key) <= 100 and all(isinstance(part, str) or part is None for part in key):
        return key
    plain = key is None or isinstance(key, (str, bytes, float, Name, Record))
    if not plain and not (isinstance(key, int) and abs(key) < LARGEST_KEY):
        raise PlainPickleError("holds a dict with a key that no checkpoint needs")
    return key


def _inner(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, Record):
        return [value.name, *value.args, value.state, value.items, value.values]
    return []


def _bound(root: Any, most: int) -> None:
    """Refuse values that hold themselves, or that are too deep or too large when shared parts count each time.

    Values are entered before what they hold, and left after it, without recursion, which an enemy could exhaust.
    """
    sizes: dict[int, int] = {}  # of values that were left, and OPEN of those that were only entered
    depths: dict[int, int] = {}
    todo: list[tuple[Any, list[Any] | None]] = [(root, None)]  # to enter; with what it holds: to leave
    level = 0  # of values that are entered and not left
    while todo:
        value, inner = todo.pop()
        if inner is not None:
            level -= 1
            sizes[id(value)] = 1 + sum([sizes[id(item)] for item in inner])
            depths[id(value)] = 1 + max([depths.get(id(item), 0) for item in inner])
            if sizes[id(value)] > most or depths[id(value)] > DEEPEST:
                raise PlainPickleError("holds too many values, or nests them too deeply")
            continue
        if isinstance(value, (str, bytes)):
            sizes[id(value)] = len(value) + 1
            continue
        if id(value) in sizes:
            if sizes[id(value)] == OPEN:
                raise PlainPickleError("holds a list, a dict or an object that holds itself")
            continue
        inner = _inner(value)
        if not inner:
            sizes[id(value)] = 1
            continue
        sizes[id(value)] = OPEN
        level += 1
        if level > DEEPEST:
            raise PlainPickleError("holds too many values, or nests them too deeply")
        todo.append((value, inner))
        todo.extend([(item, None) for item in inner])


PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "INT", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": list,
}
IGNORED = {"PROTO", "FRAME"}
