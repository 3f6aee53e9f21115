"""What a Hugging Face family is: rows for its weights, and one table of its configuration's keys, read both ways.

A family is one file beside this one. Its table says of each key of config.json that describes the model what
transformers takes where the key is missing, which key of a run it is, and how a value is translated; config.json is
read and written by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NoReturn

from moescale.config import Config, ConfigError
from moescale.convert.mapping.table import Row, row

LONGEST = 4096  # tokens of a training sequence, where the source does not say less
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"}
STYLES = ("published", "fused")  # of experts: a tensor for each matrix, or stacked as transformers 5 holds them


class ConfigJson:
    """What a config.json says of the model. A key that is missing has its family's default.

    Each method reads one key as a value of one kind, and raises ConfigError where it is of another.
    """

    def __init__(self, values: Mapping[str, Any], family: Family, source: str) -> None:
        """Take the values as they were read. source: names the file in errors"""
        self.values, self.source = dict(values), source
        self.defaults = {key.name: key.default for key in family.keys.values()}
        for key in family.keys.values():
            if key.alias is not None and key.alias in self.values:
                other = self.values.pop(key.alias)
                if self.values.setdefault(key.name, other) != other:
                    self.refuse(f"{key.alias}={other!r} and {key.name}={self.values[key.name]!r} are two names of one "
                                "number: leave out the wrong one")

    def refuse(self, why: str) -> NoReturn:
        """Raise ConfigError with one line that names the file."""
        raise ConfigError(f"{self.source}: {why}")

    def raw(self, name: str) -> Any:
        """Read a key as it is."""
        return self.values.get(name, self.defaults[name])

    def integer(self, name: str) -> int:
        """Read a whole number that is not negative."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(f"{name}={shorten(value)} must be a whole number, e.g. {self.defaults[name] or 8}")
        return value

    def positive(self, name: str) -> int:
        """Read a whole number of at least 1."""
        value = self.integer(name)
        if value < 1:
            self.refuse(f"{name}={value} must be at least 1")
        return value

    def integer_or_null(self, name: str) -> int | None:
        """Read a whole number that is not negative, or null."""
        return None if self.raw(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """Read a number."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{name}={shorten(value)} must be a number, e.g. {self.defaults[name]}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Read true or false."""
        value = self.raw(name)
        if not isinstance(value, bool):
            self.refuse(f"{name}={value!r} must be true or false")
        return value

    def window(self) -> int | None:
        """Read how many positions a query sees; None without a window."""
        value = self.integer_or_null("sliding_window") if "sliding_window" in self.defaults else None
        if value == 0:
            self.refuse("sliding_window=0 lets a query see nothing: write null for no window")
        return value


def shorten(value: Any) -> str:
    """Show a value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Translation:
    """How the value of a key becomes one of a run, and back.

    read: takes config.json and the key's name, and raises ConfigError for what a run cannot express. write: takes the
    run's value, and the run. fits: whether the family can express a run's value.
    """

    read: Callable[[ConfigJson, str], Any]
    write: Callable[[Any, Config], Any] = lambda value, config: value
    fits: Callable[[Any, Config], bool] = lambda value, config: True


INTEGER, POSITIVE = Translation(ConfigJson.integer), Translation(ConfigJson.positive)
NUMBER, FLAG = Translation(ConfigJson.number), Translation(ConfigJson.flag)
ELSEWHERE = Translation(lambda values, name: None)  # read by another key's translation
WINDOW = Translation(lambda values, name: values.window())
WINDOW_ALWAYS = Translation(WINDOW.read, fits=lambda value, config: value is not None)
KEY_HEADS = Translation(lambda values, name: values.integer_or_null(name) or values.positive("num_attention_heads"))
HEAD_DIM = Translation(lambda values, name: values.integer_or_null(name)
                       or values.positive("hidden_size") // values.positive("num_attention_heads"))
SEQ_LEN = Translation(lambda values, name: max(1, min(values.integer(name), LONGEST)))


def only(value: Any, *spellings: Any) -> Translation:
    """Refuse other values of a key than the one that MoEScale computes with. spellings: others that mean the same"""
    def read(values: ConfigJson, name: str) -> None:
        if values.raw(name) not in (value, *spellings):
            values.refuse(f"{name}={shorten(values.raw(name))} cannot be expressed by MoEScale: only {value} can")

    return Translation(read)


def _read_activation(values: ConfigJson, name: str) -> str:
    value = values.raw(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        values.refuse(f"{name}={value!r} cannot be expressed by MoEScale: only {', '.join(ACTIVATIONS)} can")
    return ACTIVATIONS[value]


ACTIVATION = Translation(_read_activation, lambda value, config: {"swiglu": "silu", "geglu": "gelu"}[value],
                         lambda value, config: value in ACTIVATIONS.values())


def _read_theta(values: ConfigJson, name: str) -> float:
    """Read the base of the rotary embedding, of which only the plain kind can be expressed."""
    # each version of transformers puts the base into another of three places
    found = {key: values.values[key] for key in ("rope_scaling", "rope_parameters") if values.values.get(key)}
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        values.refuse("rope_scaling and rope_parameters differ, and versions of transformers read one or the other: "
                      "leave out the wrong one")
    theta = values.number(name)
    for key, rope in found.items():
        if not _is_plain(rope):
            values.refuse(f"{key}={shorten(rope)} cannot be expressed by MoEScale: only rope_type default can, with a "
                          "rope_theta")
        inner = rope.get("rope_theta")
        if inner is None:
            continue
        if isinstance(inner, bool) or not isinstance(inner, (int, float)):
            values.refuse(f"rope_theta={shorten(inner)} must be a number, e.g. {values.defaults[name]}")
        if name in values.values and inner != theta:
            values.refuse(f"{name}={theta} and {key}.rope_theta={float(inner)} differ, and versions of transformers "
                          "read one or the other: leave out the wrong one")
        theta = float(inner)
    return theta


def _is_plain(rope: Any) -> bool:
    """Say whether all that is said of the rotary embedding is its base."""
    plain = {"rope_type": "default", "type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}
    return isinstance(rope, dict) and all(
        key in ("rope_theta", "original_max_position_embeddings") or (key in plain and value in (None, plain[key]))
        for key, value in rope.items())


THETA = Translation(_read_theta)


def _check_layer_types(values: ConfigJson, name: str) -> None:
    """Refuse layers that do not all see the same positions, which is all that this key may say."""
    types, window, layers = values.raw(name), values.window(), values.positive("num_hidden_layers")
    wanted = "full_attention" if window is None else "sliding_attention"
    if types is not None and types != [wanted] * layers:
        values.refuse(f"{name}={shorten(types)} with sliding_window={'null' if window is None else window} cannot be "
                      f"expressed by MoEScale: only {layers} times {wanted} can")


LAYER_TYPES = Translation(_check_layer_types)


def rounded(value: float) -> float:
    """Take off what a product and a quotient leave in the last digits."""
    return float(f"{value:.12g}")


# transformers multiplies means over the choices of all layers; a run adds up layers' means over tokens
BALANCE = Translation(
    lambda values, name: rounded(values.number(name) * values.integer("num_experts_per_tok")
                                 / values.positive("num_hidden_layers")),
    lambda value, config: rounded(value * config.model.num_layers / config.moe.top_k),
)


@dataclass(frozen=True)
class Key:
    """One key of config.json.

    default: what transformers takes where the key is missing. ours: the keys of a run that get its value, with blanks
    between; the first is written back. None where `translation` only looks at it, or another key's translation does.
    alias: another name of the key that transformers reads, too.
    """

    name: str
    default: Any
    ours: str = ""
    translation: Translation = INTEGER
    alias: str | None = None


def keys(*entries: Key) -> dict[str, Key]:
    """Order keys by name, so that `COMMON | keys(...)` replaces those of the same name."""
    return {entry.name: entry for entry in entries}


def rows(*entries: Row) -> dict[tuple[str, ...], Row]:
    """Order rows by the native weight that they are about, so that they are replaced as keys are."""
    return {entry.native: entry for entry in entries}


COMMON = keys(
    Key("vocab_size", 32000, "model.vocab_size"),
    Key("hidden_size", 4096, "model.d_model", POSITIVE),
    Key("num_hidden_layers", 32, "model.num_layers", POSITIVE),
    Key("num_attention_heads", 32, "attention.num_heads", POSITIVE),
    Key("head_dim", None, "attention.head_dim", HEAD_DIM),
    Key("hidden_act", "silu", "feed_forward.activation", ACTIVATION),
    Key("tie_word_embeddings", False, "model.tied_embeddings", FLAG),
    Key("rope_scaling", None, translation=ELSEWHERE),
    Key("rope_parameters", None, translation=ELSEWHERE),
    Key("layer_types", None, translation=LAYER_TYPES),
)
DECODER = {"model.block": "serial", "model.norm": "rmsnorm", "model.residual": "plain",
           "model.embedding_positions": "none", "attention.positions": "rope", "model.scale_logits": False}

LAYER = "model.layers.{layer}."
EMBEDDING = rows(row("embedding.weight", "model.embed_tokens.weight"))
ATTENTION = rows(
    row("blocks.{layer}.mixer_norm.weight", LAYER + "input_layernorm.weight"),
    row("blocks.{layer}.mixer.q.weight", LAYER + "self_attn.q_proj.weight"),
    row("blocks.{layer}.mixer.k.weight", LAYER + "self_attn.k_proj.weight"),
    row("blocks.{layer}.mixer.v.weight", LAYER + "self_attn.v_proj.weight"),
    row("blocks.{layer}.mixer.o.weight", LAYER + "self_attn.o_proj.weight"),
    row("blocks.{layer}.channel_norm.weight", LAYER + "post_attention_layernorm.weight"),
)
FEED_FORWARD = rows(
    row("blocks.{layer}.channel_mixer.gate.weight", LAYER + "mlp.gate_proj.weight"),
    row("blocks.{layer}.channel_mixer.up.weight", LAYER + "mlp.up_proj.weight"),
    row("blocks.{layer}.channel_mixer.down.weight", LAYER + "mlp.down_proj.weight"),
)
HEAD = rows(row("norm.weight", "model.norm.weight"), row("head.weight", "lm_head.weight"))


@dataclass(frozen=True)
class Family:
    """A model_type of transformers.

    title: of its class, without ForCausalLM. layers: the kinds of layers that it has, as mixer and channel mixer; of
    several kinds, keys say which layer is of which. rows: for its weights, but those of experts. experts: their rows,
    by style. fixed: keys of a run that have this one value in all its models. begins: keys of a run that get this
    value when a model is read, and may have others when one is written. constants: keys that are always written so.
    """

    name: str
    title: str
    layers: tuple[tuple[str, str], ...]
    keys: dict[str, Key]
    rows: dict[tuple[str, ...], Row]
    experts: Mapping[str, Mapping[tuple[str, ...], Row]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=lambda: DECODER)
    begins: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def table(self, style: str | None) -> tuple[Row, ...]:
        """List all rows, with the experts' in the given style or the usual one."""
        return (*self.rows.values(), *self.experts.get(style or STYLES[0], {}).values())

    def read(self, values: ConfigJson) -> dict[str, dict[str, Any]]:
        """Turn a config.json into the keys of a run, by groups. Raises ConfigError."""
        mixer, channel_mixer = self.layers[0]
        found = {"model.pattern": [{"mixer": mixer, "channel_mixer": channel_mixer}], **self.fixed, **self.begins}
        for key in self.keys.values():
            found |= dict.fromkeys(key.ours.split(), key.translation.read(values, key.name))
        groups: dict[str, dict[str, Any]] = {}
        for name, value in found.items():
            group, _, inner = name.partition(".")
            groups.setdefault(group, {})[inner] = value
        return groups

    def write(self, config: Config) -> dict[str, Any]:
        """Turn a run into the keys of config.json that describe the model."""
        written = {key.name: key.translation.write(value, config) for key, value in self._written(config)}
        return {"architectures": [f"{self.title}ForCausalLM"], "model_type": self.name, **written, **self.constants}

    def other_layers(self, config: Config) -> list[str]:
        """Name kinds of layers that no model of this family has."""
        others = {(layer.mixer, layer.channel_mixer) for layer in config.model.layers} - set(self.layers)
        return [f"a layer with mixer={mixer} and channel_mixer={kind}" for mixer, kind in sorted(others)]

    def misfits(self, config: Config) -> list[str]:
        """Name what of a run a model of this family cannot have, as `key=value`."""
        present = {"model", *(kind for layer in config.model.layers for kind in (layer.mixer, layer.channel_mixer))}
        found = self.other_layers(config)
        found += [f"{name}={value_of(config, name)}" for name, value in self.fixed.items()
                  if value_of(config, name) != value and name.partition(".")[0] in present]
        for key, value in self._written(config):
            if not key.translation.fits(value, config):
                text = value if isinstance(value, str) else shorten(value)
                found.append(f"{key.ours.split()[0]}={text}")
        return found

    def _written(self, config: Config) -> Iterator[tuple[Key, Any]]:
        """Yield the keys that are written, each with the run's value."""
        for key in self.keys.values():
            if key.ours:
                yield key, value_of(config, key.ours.split()[0])


def value_of(config: Config, name: str) -> Any:
    """Read a key of a run by its name with dots."""
    return reduce(getattr, name.split("."), config)
