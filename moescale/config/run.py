"""A whole run: its groups, and what concerns several of them."""

from __future__ import annotations

import difflib
from typing import Self

import yaml
from pydantic import Field, model_validator

from moescale.config.elastic import settle_elastic
from moescale.config.groups import (
    CheckpointConfig,
    DataConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    SpikesConfig,
)
from moescale.config.layout import settle
from moescale.errors import refuse, without_secrets
from moescale.spec.attention import AttentionConfig
from moescale.spec.feed_forward import FeedForwardConfig
from moescale.spec.group import Group
from moescale.spec.hippo import HippoConfig
from moescale.spec.linear_attention import LinearAttentionConfig
from moescale.spec.lmu import LmuConfig
from moescale.spec.lssl import LsslConfig
from moescale.spec.mamba import MambaConfig
from moescale.spec.mamba2 import Mamba2Config
from moescale.spec.model import Layer, ModelConfig, with_changes
from moescale.spec.moe import MoEConfig
from moescale.spec.s4 import S4Config

MOST_EXPERTS = 1_000_000  # of all layers
MOVED = {  # keys of earlier versions: where they are now
    **{f"model.{name}": f"attention.{name}" for name in (
        "num_heads", "num_kv_heads", "head_dim", "window", "positions", "rope_theta")},
    **{f"model.{name}": f"feed_forward.{name}" for name in ("d_ff", "activation")},
}


class Config(Group):
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    hippo: HippoConfig = Field(default_factory=HippoConfig)
    lmu: LmuConfig = Field(default_factory=LmuConfig)
    linear_attention: LinearAttentionConfig = Field(default_factory=LinearAttentionConfig)
    mamba: MambaConfig = Field(default_factory=MambaConfig)
    lssl: LsslConfig = Field(default_factory=LsslConfig)
    s4: S4Config = Field(default_factory=S4Config)
    mamba2: Mamba2Config = Field(default_factory=Mamba2Config)
    feed_forward: FeedForwardConfig = Field(default_factory=FeedForwardConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    spikes: SpikesConfig = Field(default_factory=SpikesConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the model, each with the keys of its own kinds."""
        kinds = [self.layer_of(number) for number in range(len(self.model.pattern))]
        return tuple(kinds[index % len(kinds)] for index in range(self.model.num_layers))

    @property
    def longest_window(self) -> int | None:
        """The most positions that one of any layer looks at; None where one looks at all before it."""
        windows = [layer.mixer.seen for layer in self.layers]
        return None if None in windows else max(window for window in windows if window is not None)

    def layer_of(self, number: int) -> Layer:
        """Lay the keys of an entry of the pattern over those of its kinds. Raises ConfigError for what none can be."""
        entry, where = self.model.pattern[number], f"model.pattern.{number}"
        mixer, channel_mixer = (
            None if kind == "none" else with_changes(getattr(self, kind), getattr(entry, kind), f"{where}.{kind}")
            for kind in (entry.mixer, entry.channel_mixer))
        assert mixer is not None
        return Layer(mixer, channel_mixer)

    @property
    def num_moe_layers(self) -> int:
        return sum(layer.channel_mixer == "moe" for layer in self.model.layers)

    def for_world(self, world_size: int, node_ranks: int | None = None) -> Config:
        """Settle what depends on the number of ranks (`dp_shard: -1`, `micro_batch`) and refuse what does not fit.

        world_size: ranks of the whole job. node_ranks: of one node; None = all. -> the run, nothing left to derive
        """
        settle_for = settle_elastic if self.parallel.elastic else settle
        return settle_for(self, world_size, node_ranks)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_secrets()
        self._check_allowed()
        for number in range(len(self.model.pattern)):
            self.layer_of(number)
        experts = self.model.num_layers * self.moe.num_experts
        refuse(experts > MOST_EXPERTS, f"model.num_layers={self.model.num_layers} x moe.num_experts="
               f"{self.moe.num_experts} is {experts:,} experts: write at most {MOST_EXPERTS:,}")
        refuse(self.data.tokenizer == "bytes" and self.model.vocab_size < 257,
                f"model.vocab_size={self.model.vocab_size} is too small for data.tokenizer=bytes "
                "(256 bytes and the start of a document): write at least 257")
        refuse(self.optim.warmup_steps >= self.run.steps and self.optim.warmup_steps > 0,
                f"optim.warmup_steps={self.optim.warmup_steps} must be below run.steps={self.run.steps}")
        refuse(self.moe.balance_over == "micro_batch" and self.data.micro_batch is None,
                "moe.balance_over=micro_batch needs sequences that are the same in every layout: write e.g. "
                "data.micro_batch=1, or moe.balance_over=global_batch")
        refuse(self.moe.router == "sigmoid_bias" and self.parallel.over_budget == "drop",
                "moe.router=sigmoid_bias balances by loads, of which parallel.over_budget=drop hides what is over: "
                "write parallel.over_budget=passes")
        refuse(self.optim.warmup_steps + self.optim.decay_steps > self.run.steps,
               f"optim.warmup_steps={self.optim.warmup_steps} and optim.decay_steps={self.optim.decay_steps} are more "
               f"than run.steps={self.run.steps}: write fewer")
        if self.model.embedding_positions != "none":
            mixers = [layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionConfig)]
            for positions in {mixer.positions for mixer in mixers}:
                refuse(positions != "none", f"model.embedding_positions={self.model.embedding_positions} and "
                       f"attention.positions={positions} say the same twice: write attention.positions=none, or "
                       "model.embedding_positions=none")
        if self.spikes.deviations is not None or self.spikes.on_not_finite == "back":
            self._check_spikes()
        return self

    def _check_spikes(self) -> None:
        """Refuse to keep fewer checkpoints than going back takes, or those that a clock chooses."""
        checkpoint, back = self.checkpoint, self.spikes.back
        keep = 1 + -(-back // checkpoint.every)
        refuse(checkpoint.keep < keep, f"spikes.back={back} steps before a spike must lie one of the checkpoints that "
               f"are kept: write checkpoint.keep={keep}, or a larger checkpoint.every than {checkpoint.every}")
        refuse(checkpoint.every_minutes is not None, "spikes goes back to checkpoints that steps ask for, which those "
               "of checkpoint.every_minutes would push out: write checkpoint.every_minutes=null")

    def _refuse_secrets(self) -> None:
        """Refuse passwords and tokens in URLs, since config.yaml, pages and checkpoints keep every value."""
        for name, group in self:
            for key, value in group:
                for text in value if isinstance(value, tuple) else (value,):
                    refuse(isinstance(text, str) and without_secrets(text) != text,
                           f"{name}.{key} holds a password or a token in a URL, which config.yaml would keep for all "
                           "to read: leave it out, and give it in the environment")

    def _check_allowed(self) -> None:
        """Refuse names that are no keys, which would allow nothing."""
        groups = {name: field.annotation for name, field in type(self).model_fields.items()}
        known = [*groups, *(f"{name}.{key}" for name, group in groups.items() for key in group.model_fields)]  # type: ignore[union-attr]
        for name in self.run.allow_changes:
            refuse(name in MOVED, f"run.allow_changes names {name}, which is {MOVED.get(name)} now: write that")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            refuse(name not in known, f"run.allow_changes names {name}, which is no key: "
                   + (f"did you mean {near[0]}?" if near else "write e.g. [attention.window], or a group: [model]"))
