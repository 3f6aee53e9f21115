"""Make the user's run small enough for a laptop, its structure untouched."""

from __future__ import annotations

from collections.abc import Sequence

from moescale.config import Config, ModelConfig, sequence_pieces
from moescale.optim.base import OPTIMIZERS
from moescale.spec.model import KINDS
from moescale.spec.small import Small, smallest_multiple
from moescale.verify.candidates import Layout

MICRO_BATCHES = (1, 3)  # a rank's passes in one step that every layout is tried with


def shrink(config: Config, layouts: Sequence[Layout]) -> Config:
    """Shrink sizes, and nothing but sizes, to the smallest that keep every kind of part and fit all the layouts.

    layouts: that fit the configuration itself. Each takes the path through the program that it takes there: key heads
    that are cut stay cut, experts are more than top_k, a window stays shorter than a sequence.
    """
    micro_batch = 2 if config.moe.balance_over == "micro_batch" else None  # else any number of passes is the same
    share = max(MICRO_BATCHES) * (micro_batch or 1)
    pieces = [sequence_pieces(layout.cp, config.longest_window) * layout.tp for layout in layouts]
    seq_len = smallest_multiple(24, pieces)
    small = Small(
        tuple(layout.tp for layout in layouts), tuple(layout.ep for layout in layouts),
        tuple(layout.etp for layout in layouts), config.data.seq_len, seq_len)
    pattern = []
    for number, entry in enumerate(config.model.pattern):
        layer = config.layer_of(number)
        parts = {entry.mixer: layer.mixer, entry.channel_mixer: layer.channel_mixer}
        shrunk = {kind: part.shrink(small) for kind, part in parts.items() if part is not None}
        pattern.append(entry.model_copy(update={
            kind: {key: getattr(values, key) for key in getattr(entry, kind)} for kind, values in shrunk.items()}))
    update = {
        "model": _shrink_model(config.model, layouts).model_copy(update={"pattern": tuple(pattern)}),
        **{kind: getattr(config, kind).shrink(small) for kind in KINDS},
        "data": config.data.model_copy(update={
            "seq_len": seq_len, "micro_batch": micro_batch, "tokenizer": "none.json",  # batches are made up
            "batch_schedule": (),
            "global_batch": smallest_multiple(24, (share * each.dp_replicate * each.dp_shard for each in layouts)),
        }),
        "optim": config.optim.model_copy(update={
            **OPTIMIZERS[config.optim.name].proof, "warmup_steps": 0, "schedule": "constant",
        }),
        "precision": config.precision.model_copy(update={"reduce": "float32"}),  # what is rounded differs by layout
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
        "vocab_size": smallest_multiple(64, (layout.tp for layout in layouts)),
        "d_model": smallest_multiple(32, (8, *cuts, *(layout.tp for layout in layouts))),
        "num_layers": smallest_multiple(max(2, stages), [len(model.pattern)]),
    })
