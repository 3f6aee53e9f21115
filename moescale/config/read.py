"""A run out of YAML and `group.key=value`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from moescale.config.nodes import LARGEST, compose
from moescale.config.run import MOVED, Config
from moescale.config.values import check_key, group, homes, pairs, read_node, words
from moescale.errors import ConfigError, any_of, refuse
from moescale.files.reading import explain, read_text


def load_config(path: str | Path, overrides: Sequence[str] = (), *, whole: bool = False) -> Config:
    """Read a run from YAML, its `base:` first, then the overrides `group.key=value`, the last of two counts.

    whole: the file is a checkpoint's or a run's own, which names no other file. Raises ConfigError with one line that
    says what to write instead.
    """
    refuse("=" in str(path) and not Path(path).exists(),
           f"{path}: the configuration comes first: write e.g. configs/quickstart.yaml {path}")
    base, values = _read_yaml(Path(path), old=whole)
    refuse(whole and base is not None, f"{path} has a base: line, which the configuration of a checkpoint or a run "
                                       "never has: it was not loaded")
    if base is not None:
        above, parent = _read_yaml(Path(path).parent / base)
        refuse(above is not None, f"{path}: its base {base} has a base: line itself; only one level is allowed, "
                "so copy what you need from it")
        values = _merge(parent, values)
    return parse_config(_merge(values, read_overrides(overrides)), str(path))


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """Validate plain values; source names them in errors. Raises ConfigError."""
    try:
        _check_keys(values)
        return Config.model_validate(_tuples(values))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `group.key=value`; the value is what a YAML file has there, but needs no quotes. Raises ConfigError."""
    values: dict[str, Any] = {}
    for index, text in enumerate(overrides):
        home, name, value = _split_override(text, overrides[index + 1 : index + 3])
        key, kind = f"{home}.{name}", group(home).model_fields[name].annotation
        refuse(not value, f"{text} has no value: {key} must be {words(kind)}")
        node: yaml.Node | None = yaml.ScalarNode("tag:yaml.org,2002:str", value)
        if value[0] in "[{'\"":
            try:
                node = compose(value)
            except yaml.YAMLError:
                raise ConfigError(f"cannot read the value of the override {text!r} as YAML: close its brackets and "
                                  "quotes, or put the whole of it in quotes") from None
        assert node is not None, "a value that begins with a bracket or quote is one"
        values = _merge(values, {home: {name: read_node(node, kind, key)}})
    return values


def _split_override(text: str, following: Sequence[str]) -> tuple[str, str, str]:
    """Split `group.key=value`, or say how it is written. following: the words after it, which may be the value."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the override {text!r} is no UTF-8: write it in UTF-8") from None
    key, equals, value = (part.strip() for part in text.partition("="))
    home, _, name = key.partition(".")
    if equals and home in Config.model_fields and name in group(home).model_fields:
        return home, name, value
    cannot = f"cannot read the override {text!r}: write"
    if not equals:
        refuse(key.endswith((".yaml", ".yml")),
               f"a run has one configuration, and {text} would be the second: name it in the first one's base: line")
        key, _, value = (part.strip() for part in key.partition(":"))
        after = next((word for word in following if word != "="), "=")
        value = value or ("VALUE" if "=" in after or after.startswith("-") else after)
    meant = re.sub(r"[/:]", ".", key.lstrip("-+~")).lower()
    home, dot, name = meant.partition(".")
    known = [meant] if home in Config.model_fields and name in group(home).model_fields else homes(meant)
    if known:
        raise ConfigError(f"{cannot} {any_of([f'{each}={value}' for each in known])}")
    refuse(key.startswith("-") and home not in Config.model_fields, f"there is no option {key}: see --help")
    refuse(not equals or not home, f"{cannot} group.key=value, e.g. parallel.ep=2")
    check_key(home, Config, "")
    refuse(not dot, f"{cannot} the keys of {home} one by one, e.g. {home}.{next(iter(group(home).model_fields))}=VALUE")
    check_key(name, group(home), home)
    raise ConfigError(f"{cannot} group.key=value, e.g. parallel.ep=2")


def _read_yaml(path: Path, old: bool = False) -> tuple[str | None, dict[str, Any]]:
    """Read one file, its values by the types of their keys. Returns its base, and its groups.

    old: an earlier version may have written it, with keys where they no longer are.
    """
    try:
        root = compose(read_text(path, LARGEST))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no such configuration: {path}{hint}") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        raise ConfigError(f"{path} is a folder: write " + (str(inside) if inside.exists() else "a YAML file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML text: {explain(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in ("", "null", "~")):
        return None, {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected groups such as `model:` at the top")
    try:
        if old:
            _move_keys(root)
        return _read_groups(root)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_groups(root: yaml.MappingNode) -> tuple[str | None, dict[str, Any]]:
    base, values = None, {}
    for home, node in pairs(root, _File, ""):
        if home == "base":
            base = read_node(node, str, "base")
            continue
        fields = group(home).model_fields
        if isinstance(node, yaml.MappingNode):
            values[home] = {name: read_node(value, fields[name].annotation, f"{home}.{name}")
                            for name, value in pairs(node, group(home), home)}
        else:
            _refuse_value(home)
    return base, values


def _move_keys(root: yaml.MappingNode) -> None:
    """Put the keys of earlier versions into the groups that have them now."""
    groups = {key.value: value for key, value in root.value}
    model = groups.get("model")
    if not isinstance(model, yaml.MappingNode):
        return
    for pair in list(model.value):
        home = MOVED.get(f"model.{pair[0].value}", "").partition(".")[0]
        if home and home not in groups:
            groups[home] = yaml.MappingNode("tag:yaml.org,2002:map", [], model.start_mark, model.end_mark)
            root.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", home, model.start_mark), groups[home]))
        if home and isinstance(groups[home], yaml.MappingNode):
            groups[home].value.append(pair)
            model.value.remove(pair)


def _refuse_value(home: str) -> NoReturn:
    raise ConfigError(f"{home} is a group: write its keys below it, e.g. {home}.{next(iter(group(home).model_fields))}")


class _File(Config):
    base: str | None = None


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the groups of `new` over those of `old`, key by key."""
    return {**old, **{home: {**old.get(home, {}), **values} for home, values in new.items()}}


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuse unknown groups and keys of plain values."""
    for home, keys in values.items():
        check_key(str(home), Config, "")
        if not isinstance(keys, Mapping):
            _refuse_value(home)
        for name in keys:
            check_key(str(name), group(home), home)


def _tuples(value: Any) -> Any:
    """Lists become the tuples that frozen models hold."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # of one key, or of a group, which names its keys itself
        return f"{path}={first['input']}: {message}" if "." in path else message
    return f"{path}={first['input']!r} {message}"
