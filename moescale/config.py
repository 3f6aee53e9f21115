"""The run as small frozen models, one per folder of the package.

A run is one YAML file of groups (`run`, `data`, `model`, `moe`, ...), at most one `base:` line that names another
such file, and overrides `group.key=value`. Whatever cannot work is refused here, in one line, before any process
group starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Activation = Literal["swiglu", "geglu", "gelu", "relu"]


class ConfigError(ValueError):
    """A configuration that cannot work; the message says what to write instead."""


class TrainingError(RuntimeError):
    """A run that cannot go on, though its configuration is sound; the message says what to try."""


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Group):
    dir: str = "runs/default"  # checkpoints, metrics.jsonl and config.yaml go here
    seed: int = Field(0, ge=0, lt=2**31)  # of the initial weights, the data's order and every random draw
    steps: int = Field(1000, ge=1)
    timeout_seconds: float = Field(300.0, gt=0)  # a collective that waits longer ends the run


class DataConfig(Group):
    files: tuple[str, ...] = ()  # paths and globs; none = the running Python's own standard library
    tokenizer: str = "bytes"  # "bytes", or the path of a Hugging Face tokenizer.json
    cache_dir: str = "~/.cache/moescale"  # where token shards are kept
    seq_len: int = Field(256, ge=1)
    global_batch: int = Field(16, ge=1)  # sequences a step, over all ranks
    micro_batch: int | None = Field(None, ge=1)  # sequences a rank and pass; none = a rank's whole share in one pass
    held_out: float = Field(0.02, gt=0, lt=1)  # share of the documents kept for evaluation


class LayerConfig(Group):
    """One entry of `model.pattern`: what mixes tokens, what mixes features."""

    mixer: Literal["attention"] = "attention"
    channel_mixer: Literal["feed_forward", "moe"] = "moe"


class ModelConfig(Group):
    vocab_size: int = Field(384, ge=2)
    d_model: int = Field(256, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(8, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=2)
    d_ff: int = Field(1024, ge=8)  # hidden features of a dense feed-forward
    activation: Activation = "swiglu"
    window: int | None = Field(None)  # positions a query sees, itself included; none = all before it
    positions: Literal["rope", "none"] = "rope"
    rope_theta: float = Field(10000.0, gt=1)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    block: Literal["serial", "parallel"] = "serial"  # parallel: one norm, mixer and channel mixer side by side (PaLM)
    tied_embeddings: bool = False
    scale_logits: bool = False  # logits / sqrt(d_model), as T5 and PaLM do with tied embeddings
    init: Literal["normal", "fan_in", "switch"] = "normal"  # std 0.02; 1/sqrt(fan in) (PaLM); truncated (Switch)
    z_loss_coefficient: float = Field(0.0, ge=0)  # of the squared log-normaliser of the output softmax
    pattern: tuple[LayerConfig, ...] = (LayerConfig(),)  # tiled over the layers

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The pattern tiled over all layers."""
        return tuple(self.pattern[index % len(self.pattern)] for index in range(self.num_layers))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse(self.num_heads % self.num_kv_heads != 0,
                f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}: "
                f"use {_divisors(self.num_heads)}")
        _refuse(self.window is not None and self.window < 1,
                f"model.window={self.window} must be at least 1 (a query sees itself): "
                "write null for attention to all positions before it")
        _refuse(self.positions == "rope" and self.head_dim % 2 != 0,
                f"model.head_dim={self.head_dim} must be even for rope: use {self.head_dim + 1}")
        for key in ("d_model", "d_ff"):
            _check_width(f"model.{key}", getattr(self, key))
        _refuse(not self.pattern, "model.pattern is empty: write at least one layer, e.g. [{channel_mixer: moe}]")
        return self


class MoEConfig(Group):
    num_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    router: Literal["mixtral", "switch", "gshard"] = "mixtral"
    capacity_factor: float | None = Field(None, gt=0)  # slots per expert over its even share; none = dropless
    d_ff: int = Field(512, ge=8)  # hidden features of one expert
    activation: Activation = "swiglu"
    jitter: float = Field(0.0, ge=0, lt=1)  # the router's input is multiplied by 1 +- this (Switch)
    load_balance_coefficient: float = Field(0.01, ge=0)
    router_z_coefficient: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse(self.top_k > self.num_experts,
                f"moe.top_k={self.top_k} must be at most moe.num_experts={self.num_experts}")
        _refuse(self.router == "switch" and self.top_k != 1,
                f"moe.router=switch sends each token to one expert: write moe.top_k=1 instead of {self.top_k}")
        _refuse(self.router == "gshard" and self.top_k != 2,
                f"moe.router=gshard sends each token to two experts: write moe.top_k=2 instead of {self.top_k}")
        _refuse(self.router == "mixtral" and self.capacity_factor is not None,
                "moe.router=mixtral drops nothing: write moe.capacity_factor=null, or moe.router=switch or gshard")
        _check_width("moe.d_ff", self.d_ff)
        return self


class ParallelConfig(Group):
    dp_replicate: int = Field(1, ge=1)  # copies of the sharded model
    dp_shard: int = Field(-1, ge=-1)  # ranks that share one copy; -1 = what is left of the world
    ep: int = Field(1, ge=1)  # ranks that share the experts of one layer
    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, name in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
            degree = getattr(self, key)
            _refuse(degree != 1, f"parallel.{key}={degree}: {name} parallelism is not built yet; write "
                    f"parallel.{key}=1 and spread the ranks over parallel.dp_shard and parallel.ep")
        _refuse(self.dp_shard == 0, "parallel.dp_shard=0: write -1 for all ranks that are left, or a number from 1")
        return self


class OptimConfig(Group):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # decoupled; never on norms and embeddings
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_share: float = Field(0.1, ge=0, le=1)  # the last step's learning rate over lr
    clip_norm: float | None = Field(1.0, gt=0)  # of the gradient over all parameters; none = no clipping

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse(not all(0 <= beta < 1 for beta in self.betas),
                f"optim.betas={list(self.betas)}: both must be at least 0 and below 1, e.g. [0.9, 0.95]")
        return self


class PrecisionConfig(Group):
    compute: Literal["float32", "bfloat16"] = "float32"  # weights and optimizer state stay float32 in both


class CheckpointConfig(Group):
    every: int = Field(1000, ge=1)  # steps; the last step is always saved
    keep: int = Field(3, ge=1)


class MonitorConfig(Group):
    every: int = Field(10, ge=1)  # steps between two lines of metrics.jsonl
    eval_every: int | None = Field(None, ge=1)  # steps; none = after the last step only
    eval_sequences: int = Field(64, ge=1)  # held-out sequences a time
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "moescale"


class Config(Group):
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @property
    def num_moe_layers(self) -> int:
        return sum(layer.channel_mixer == "moe" for layer in self.model.layers)

    def for_world(self, world_size: int) -> Config:
        """Settle what depends on the number of ranks (`dp_shard: -1`, `micro_batch`) and refuse what does not fit.

        world_size: ranks of the whole job. -> the same run, with nothing left to derive
        """
        parallel, data = self.parallel, self.data
        fixed = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
        _refuse(world_size % fixed != 0,
                f"parallel.dp_replicate={parallel.dp_replicate} must divide the {world_size} ranks: "
                f"use {_divisors(world_size)}")
        left = world_size // fixed
        dp_shard = left if parallel.dp_shard == -1 else parallel.dp_shard
        _refuse(dp_shard != left,
                f"parallel.dp_replicate={parallel.dp_replicate} x parallel.dp_shard={dp_shard} is "
                f"{fixed * dp_shard} ranks, but {world_size} were started: write parallel.dp_shard={left} or -1")
        fsdp_tp = dp_shard * parallel.cp * parallel.tp
        allowed = [n for n in range(1, fsdp_tp + 1) if fsdp_tp % n == 0 and self.moe.num_experts % n == 0]
        _refuse(parallel.ep > 1 and self.num_moe_layers == 0,
                f"parallel.ep={parallel.ep}, but model.pattern has no moe layer: write parallel.ep=1")
        _refuse(self.moe.num_experts % parallel.ep != 0,
                f"parallel.ep={parallel.ep} must divide moe.num_experts={self.moe.num_experts}: use {_any_of(allowed)}")
        _refuse(fsdp_tp % parallel.ep != 0,
                f"parallel.ep={parallel.ep} must divide parallel.dp_shard={dp_shard} "
                f"(the ranks that share one copy of the model): use {_any_of(allowed)}")
        efsdp = fsdp_tp // parallel.ep
        _refuse(self.num_moe_layers > 0 and (self.model.d_model % efsdp != 0 or self.moe.d_ff % efsdp != 0),
                f"each expert is split over {efsdp} ranks (dp_shard={dp_shard} / ep={parallel.ep}), which must divide "
                f"model.d_model={self.model.d_model} and moe.d_ff={self.moe.d_ff}: use a larger parallel.ep or "
                "parallel.dp_replicate")
        batch_ranks = parallel.dp_replicate * dp_shard
        _refuse(data.global_batch % batch_ranks != 0,
                f"data.global_batch={data.global_batch} must be a multiple of the {batch_ranks} ranks that share it: "
                f"use {_round_up(data.global_batch, batch_ranks)}")
        share = data.global_batch // batch_ranks
        micro_batch = share if data.micro_batch is None else data.micro_batch
        _refuse(share % micro_batch != 0,
                f"data.micro_batch={micro_batch} must divide a rank's share of {share} sequences "
                f"(data.global_batch={data.global_batch} over {batch_ranks} ranks): use {_divisors(share)}")
        return self.model_copy(update={
            "parallel": parallel.model_copy(update={"dp_shard": dp_shard}),
            "data": data.model_copy(update={"micro_batch": micro_batch}),
        })

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse(self.data.tokenizer == "bytes" and self.model.vocab_size < 257,
                f"model.vocab_size={self.model.vocab_size} is too small for data.tokenizer=bytes "
                "(256 bytes and the start of a document): write at least 257")
        _refuse(self.optim.warmup_steps >= self.run.steps and self.optim.warmup_steps > 0,
                f"optim.warmup_steps={self.optim.warmup_steps} must be below run.steps={self.run.steps}")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run from YAML, its `base:` first, then the overrides `group.key=value`.

    Raises ConfigError with one line that says what to write instead.
    """
    values = _read_yaml(Path(path))
    base = values.pop("base", None)
    if base is not None:
        _refuse(not isinstance(base, str), f"{path}: base: must be one path, not {base!r}")
        parent = _read_yaml(Path(path).parent / base)
        _refuse("base" in parent, f"{path}: its base {base} has a base: line itself; only one level is allowed, "
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
    _refuse(not isinstance(values, dict), f"{path}: expected groups such as `model:` at the top, found {values!r:.60}")
    return dict(values)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    group, dot, name = key.strip().partition(".")
    _refuse(not (equals and dot and group and name),
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
            _refuse(not isinstance(value, Mapping), f"{source}: {key} is a group: write its keys below it, e.g. "
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


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_width(name: str, width: int) -> None:
    nearest = max(8, round(width / 8) * 8)
    _refuse(width % 8 != 0, f"{name}={width} must be a multiple of 8 (16-byte rows in bfloat16): use {nearest}")


def _divisors(number: int) -> str:
    return _any_of([n for n in range(1, number + 1) if number % n == 0])


def _any_of(numbers: Sequence[int]) -> str:
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
