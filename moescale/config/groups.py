"""The groups of a run: frozen models, each of which refuses what cannot work within it."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moescale.config.errors import ConfigError, any_of, check_width, divisors, refuse

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
SIGMOID_BIAS_KEYS = ("num_expert_groups", "top_k_groups", "routed_scaling", "bias_update_rate")  # for that router alone
WITH_CAPACITY = ("switch", "gshard", "sinkhorn")
MEANS_NOTHING_ELSEWHERE = {  # a key of MoEConfig: the routers that it means something to
    **dict.fromkeys(SIGMOID_BIAS_KEYS, ("sigmoid_bias",)), "left_behind_choices": ("switch",),
    "drop_by": WITH_CAPACITY, "eval_capacity_factor": WITH_CAPACITY, "min_capacity": (*WITH_CAPACITY, "expert_choice"),
    "balance_over": ("mixtral", "sigmoid_bias", *WITH_CAPACITY),
}
CAPACITY_KEYS = ("eval_capacity_factor", "min_capacity", "drop_by", "left_behind_choices")


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
        refuse(self.num_heads % self.num_kv_heads != 0,
                f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}: "
                f"use {divisors(self.num_heads)}")
        refuse(self.window is not None and self.window < 1,
                f"model.window={self.window} must be at least 1 (a query sees itself): "
                "write null for attention to all positions before it")
        refuse(self.positions == "rope" and self.head_dim % 2 != 0,
                f"model.head_dim={self.head_dim} must be even for rope: use {self.head_dim + 1}")
        for key in ("d_model", "d_ff"):
            check_width(f"model.{key}", getattr(self, key))
        refuse(not self.pattern, "model.pattern is empty: write at least one layer, e.g. [{channel_mixer: moe}]")
        return self


class MoEConfig(Group):
    num_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    num_shared_experts: int = Field(0, ge=0)  # beside those, experts that all tokens use
    router: Literal["mixtral", "switch", "gshard", "sigmoid_bias", "expert_choice", "sinkhorn"] = "mixtral"
    capacity_factor: float | None = Field(None, gt=0)  # slots per expert over its even share; none = dropless
    eval_capacity_factor: float | None = Field(None, gt=0)  # the same in evaluation; decoding is always dropless
    min_capacity: int = Field(1, ge=1)  # slots that an expert has in any case, in each sequence
    drop_by: Literal["position", "probability"] = "position"  # who comes last: later tokens, or less sure ones
    left_behind_choices: int = Field(1, ge=1)  # experts that a token tries until one has room (Switch)
    d_ff: int = Field(512, ge=8)  # hidden features of one expert
    activation: Activation = "swiglu"
    jitter: float = Field(0.0, ge=0, lt=1)  # the router's input is multiplied by 1 +- this (Switch)
    expert_dropout: float = Field(0.0, ge=0, lt=1)  # of the hidden features within experts, for fine-tuning (Switch)
    load_balance_coefficient: float = Field(0.01, ge=0)
    balance_over: Literal["sequence", "micro_batch", "global_batch"] = "sequence"  # tokens that balance together
    router_z_coefficient: float = Field(0.0, ge=0)
    num_expert_groups: int = Field(1, ge=1)  # the experts lie in so many groups
    top_k_groups: int = Field(1, ge=1)  # a token's experts lie in so many of them
    routed_scaling: float = Field(1.0, gt=0)  # the experts' weights add up to this
    bias_update_rate: float = Field(0.001, ge=0)  # how far the bias of each expert moves in a step

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.top_k > self.num_experts,
                f"moe.top_k={self.top_k} must be at most moe.num_experts={self.num_experts}")
        refuse(self.router == "switch" and self.top_k != 1,
                f"moe.router=switch sends each token to one expert: write moe.top_k=1 instead of {self.top_k}")
        refuse(self.router == "gshard" and self.top_k != 2,
                f"moe.router=gshard sends each token to two experts: write moe.top_k=2 instead of {self.top_k}")
        refuse(self.router in ("mixtral", "sigmoid_bias") and self.capacity_factor is not None,
                f"moe.router={self.router} drops nothing: write moe.capacity_factor=null, or moe.router="
                f"{any_of(WITH_CAPACITY)}")
        one = self.router in ("mixtral", "sigmoid_bias") and self.top_k == 1 < self.num_experts
        refuse(one and self.load_balance_coefficient == 0 and self.router_z_coefficient == 0,
                f"moe.router={self.router} gives the one expert of moe.top_k=1 the weight 1, so that no loss trains "
                "the router: write e.g. moe.load_balance_coefficient=0.01, or moe.router=switch")
        self._check_keys()
        self._check_capacity()
        self._check_groups()
        self._check_expert_choice()
        check_width("moe.d_ff", self.d_ff)
        return self

    def _check_keys(self) -> None:
        """Refuse what means nothing to the router, or to a router without capacity."""
        for key, routers in MEANS_NOTHING_ELSEWHERE.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            written = "null" if default is None else default
            refuse(self.router not in routers and value != default,
                    f"moe.{key}={value} means nothing to moe.router={self.router}: write moe.{key}={written}, "
                    f"or moe.router={any_of(routers)}")
            refuse(key in CAPACITY_KEYS and self.capacity_factor is None and value != default,
                    f"moe.{key}={value} means nothing without a capacity: write moe.{key}={written}, "
                    "or e.g. moe.capacity_factor=1.25")

    def _check_capacity(self) -> None:
        refuse(self.left_behind_choices > self.num_experts,
                f"moe.left_behind_choices={self.left_behind_choices} must be at most "
                f"moe.num_experts={self.num_experts}")

    def _check_expert_choice(self) -> None:
        if self.router != "expert_choice":
            return
        if self.capacity_factor is None:
            raise ConfigError("moe.router=expert_choice needs the number of experts that a token has on average: write "
                              f"e.g. moe.capacity_factor={float(self.top_k)}")
        nearest = max(1, round(self.capacity_factor))
        refuse(self.top_k != nearest,
                f"moe.router=expert_choice with moe.capacity_factor={self.capacity_factor} gives a token about "
                f"{nearest} experts in evaluation: write moe.top_k={nearest} instead of {self.top_k}")

    def _check_groups(self) -> None:
        groups, chosen = self.num_expert_groups, self.top_k_groups
        refuse(self.num_experts % groups != 0,
                f"moe.num_expert_groups={groups} must divide moe.num_experts={self.num_experts}: "
                f"use {divisors(self.num_experts)}")
        refuse(chosen > groups, f"moe.top_k_groups={chosen} must be at most moe.num_expert_groups={groups}")
        size = self.num_experts // groups
        refuse(self.top_k > chosen * size,
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
    dispatcher: Literal["all_to_all", "hierarchical", "all_gather"] = "all_to_all"  # how tokens travel to experts
    dispatch_chunks: int = Field(1, ge=1)  # parts in which they do; one travels while the experts compute another
    node_ranks: int | None = Field(None, ge=1)  # of hierarchical; none = as many as were started on one
    row_budget: float | None = Field(None, gt=0)  # rows a rank takes at a time, over an even share; none = all
    over_budget: Literal["passes", "drop"] = "passes"  # rows beyond: in further passes, computed again in backward
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    recompute: Literal["none", "selective", "full"] = "none"  # forward again in backward: feed-forwards; whole blocks
    compile: bool = False  # torch.compile, block by block

    @property
    def pp_stages(self) -> int:
        """Pieces that the layers are cut into; schedules that interleave give each rank two of them."""
        return self.pp * (2 if self.pp > 1 and self.pp_schedule in ("interleaved_1f1b", "zero_bubble") else 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(self.dp_shard == 0, "parallel.dp_shard=0: write -1 for all ranks that are left, or a number from 1")
        refuse(self.over_budget == "drop" and self.row_budget is None,
               "parallel.over_budget=drop drops rows beyond parallel.row_budget: write e.g. parallel.row_budget=1.5")
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
        refuse(not all(0 <= beta < 1 for beta in self.betas),
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
    moved_every: int | None = Field(50, ge=1)  # steps between looks at how far routing moved; none = never
    alert_dropped: float = Field(0.5, ge=0, le=1)  # share of the choices that may have no row before an alert
    trace: str | None = None  # "steps:10-12" writes each token's experts and weights to Parquet files in these steps
    profile: str | None = None  # "steps:5-7" writes the time of each operation, for chrome://tracing or Perfetto
    wandb: Literal["off", "auto", "offline", "online"] = "off"  # auto = online where there is a key
    wandb_project: str = "moescale"
    wandb_artifacts: bool = False  # configuration, code, and where each checkpoint lies

    @property
    def trace_steps(self) -> range:
        return _steps("trace", self.trace)

    @property
    def profile_steps(self) -> range:
        return _steps("profile", self.profile)

    @field_validator("wandb", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """YAML reads off and on as false and true."""
        return ("auto" if value else "off") if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        _steps("trace", self.trace)
        _steps("profile", self.profile)
        refuse(self.wandb_artifacts and self.wandb == "off",
               "monitor.wandb_artifacts=true needs wandb: write monitor.wandb=auto, offline or online too")
        return self


def _steps(key: str, text: str | None) -> range:
    """Read `steps:10-12`, the last one included."""
    if text is None:
        return range(0)
    match = re.fullmatch(r"steps:(\d+)(?:-(\d+))?", text)
    first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    refuse(not 1 <= first <= last, f"monitor.{key}={text}: write the first and the last step, e.g. steps:10-12")
    return range(first, last + 1)
