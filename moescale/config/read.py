"""A run out of YAML and `group.key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moescale.config.errors import ConfigError, refuse
from moescale.config.run import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run from YAML, its `base:` first, then the overrides `group.key=value`.

    Raises ConfigError with one line that says what to write instead.
    """
    values = _read_yaml(Path(path))
    base = values.pop("base", None)
    if base is not None:
        refuse(not isinstance(base, str), f"{path}: base: must be one path, not {base!r}")
        parent = _read_yaml(Path(path).parent / base)
        refuse("base" in parent, f"{path}: its base {base} has a base: line itself; only one level is allowed, "
                "so copy what you need from it")
        values = _merge(parent, values)
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """Validate plain values; source names them in errors. Raises ConfigError."""
    _check_keys(values, Config, (), source)
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no such configuration: {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    refuse(not isinstance(values, dict), f"{path}: expected groups such as `model:` at the top, found {values!r:.60}")
    return dict(values)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    group, dot, name = key.strip().partition(".")
    refuse(not (equals and dot and group and name),
            f"cannot read the override {text!r}: write group.key=value, e.g. parallel.ep=2")
    try:
        return {group: {name: yaml.safe_load(value)}}
    except yaml.YAMLError:
        raise ConfigError(f"cannot read the value of the override {text!r} as YAML: put it in quotes") from None


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the groups of `new` over those of `old`, key by key."""
    merged = dict(old)
    for group, values in new.items():
        both = isinstance(values, Mapping) and isinstance(merged.get(group), Mapping)
        merged[group] = {**merged[group], **values} if both else values
    return merged


def _check_keys(values: Mapping[str, Any], model: type[BaseModel], where: tuple[str, ...], source: str) -> None:
    """Refuse unknown keys by their nearest known name, groups of this level first."""
    for key, value in values.items():
        path = ".".join((*where, str(key)))
        if key not in model.model_fields:
            groups = Config.model_fields
            homes = [f"{name}.{key}" for name, field in groups.items() if key in field.annotation.model_fields]  # type: ignore[union-attr]
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
            hint = ".".join((*where, near[0])) if near else homes[0] if homes else None
            known = ", ".join(model.model_fields)
            advice = f"did you mean {hint}?" if hint else f"known: {known}"
            raise ConfigError(f"{source}: unknown key {path}; {advice}")
        if not where:
            annotation = Config.model_fields[key].annotation
            refuse(not isinstance(value, Mapping), f"{source}: {key} is a group: write its keys below it, e.g. "
                    f"{key}.{next(iter(annotation.model_fields))}")  # type: ignore[union-attr]
            _check_keys(value, annotation, (key,), source)  # type: ignore[arg-type]


def _tuples(value: Any) -> Any:
    """YAML lists become the tuples that frozen models hold; a whole number may stand for a float, `1e-3` for 0.001."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if "e" in value.lower() and number - number == 0 else value  # YAML reads 1e-3 as text
    return value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if first["type"] == "value_error":
        return message
    path = ".".join(str(part) for part in first["loc"])
    return f"{path}={first['input']!r} {message}"
