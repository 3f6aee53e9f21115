"""The groups of a run: frozen models, each of which refuses what cannot work within it.

The sentence below a key is what `moescale config` shows of it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from moescale.errors import ConfigError, any_of, check_local, check_width, divisors, refuse

LocalPath = Annotated[str, AfterValidator(check_local)]
Activation = Literal["swiglu", "geglu", "gelu", "relu"]
SIGMOID_BIAS_KEYS = ("num_expert_groups", "top_k_groups", "routed_scaling", "bias_update_rate")  # for that router alone
WITH_CAPACITY = ("switch", "gshard", "sinkhorn")
MEANS_NOTHING_ELSEWHERE = {  # a key of MoEConfig: the routers that it means something to
    **dict.fromkeys(SIGMOID_BIAS_KEYS, ("sigmoid_bias",)), "left_behind_choices": ("switch",),
    "drop_by": WITH_CAPACITY, "eval_capacity_factor": WITH_CAPACITY, "min_capacity": (*WITH_CAPACITY, "expert_choice"),
    "balance_over": ("mixtral", "sigmoid_bias", *WITH_CAPACITY),
}
LONGEST_SECONDS = 7 * 24 * 3600  # of what waits; a longer time is one that was mistyped
CAPACITY_KEYS = ("eval_capacity_factor", "min_capacity", "drop_by", "left_behind_choices")


LARGEST_NUMBER = 10**12


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True)  # the text below a key is its description

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        """Refuse what no run has, before anything counts up to it."""
        for key, value in self:
            if isinstance(value, int) and value > LARGEST_NUMBER:
                raise ConfigError(f"{key} must be at most {LARGEST_NUMBER:,}")
        return self


def _check_project(name: str) -> str:
    refuse(not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", name), "a project in wandb has a name of 1 to 128 letters "
           "without / \\ # ? % and :; the team it belongs to is not part of it, but WANDB_ENTITY in the environment")
    return name


class RunConfig(Group):
    dir: LocalPath = "runs/default"
    """The folder that checkpoints, metrics.jsonl and config.yaml go to."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides the first weights, the order of the data and every random draw."""
    steps: int = Field(1000, ge=1)
    """Steps to train, in all."""
    timeout_seconds: float = Field(300.0, ge=1, le=LONGEST_SECONDS)
    """A rank that waits longer than this for the others ends the run."""
    time_limit_minutes: float | None = Field(None, gt=0, le=LONGEST_SECONDS / 60)
    """Minutes after its start at which the run finishes its step, saves and leaves with exit status 75."""
    allow_changes: tuple[str, ...] = ()
    """Keys or groups that may differ from the checkpoint's when a run goes on, this once, e.g. [model.window]."""


class DataConfig(Group):
    files: tuple[LocalPath, ...] = ()
    """Paths and globs of the training text; none is the source of the running Python's own standard library."""
    tokenizer: LocalPath | None = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json; null is not known, of a model that came without one."""
    begin_token: str | None = None
    """The token before each document, by name; null is what the files beside the tokenizer.json say."""
    end_token: str | None = None
    """The token after each document, by name; null is what those files say. One token may do both."""
    cache_dir: LocalPath = "~/.cache/moescale"
    """The folder that tokenized text is kept in."""
    seq_len: int = Field(256, ge=1)
    """Tokens in a training sequence."""
    global_batch: int = Field(16, ge=1)
    """Sequences in a step, over all ranks."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences in one pass of a rank, at most its share, which null is; more passes add up their gradients."""
    held_out: float = Field(0.02, gt=0, lt=1)
    """Share of the documents that is kept for evaluation and never trained on, chosen by a hash of each one's text."""
    held_out_files: tuple[LocalPath, ...] = ()
    """Paths and globs of text to evaluate on instead; data.held_out then takes nothing from data.files."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the document."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """What happens to documents that cannot be read: the first ends the run, or they are left out and counted."""
    max_epochs: float | None = Field(None, gt=0)
    """Times that the training text may be seen; null is 50 for Python's own library and no limit for data.files."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("begin_token", "end_token"):
            refuse(self.tokenizer == "bytes" and getattr(self, key) is not None,
                   f"data.{key}={getattr(self, key)} means nothing to data.tokenizer=bytes: write data.{key}=null, or "
                   "data.tokenizer=PATH of a tokenizer.json that has this token")
        return self


class LayerConfig(Group):
    """One entry of `model.pattern`: what mixes tokens, what mixes features."""

    mixer: Literal["attention"] = "attention"
    """What mixes the positions of a sequence."""
    channel_mixer: Literal["feed_forward", "moe"] = "moe"
    """What mixes the features of a position: one feed-forward, or a mixture of experts."""


class ModelConfig(Group):
    vocab_size: int = Field(384, ge=2)
    """Rows of the embedding and the head: at least as many as the tokenizer has tokens."""
    d_model: int = Field(256, ge=8)
    """Features of a position between the layers."""
    num_layers: int = Field(4, ge=1, le=10_000)
    """Layers, each with one mixer and one channel mixer."""
    num_heads: int = Field(8, ge=1)
    """Query heads of attention."""
    num_kv_heads: int = Field(2, ge=1)
    """Key and value heads of attention, each shared by as many query heads."""
    head_dim: int = Field(32, ge=2)
    """Features of one head."""
    d_ff: int = Field(1024, ge=8)
    """Hidden features of a dense feed-forward."""
    activation: Activation = "swiglu"
    """The nonlinearity of a dense feed-forward; swiglu and geglu have a gate."""
    window: int | None = Field(None)
    """Positions that a query sees, itself included; null is all before it."""
    positions: Literal["rope", "alibi", "none"] = "rope"
    """How attention knows the order: rotated queries and keys, biases by distance, or not at all."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the wavelengths of rope: larger for longer contexts."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """How features are normalized before each mixer."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in a norm, so that nothing is divided by zero."""
    block: Literal["serial", "parallel"] = "serial"
    """`serial` has a norm before each mixer; `parallel` one norm for both, side by side (PaLM)."""
    tied_embeddings: bool = False
    """Whether the head's weight is the embedding's."""
    scale_logits: bool = False
    """Whether logits are divided by sqrt(d_model), as T5 and PaLM do with tied embeddings."""
    init: Literal["normal", "fan_in", "switch"] = "normal"
    """Deviation of the first weights: 0.02; 1/sqrt(fan in) (PaLM); a truncated one (Switch)."""
    z_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the squared log-normalizer of the output softmax in the loss (PaLM: 1e-4)."""
    pattern: tuple[LayerConfig, ...] = (LayerConfig(),)
    """The kinds of layers, repeated over num_layers."""

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
    num_experts: int = Field(8, ge=1, le=100_000)
    """Experts of a mixture, among which the router chooses."""
    top_k: int = Field(2, ge=1)
    """Experts that a token gets."""
    num_shared_experts: int = Field(0, ge=0)
    """Experts next to those, which all tokens use."""
    router: Literal["mixtral", "switch", "gshard", "sigmoid_bias", "expert_choice", "sinkhorn"] = "mixtral"
    """How tokens find experts; moe/routers/__init__.py says how each weighs, balances and drops."""
    capacity_factor: float | None = Field(None, gt=0)
    """Slots of an expert in each sequence, over its even share; null drops nothing."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """The same in evaluation; null is capacity_factor; generating text never drops."""
    min_capacity: int = Field(1, ge=1)
    """Slots that an expert has in any case, in each sequence."""
    drop_by: Literal["position", "probability"] = "position"
    """Who finds no slot: later tokens, or those of which the router is less sure."""
    left_behind_choices: int = Field(1, ge=1)
    """With `switch`: experts that a token tries, best first, until one has a slot left."""
    d_ff: int = Field(512, ge=8)
    """Hidden features of one expert."""
    activation: Activation = "swiglu"
    """The nonlinearity of an expert; swiglu and geglu have a gate."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """The router's input is multiplied by a random number in 1 +- this while training (Switch)."""
    expert_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the hidden features in experts that is dropped while training (Switch's fine-tuning)."""
    load_balance_coefficient: float = Field(0.01, ge=0)
    """Weight of the load balance loss, which keeps experts equally busy."""
    balance_over: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """Tokens over which the balance loss takes its means: those of a sequence, a pass or a whole step."""
    router_z_coefficient: float = Field(0.0, ge=0)
    """Weight of the router z-loss, which keeps the router's logits small (ST-MoE: 1e-3)."""
    num_expert_groups: int = Field(1, ge=1)
    """With `sigmoid_bias`: groups that the experts lie in."""
    top_k_groups: int = Field(1, ge=1)
    """With `sigmoid_bias`: groups that a token's experts come from, by the sum of their best top_k / top_k_groups."""
    routed_scaling: float = Field(1.0, gt=0)
    """With `sigmoid_bias`: what the weights of a token's experts add up to."""
    bias_update_rate: float = Field(0.001, ge=0)
    """With `sigmoid_bias`: how far the bias of each expert moves in a step."""

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
    dp_replicate: int = Field(1, ge=1)
    """Copies of the sharded model (HSDP)."""
    dp_shard: int = Field(-1, ge=-1)
    """Ranks that share one copy of the model (FSDP2); -1 is all that are left."""
    tp: int = Field(1, ge=1)
    """Ranks that share each matrix of attention, dense feed-forward, embedding and head."""
    cp: int = Field(1, ge=1)
    """Ranks that share each sequence."""
    pp: int = Field(1, ge=1)
    """Ranks in a row, each with layers of about equal cost."""
    ep: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    etp: int = Field(1, ge=1)
    """Ranks that share each expert."""
    dispatcher: Literal["all_to_all", "hierarchical", "all_gather"] = "all_to_all"
    """How tokens travel to their experts: straight, among the nodes first, or all tokens to all ranks."""
    dispatch_chunks: int = Field(1, ge=1)
    """Parts in which tokens travel, each while the experts compute another."""
    node_ranks: int | None = Field(None, ge=1)
    """Ranks of one node, for `hierarchical`; null is as many as were started there."""
    row_budget: float | None = Field(None, gt=0)
    """Rows that a rank's experts take at a time, over an even share; null is all."""
    over_budget: Literal["passes", "drop"] = "passes"
    """What happens to rows beyond row_budget: further passes, or the lightest are dropped in training."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    """The order of passes in a pipeline."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What runs again in backward to save memory: feed-forwards and experts, or whole blocks."""
    compile: bool = False
    """Whether blocks are compiled by torch.compile."""

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
    """The optimizer."""
    lr: float = Field(1e-3, gt=0)
    """The learning rate after warmup, the highest of the run."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How slowly AdamW's means of gradients and of their squares move."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, never on norms and embeddings."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warmup."""
    final_lr_share: float = Field(0.1, ge=0, le=1)
    """The last step's learning rate, over lr."""
    clip_norm: float | None = Field(1.0, gt=0)
    """The largest norm of the gradient over all parameters; null clips nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(not all(0 <= beta < 1 for beta in self.betas),
                f"optim.betas={list(self.betas)}: both must be at least 0 and below 1, e.g. [0.9, 0.95]")
        return self


class PrecisionConfig(Group):
    compute: Literal["float32", "bfloat16", "float64"] = "float32"
    """What matrices multiply in; weights and optimizer state stay float32; float64 is for proofs."""


class CheckpointConfig(Group):
    every: int = Field(1000, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    every_minutes: float | None = Field(None, gt=0, le=LONGEST_SECONDS / 60)
    """Minutes after the last checkpoint at which another one is written, beside those that steps ask for."""
    keep: int = Field(3, ge=1)
    """Checkpoints that are kept, the newest ones."""
    timeout_seconds: float = Field(1800.0, ge=1, le=LONGEST_SECONDS)
    """A rank that waits longer than this for the others to write or read a checkpoint ends the run."""


class MonitorConfig(Group):
    every: int = Field(10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two evaluations; null is after the last step only."""
    eval_sequences: int = Field(64, ge=1)
    """Held-out sequences in an evaluation."""
    moved_every: int | None = Field(50, ge=1)
    """Steps between two looks at how far routing moved; null never looks."""
    alert_dropped: float = Field(0.5, ge=0, le=1)
    """Share of the choices that may have no row before an alert."""
    trace: str | None = None
    """`steps:10-12` writes each token's experts and weights in these steps to Parquet files."""
    profile: str | None = None
    """`steps:5-7` writes the time of each operation in these steps, for Perfetto."""
    wandb: Literal["off", "auto", "offline", "online"] = "off"
    """Whether Weights & Biases gets the figures; `auto` is online where there is a key, else offline."""
    wandb_project: Annotated[str, AfterValidator(_check_project)] = "moescale"
    """The project that runs belong to in Weights & Biases."""
    wandb_artifacts: bool = False
    """Whether configuration, code and the place of each checkpoint are kept there."""

    @property
    def trace_steps(self) -> range:
        return _steps("trace", self.trace)

    @property
    def profile_steps(self) -> range:
        return _steps("profile", self.profile)

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
