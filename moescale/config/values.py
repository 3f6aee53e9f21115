"""Values as people write them, read by the type of their key: `1e5` is 100000 for run.steps and a text for run.dir."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from decimal import Decimal
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from moescale.config.run import MOVED, Config
from moescale.errors import ConfigError, any_of, refuse
from moescale.spec.group import Group

NULLS = ("null", "Null", "NULL", "~", "")
SWITCHES = {word: value for value, words in ((True, "true yes on"), (False, "false no off"))
            for lower in words.split() for word in (lower, lower.title(), lower.upper())}
NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(0|[1-9][0-9]*(_[0-9]+)*)?(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
OTHER_BASES = re.compile(r"[+-]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")
MOST_DIGITS = 18  # of a whole number
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_node(node: yaml.Node, kind: Any, key: str) -> Any:
    """Read one value of a YAML document as the type `kind`. Raises ConfigError that names `key`.

    A scalar without quotes is read by its type alone; one in quotes is a text, or what the text says. Where several
    values are expected, one may stand for a list, and commas may stand between words without brackets.
    """
    refuse(node.tag not in TAGS, f"{key}: the tag {node.tag} is not read: write a plain value")
    kinds, optional = _alternatives(kind)
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS:
        refuse(not optional, f"{key} must be {words(kind)}, not null" + (
            f": write {key}=[] for none" if get_origin(kinds) is tuple else
            ": put it in quotes if you mean the word" if kinds is str else ""))
        return None
    if get_origin(kinds) is tuple:
        return _read_list(node, get_args(kinds), key, kind)
    if get_origin(kinds) is dict:  # some keys of a group, for some layers
        return _read_some(node, key)
    if isinstance(kinds, type) and issubclass(kinds, Group):
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{key} must be {words(kind)}, e.g. {{{next(iter(kinds.model_fields))}: ...}}")
        return {name: read_node(value, kinds.model_fields[name].annotation, f"{key}.{name}")
                for name, value in pairs(node, kinds, key)}
    if not isinstance(node, yaml.ScalarNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "keys of its own"
        raise ConfigError(f"{key} must be {words(kind)}, not {found}" + (
            ": put it in quotes if it is a text" if kinds is str else ""))
    return _read_scalar(node.value, kinds, key, kind)


def _read_some(node: yaml.Node, key: str) -> dict[str, Any]:
    """Read some keys of the group that the last part of `key` names."""
    home = key.rpartition(".")[2]
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key} must be keys of {home}, e.g. {{{next(iter(group(home).model_fields))}: ...}}")
    fields = group(home).model_fields
    return {name: read_node(value, fields[name].annotation, f"{key}.{name}")
            for name, value in pairs(node, group(home), key)}


def pairs(node: yaml.MappingNode, model: type[Group], where: str) -> Iterator[tuple[str, yaml.Node]]:
    """Give the keys of a mapping with their values. Raises ConfigError for a key that is unknown or there twice."""
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        name, line = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?", key_node.start_mark.line + 1
        path = f"{where}.{name}" if where else name
        refuse(name in lines, f"{path} is there twice, in lines {lines.get(name)} and {line}: remove one of them")
        refuse(name == "<<", f"line {line}: <<: is not read: write the keys themselves, or base: with another file")
        check_key(name, model, where)
        lines[name] = line
        yield name, value


def check_key(name: str, model: type[Group], where: str) -> None:
    """Refuse a key that `model` does not have, by the groups that have it, or by the nearest one here."""
    if name in model.model_fields:
        return
    path, known = (f"{where}.{name}" if where else name), list(model.model_fields)
    refuse(path in MOVED, f"{path} is {MOVED.get(path)} now: write that")
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hints = homes(name) or [f"{where}.{each}" if where else each for each in near]
    raise ConfigError(f"unknown key {path}; " + (f"did you mean {any_of(hints)}?" if hints else
                                                 f"known: {', '.join(known)}"))


def homes(name: str) -> list[str]:
    """Give the keys of this name in all groups."""
    return [f"{key}.{name}" for key in Config.model_fields if name in group(key).model_fields]


def group(name: str) -> type[Group]:
    """Give the model of a group."""
    return Config.model_fields[name].annotation  # type: ignore[return-value]


def words(kind: Any) -> str:
    """Say in words what a value of the type `kind` is."""
    kinds, optional = _alternatives(kind)
    origin, arguments = get_origin(kinds), get_args(kinds)
    if origin is Literal:
        text = any_of(arguments)
    elif origin is tuple:
        one = words(arguments[0]).removeprefix("a ")
        text = f"a list of {one}s" if arguments[-1] is Ellipsis else f"{len(arguments)} {one}s"
    else:
        named = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        text = named.get(kinds, "a layer")
    return f"{text}, or null" if optional else text


def _alternatives(kind: Any) -> tuple[Any, bool]:
    """Strip annotations and null from a type. -> the type, and whether null is one of its values"""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (each for each in get_args(kind) if each is not NoneType)  # no key has two types
        return _alternatives(inner)[0], True
    return kind, False


def _read_list(node: yaml.Node, kinds: tuple[Any, ...], key: str, kind: Any) -> tuple[Any, ...]:
    if isinstance(node, yaml.SequenceNode):
        items = node.value
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        refuse(node.value[:1] == "(", f"{key}={node.value} must be {words(kind)}: write them in [ ]")
        items = [yaml.ScalarNode(node.tag, part.strip(), node.start_mark, node.end_mark, style="'")
                 for part in node.value.split(",")]
        refuse(any(not item.value for item in items), f"{key}={node.value} has an empty part: write {key}=[a, b]")
    else:
        items = [node]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    refuse(len(items) != len(kinds), f"{key} must be {words(kind)}, not {len(items)}")
    return tuple(read_node(item, each, f"{key}.{index}")
                 for index, (item, each) in enumerate(zip(items, kinds, strict=True)))


def _read_scalar(text: str, kind: Any, key: str, whole: Any) -> Any:
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        if text not in choices:
            near = difflib.get_close_matches(text.lower(), choices, n=1)
            raise ConfigError(f"{key}={text} must be {words(whole)}" + (f": did you mean {near[0]}?" if near else ""))
        return text
    value: float | None = _whole(text) if kind is int else _number(text) if kind is float else SWITCHES.get(text)
    if value is None:
        advice = _advice(text, kind, whole is not kind)
        raise ConfigError(f"{key}={text} must be {words(whole)}" + (f": {advice}" if advice else ""))
    return value


def _whole(text: str) -> int | None:
    """Read 100000, 100_000, 1e5 or 0x10; none where it is no whole number, or could be meant in two ways."""
    if OTHER_BASES.fullmatch(text) and len(text) <= MOST_DIGITS:
        try:
            return int(text, 0)
        except ValueError:  # an underscore at the wrong place
            return None
    match = NUMBER.fullmatch(text)
    if match is None or (match[3] and not match[4]):  # 1.000 is one for some and a thousand for others
        return None
    number = Decimal(text.replace("_", ""))
    return int(number) if number.adjusted() < MOST_DIGITS and number == number.to_integral_value() else None


def _number(text: str) -> float | None:
    return float(text.replace("_", "")) if NUMBER.fullmatch(text) else None


def _advice(text: str, kind: Any, optional: bool) -> str:
    """Say what was probably meant."""
    if not text.isascii() and any(letter.isdigit() for letter in text):
        return "write it in the digits 0 to 9"
    if optional and text.lower() in ("none", "nil", "undefined"):
        return "write null for none"
    if kind is bool:
        return {"1": "write true", "0": "write false", "y": "write true", "n": "write false"}.get(text.lower(), "")
    if re.fullmatch(r"[+-]?0[0-9_]+(\.[0-9]*)?", text):
        return f"write it without zeros in front, {text.lstrip('+-0_') or '0'}, or as 0o{text.lstrip('+-0_')} in octal"
    if kind is int and re.fullmatch(r"[0-9.,_']+", text) and re.sub(r"[^0-9]", "", text):
        return "write its digits alone, e.g. 1000"
    if kind is float and re.fullmatch(r"[+-]?[0-9]*,[0-9]+", text):
        return f"write {text.replace(',', '.')}"
    if kind is float and re.fullmatch(r"[0-9.]+ ?%", text):
        return f"write {float(text.rstrip(' %')) / 100:g}" if text.count(".") < 2 else ""
    return ""
