"""What differs between a run and the checkpoint that it goes on from, and what of it is known to be harmless.

Harmless is what no weight, no count and no choice of text depends on, and what may well be another in each stretch of
a run, such as the learning rate. Every other key is refused unless `run.allow_changes` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moescale.config.run import Config
from moescale.spec.model import KINDS, MIXERS

LONGEST = 200  # letters of a value that are shown
HARMLESS = frozenset({
    "run.engine", "run.zero_stage", "run.deepspeed", "run.dir", "run.steps", "run.timeout_seconds",
    "run.time_limit_minutes", "run.audit_every", "run.allow_changes",
    "data.cache_dir", "data.global_batch", "data.batch_schedule", "data.max_epochs",
    "model.init",  # the weights are there
    "optim.lr", "optim.warmup_steps", "optim.schedule", "optim.final_lr_share", "optim.stable_steps",
    "optim.decay_steps", "optim.weight_decay",
    "optim.clip_norm", "optim.clip_update",  # not those with which the moments in the checkpoint were made
    *(f"parallel.{key}" for key in (
        "dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp", "dispatcher", "dispatch_chunks", "node_ranks",
        "elastic", "pp_schedule", "recompute", "compile")),
})
HARMLESS_GROUPS = frozenset({"checkpoint", "monitor", "spikes"})
OF_TRAINING = frozenset({  # of a model's groups: acts on how weights are trained, not on what they compute
    "model.init", "model.z_loss_coefficient", "moe.load_balance_coefficient", "moe.router_z_coefficient",
    "moe.balance_over", "moe.jitter", "moe.expert_dropout", "moe.bias_update_rate",
})
OF_SEQUENCES = frozenset({  # of the group data: acts on how the tokens are cut, not on which there are
    "data.cache_dir", "data.seq_len", "data.global_batch", "data.batch_schedule", "data.micro_batch", "data.max_epochs",
})


@dataclass(frozen=True)
class Difference:
    """A key with its value in the checkpoint and its value now."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}={_written(self.new)} (was {_written(self.old)})"

    @property
    def as_it_was(self) -> str:
        return f"{self.key}={_written(self.old)} (now {_written(self.new)})"


def differences(old: Config, new: Config) -> list[Difference]:
    """List the keys whose values differ, in the order of the groups."""
    before, after = (config.model_dump(mode="json") for config in (old, new))
    return [Difference(f"{group}.{key}", before[group][key], after[group][key])
            for group in after for key in after[group] if before[group][key] != after[group][key]]


def is_harmless(key: str, old: Config, new: Config) -> bool:
    """Say whether a run may go on with another value of this key; of the text, only fingerprints can tell."""
    if key == "data.micro_batch":
        return all(config.moe.balance_over != "micro_batch" for config in (old, new))
    if key == "parallel.row_budget":
        return all(config.parallel.over_budget != "drop" for config in (old, new))
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_GROUPS or not (_acts(key, old) or _acts(key, new)) or (
        key == "model.pattern" and old.model.layers == new.model.layers)


def decides_text(key: str) -> bool:
    """Say whether the key has a part in which tokens there are and which of them are held out."""
    return key.startswith("data.") and key not in OF_SEQUENCES


def decides_function(key: str) -> bool:
    """Say whether what a model computes from its weights depends on the key."""
    return key.partition(".")[0] in ("model", *KINDS) and key not in OF_TRAINING


def is_allowed(key: str, allow: Iterable[str]) -> bool:
    """Say whether `run.allow_changes` names the key or its group."""
    return bool({key, key.partition(".")[0]} & set(allow))


def _acts(key: str, config: Config) -> bool:
    """Say whether the key means anything to this model."""
    if key.startswith("moe."):
        return config.num_moe_layers > 0
    if key.startswith("feed_forward."):
        return any(layer.channel_mixer == "feed_forward" for layer in config.model.layers)
    group, _, name = key.partition(".")
    return group not in MIXERS or any(
        isinstance(layer.mixer, MIXERS[group]) and layer.mixer.acts(name) for layer in config.layers)


def _written(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
