"""The run as small frozen models, one per folder of the package.

A run is one YAML file of groups (`run`, `data`, `model`, `moe`, ...), at most one `base:` line that names another
such file, and overrides `group.key=value`. Whatever cannot work is refused here, in one line, before any process
group starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
SIGMOID_BIAS_KEYS = ("num_expert_groups", "top_k_groups", "routed_scaling", "bias_update_rate")  # for that router alone


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
    positions: Literal["rope", "alibi", "none"] = "rope"
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
    num_shared_experts: int = Field(0, ge=0)  # beside those, experts that all tokens use
    router: Literal["mixtral", "switch", "gshard", "sigmoid_bias", "expert_choice"] = "mixtral"
    capacity_factor: float | None = Field(None, gt=0)  # slots per expert over its even share; none = dropless
    d_ff: int = Field(512, ge=8)  # hidden features of one expert
    activation: Activation = "swiglu"
    jitter: float = Field(0.0, ge=0, lt=1)  # the router's input is multiplied by 1 +- this (Switch)
    load_balance_coefficient: float = Field(0.01, ge=0)
    router_z_coefficient: float = Field(0.0, ge=0)
    num_expert_groups: int = Field(1, ge=1)  # the experts lie in so many groups
    top_k_groups: int = Field(1, ge=1)  # a token's experts lie in so many of them
    routed_scaling: float = Field(1.0, gt=0)  # the experts' weights add up to this
    bias_update_rate: float = Field(0.001, ge=0)  # how far the bias of each expert moves in a step

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse(self.top_k > self.num_experts,
                f"moe.top_k={self.top_k} must be at most moe.num_experts={self.num_experts}")
        _refuse(self.router == "switch" and self.top_k != 1,
                f"moe.router=switch sends each token to one expert: write moe.top_k=1 instead of {self.top_k}")
        _refuse(self.router == "gshard" and self.top_k != 2,
                f"moe.router=gshard sends each token to two experts: write moe.top_k=2 instead of {self.top_k}")
        _refuse(self.router in ("mixtral", "sigmoid_bias") and self.capacity_factor is not None,
                f"moe.router={self.router} drops nothing: write moe.capacity_factor=null, or moe.router=switch or "
                "gshard")
        self._check_sigmoid_bias()
        self._check_expert_choice()
        _check_width("moe.d_ff", self.d_ff)
        return self

    def _check_expert_choice(self) -> None:
        if self.router != "expert_choice":
            return
        if self.capacity_factor is None:
            raise ConfigError("moe.router=expert_choice needs the number of experts that a token has on average: write "
                              f"e.g. moe.capacity_factor={float(self.top_k)}")
        nearest = max(1, round(self.capacity_factor))
        _refuse(self.top_k != nearest,
                f"moe.router=expert_choice with moe.capacity_factor={self.capacity_factor} gives a token about "
                f"{nearest} experts in evaluation: write moe.top_k={nearest} instead of {self.top_k}")

    def _check_sigmoid_bias(self) -> None:
        if self.router != "sigmoid_bias":
            for key in SIGMOID_BIAS_KEYS:
                default = type(self).model_fields[key].default
                _refuse(getattr(self, key) != default,
                        f"moe.{key}={getattr(self, key)} means nothing to moe.router={self.router}: "
                        f"write moe.{key}={default}, or moe.router=sigmoid_bias")
        groups, chosen = self.num_expert_groups, self.top_k_groups
        _refuse(self.num_experts % groups != 0,
                f"moe.num_expert_groups={groups} must divide moe.num_experts={self.num_experts}: "
                f"use {_divisors(self.num_experts)}")
        _refuse(chosen > groups, f"moe.top_k_groups={chosen} must be at most moe.num_expert_groups={groups}")
        size = self.num_experts // groups
        _refuse(self.top_k > chosen * size,
                f"moe.top_k={self.top_k} is more than the {chosen * size} experts of moe.top_k_groups={chosen} of "
                f"moe.num_expert_groups={groups}: write moe.top_k_groups={-(-self.top_k // size)}")


class ParallelConfig(Group):
    dp_replicate: int = Field(1, ge=1)  # copies of the sharded model
    dp_shard: int = Field(-1, ge=-1)  # ranks that share one copy; -1 = what is left of the world
    tp: int = Field(1, ge=1)  # ranks that share each matrix of attention, feed-forward, embedding and head
    cp: int = Field(1, ge=1)  # ranks that share each sequence
    pp: int = Field(1, ge=1)  # ranks in a row, each with some of the layers
    ep: int = Field(1, ge=1)  # ranks that share the experts of one layer
    etp: int = Field(1, ge=1)  # ranks that share each expert
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    recompute: Literal["none", "selective", "full"] = "none"  # forward again in backward: feed-forwards; whole blocks
    compile: bool = False  # torch.compile, block by block

    @property
    def pp_stages(self) -> int:
        """Pieces that the layers are cut into; schedules that interleave give each rank two of them."""
        return self.pp * (2 if self.pp > 1 and self.pp_schedule in ("interleaved_1f1b", "zero_bubble") else 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
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
    # weights and optimizer state stay float32 under bfloat16; float64 is for proofs
    compute: Literal["float32", "bfloat16", "float64"] = "float32"


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
        parallel = self._settle_ranks(world_size)
        self._check_experts(parallel)
        self._check_tensor(parallel)
        self._check_context(parallel)
        micro_batch = self._settle_micro_batch(parallel)
        share = self.data.global_batch // (parallel.dp_replicate * parallel.dp_shard)
        self._check_pipeline(parallel, share // micro_batch)
        return self.model_copy(update={
            "parallel": parallel, "data": self.data.model_copy(update={"micro_batch": micro_batch}),
        })

    def _settle_ranks(self, world_size: int) -> ParallelConfig:
        parallel = self.parallel
        degrees = {key: getattr(parallel, key) for key in ("dp_replicate", "tp", "cp", "pp")}
        fixed = math.prod(degrees.values())
        product = " x ".join(f"parallel.{key}={degree}" for key, degree in degrees.items() if degree > 1)
        _refuse(world_size % fixed != 0,
                f"{product} is {fixed} ranks, which must divide the {world_size} that were started: "
                f"use {_divisors(world_size)}")
        left = world_size // fixed
        dp_shard = left if parallel.dp_shard == -1 else parallel.dp_shard
        product = " x ".join(part for part in (product, f"parallel.dp_shard={dp_shard}") if part)
        _refuse(dp_shard != left, f"{product} is {fixed * dp_shard} ranks, but {world_size} were started: "
                f"write parallel.dp_shard={left} or -1")
        return parallel.model_copy(update={"dp_shard": dp_shard})

    def _check_experts(self, parallel: ParallelConfig) -> None:
        model, moe, ep, etp = self.model, self.moe, parallel.ep, parallel.etp
        sharing = parallel.dp_shard * parallel.cp * parallel.tp
        for key, degree in (("ep", ep), ("etp", etp)):
            _refuse(degree > 1 and self.num_moe_layers == 0,
                    f"parallel.{key}={degree}, but model.pattern has no moe layer: write parallel.{key}=1")
        allowed = [n for n in range(1, sharing + 1) if sharing % (n * etp) == 0 and moe.num_experts % n == 0]
        _refuse(sharing % etp != 0 or moe.d_ff % etp != 0,
                f"parallel.etp={etp} must divide moe.d_ff={moe.d_ff} and dp_shard x cp x tp={sharing} "
                f"(the ranks that share one copy of the model): use {_divisors(math.gcd(sharing, moe.d_ff))}")
        _refuse(moe.num_experts % ep != 0,
                f"parallel.ep={ep} must divide moe.num_experts={moe.num_experts}: use {_any_of(allowed)}")
        _refuse(sharing % (ep * etp) != 0,
                f"parallel.ep={ep} x parallel.etp={etp} must divide dp_shard x cp x tp={sharing} "
                f"(the ranks that share one copy of the model): use parallel.ep={_any_of(allowed)}")
        efsdp = sharing // (ep * etp)
        _refuse(self.num_moe_layers > 0 and model.d_model % efsdp != 0,
                f"each expert is split over {efsdp} ranks (dp_shard x cp x tp={sharing} / ep={ep} / etp={etp}), which "
                f"must divide model.d_model={model.d_model}: use a larger parallel.ep or parallel.dp_replicate")

    def _check_tensor(self, parallel: ParallelConfig) -> None:
        model, tp = self.model, parallel.tp
        if tp == 1:
            return
        shared = {"model.num_heads": model.num_heads, "model.vocab_size": model.vocab_size}
        if self.num_moe_layers < model.num_layers:
            shared["model.d_ff"] = model.d_ff
        for name, size in shared.items():
            _refuse(size % tp != 0, f"parallel.tp={tp} must divide {name}={size}: "
                    f"use {_divisors(math.gcd(*shared.values()))}")
        _refuse(model.num_kv_heads % tp != 0 and tp % model.num_kv_heads != 0,
                f"parallel.tp={tp} must divide model.num_kv_heads={model.num_kv_heads} or be a multiple of it: "
                f"use {_any_of([n for n in range(1, tp) if model.num_kv_heads % n == 0])}")
        fsdp = parallel.dp_shard * parallel.cp
        _refuse(model.d_model % fsdp != 0,
                f"with parallel.tp={tp}, dp_shard x cp={fsdp} must divide model.d_model={model.d_model}: "
                "use a larger parallel.dp_replicate")

    def _check_context(self, parallel: ParallelConfig) -> None:
        pieces = sequence_pieces(parallel.cp, self.model.window) * parallel.tp
        seq = self.data.seq_len
        _refuse(seq % pieces != 0,
                f"data.seq_len={seq} must be a multiple of {pieces} for parallel.cp={parallel.cp} and "
                f"parallel.tp={parallel.tp}: use {_round_up(seq, pieces)}")

    def _settle_micro_batch(self, parallel: ParallelConfig) -> int:
        data, batch_ranks = self.data, parallel.dp_replicate * parallel.dp_shard
        _refuse(data.global_batch % batch_ranks != 0,
                f"data.global_batch={data.global_batch} must be a multiple of the {batch_ranks} ranks that share it: "
                f"use {_round_up(data.global_batch, batch_ranks)}")
        share = data.global_batch // batch_ranks
        if data.micro_batch is not None:
            _refuse(share % data.micro_batch != 0,
                    f"data.micro_batch={data.micro_batch} must divide a rank's share of {share} sequences "
                    f"(data.global_batch={data.global_batch} over {batch_ranks} ranks): use {_divisors(share)}")
            return data.micro_batch
        return share if parallel.pp == 1 else max(n for n in range(1, share + 1)
                                                  if share % n == 0 and (share // n >= parallel.pp or n == 1))

    def _check_pipeline(self, parallel: ParallelConfig, passes: int) -> None:
        pp, schedule = parallel.pp, parallel.pp_schedule
        if pp == 1:
            return
        _refuse(parallel.pp_stages > self.model.num_layers,
                f"parallel.pp={pp} cuts the model into {parallel.pp_stages} stages of at least one layer, but "
                f"model.num_layers={self.model.num_layers}: use parallel.pp="
                f"{max(1, self.model.num_layers // (parallel.pp_stages // pp))} or less")
        _refuse(schedule == "1f1b" and passes < pp,
                f"parallel.pp_schedule=1f1b needs at least parallel.pp={pp} micro-batches a step, but a rank makes "
                f"{passes}: write a smaller data.micro_batch or parallel.pp_schedule=gpipe")
        rounds = max(1, passes // pp)
        _refuse(schedule == "interleaved_1f1b" and passes % rounds != 0,
                f"parallel.pp_schedule=interleaved_1f1b runs {passes} micro-batches in {rounds} rounds: write a "
                f"data.micro_batch that gives a multiple of parallel.pp={pp}, or parallel.pp_schedule=1f1b")
        _refuse(parallel.compile and schedule == "zero_bubble",
                "parallel.compile=true cannot split backward as parallel.pp_schedule=zero_bubble does: write 1f1b")

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


def sequence_pieces(cp: int, window: int | None) -> int:
    """How many equal pieces the ranks of `cp` cut a sequence into.

    With a window every piece costs the same. Without, later ones cost more, and each rank takes one from both ends.
    """
    return cp if cp == 1 or window is not None else 2 * cp


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
