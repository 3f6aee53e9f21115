"""Every key of a run in words: its value, what it may be, what it is for."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from moescale.config.run import Config
from moescale.config.values import group, words
from moescale.spec.group import Group

BOUNDS = ((Ge, "ge", "from"), (Gt, "gt", "above"), (Le, "le", "to"), (Lt, "lt", "below"))


def describe(config: Config, width: int) -> Iterator[str]:
    """Give the lines that show every key; a star marks values that differ from the default. width: in characters."""
    default = Config()
    for home in Config.model_fields:
        yield home
        sentences = group(home).sentences()
        for name, field in group(home).model_fields.items():
            value, usual = (getattr(getattr(run, home), name) for run in (config, default))
            changed = value != usual
            note = f"{_kind(field)}; default {written(usual)}" if changed else _kind(field)
            yield from _wrapped(f"{'*' if changed else ' '} {home}.{name} = {written(value)}  ({note})", width, 6)
            yield from _wrapped(f"      {sentences[name]}", width, 6)
        yield ""


def differing_keys(*configs: Config) -> dict[str, tuple[Any, ...]]:
    """Give the keys whose values are not the same in all of some runs, each with its value in each run."""
    found = {}
    for home in Config.model_fields:
        for name in group(home).model_fields:
            values = tuple(getattr(getattr(config, home), name) for config in configs)
            if any(value != values[0] for value in values):
                found[f"{home}.{name}"] = values
    return found


def written(value: Any) -> str:
    """Write a value as it may stand behind `group.key=`."""
    if isinstance(value, Group):
        value = {name: each for name, each in value if each != {}}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(each)}" for name, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _kind(field: FieldInfo) -> str:
    text, null, end = words(field.annotation).partition(", or null")
    limits = [f"{word} {getattr(limit, attribute)}" for limit in field.metadata
              for kind, attribute, word in BOUNDS if isinstance(limit, kind)]
    return " ".join([text, " and ".join(limits)]).rstrip() + null + end


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(text, max(40, width), subsequent_indent=" " * indent, break_long_words=False,
                         break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False)
