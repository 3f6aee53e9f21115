"""Make the user's run small enough for a laptop, its structure untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moescale.config import Config, ModelConfig, MoEConfig, sequence_pieces
from moescale.optim.base import OPTIMIZERS
from moescale.spec.attention import AttentionConfig
from moescale.verify.candidates import Layout

MICRO_BATCHES = (1, 3)  # a rank's passes in one step that every layout is tried with


def shrink(config: Config, layouts: Sequence[Layout]) -> Config:
    """Shrink sizes, and nothing but sizes, to the smallest that keep every kind of part and fit all the layouts.

    layouts: that fit the configuration itself. Each takes the path through the program that it takes there: key heads
    that are cut stay cut, experts are more than top_k, a window stays shorter than a sequence.
    """
    micro_batch = 2 if config.moe.balance_over == "micro_batch" else None  # else any number of passes is the same
    share = max(MICRO_BATCHES) * (micro_batch or 1)
    seq_len = _multiple(24, (sequence_pieces(layout.cp, config.longest_window) * layout.tp for layout in layouts))
    shrinks: dict[str, Callable[[Any], Any]] = {  # of each kind of layer
        "attention": lambda kind: _shrink_attention(kind, layouts, config.data.seq_len, seq_len),
        "feed_forward": lambda kind: kind.model_copy(update={
            "d_ff": _multiple(32, (8, *(layout.tp for layout in layouts)))}),
        "moe": lambda kind: _shrink_moe(kind, layouts),
    }
    pattern = []
    for number, entry in enumerate(config.model.pattern):
        layer = config.layers[number % config.model.num_layers]
        small = {entry.mixer: shrinks[entry.mixer](layer.mixer),
                 entry.channel_mixer: shrinks[entry.channel_mixer](layer.channel_mixer)}
        pattern.append(entry.model_copy(update={
            kind: {key: getattr(values, key) for key in getattr(entry, kind)} for kind, values in small.items()}))
    update = {
        "model": _shrink_model(config.model, layouts).model_copy(update={"pattern": tuple(pattern)}),
        **{kind: shrinks[kind](getattr(config, kind)) for kind in shrinks},
        "data": config.data.model_copy(update={
            "seq_len": seq_len, "micro_batch": micro_batch, "tokenizer": "none.json",  # batches are made up
            "global_batch": _multiple(24, (share * each.dp_replicate * each.dp_shard for each in layouts)),
        }),
        "optim": config.optim.model_copy(update={
            **OPTIMIZERS[config.optim.name].proof, "warmup_steps": 0, "schedule": "constant",
        }),
        "parallel": config.parallel.model_copy(update={"compile": False}),  # compiling takes longer than all the rest
        "run": config.run.model_copy(update={"steps": 1, "timeout_seconds": 60.0}),
    }
    return config.model_copy(update=update)


def _shrink_model(model: ModelConfig, layouts: Sequence[Layout]) -> ModelConfig:
    cuts = [n for each in layouts for n in (
        each.dp_shard * each.cp, each.dp_shard * each.cp * each.tp // (each.ep * each.etp))]
    longest = max(layout.pp for layout in layouts)
    stages = 2 * longest if longest <= 4 else longest  # two each, so that schedules that interleave run too
    return model.model_copy(update={
        "vocab_size": _multiple(64, (layout.tp for layout in layouts)), "d_model": _multiple(32, (8, *cuts)),
        "num_layers": _multiple(max(2, stages), [len(model.pattern)]),
    })


def _shrink_attention(
    attention: AttentionConfig, layouts: Sequence[Layout], seq_len: int, new_seq_len: int
) -> AttentionConfig:
    tps = [layout.tp for layout in layouts]
    group, kv_heads = attention.num_heads // attention.num_kv_heads, attention.num_kv_heads
    num_kv_heads = _smallest_divisor(kv_heads, min(2, kv_heads), lambda heads: all(
        _path(heads, tp) == _path(kv_heads, tp) and heads * group % tp == 0 for tp in tps))
    group = _smallest_divisor(group, min(2, group), lambda each: all(num_kv_heads * each % tp == 0 for tp in tps))
    window = attention.window
    if window is not None:
        scaled = round(new_seq_len * window / seq_len)
        window = new_seq_len if window >= seq_len else min(max(scaled, 3), new_seq_len - 1)
    return attention.model_copy(update={
        "head_dim": 8, "num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "window": window})


def _shrink_moe(moe: MoEConfig, layouts: Iterable[Layout]) -> MoEConfig:
    layouts = list(layouts)
    enough = min(moe.num_experts, max(2 * moe.top_k + 2, -(-moe.top_k // moe.top_k_groups) * moe.num_expert_groups,
                                      moe.left_behind_choices + 1))
    experts = _smallest_divisor(moe.num_experts, enough, lambda n: all(
        n % group == 0 for group in (moe.num_expert_groups, *(layout.ep for layout in layouts))))
    return moe.model_copy(update={
        "num_experts": experts, "min_capacity": min(moe.min_capacity, 2),  # below what the factor gives, mostly
        "d_ff": _multiple(16, (8, *(layout.etp for layout in layouts)))})


def _path(kv_heads: int, tp: int) -> str:
    if kv_heads % tp == 0:
        return "cut"
    return "shared" if tp % kv_heads == 0 else "neither"


def _smallest_divisor(number: int, least: int, good: Callable[[int], bool]) -> int:
    """The smallest divisor from `least` on that is good; the number itself is."""
    return next(n for n in range(least, number + 1) if number % n == 0 and good(n))


def _multiple(least: int, divisors: Iterable[int]) -> int:
    """The smallest number from `least` on that all of these divide."""
    common = math.lcm(*divisors)
    return -(-least // common) * common
