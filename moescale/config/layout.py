"""Which layouts a run can have: what depends on the number of ranks is settled, what does not fit refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moescale.config.groups import ParallelConfig
from moescale.errors import any_of, divisors, factors, refuse, round_up
from moescale.spec.feed_forward import FeedForwardConfig
from moescale.spec.moe import MoEConfig

if TYPE_CHECKING:
    from moescale.config.run import Config


def settle(config: Config, world_size: int, node_ranks: int | None) -> Config:
    """Settle what depends on the number of ranks, of all nodes and of one, and refuse what does not fit them."""
    parallel = _settle_ranks(config, world_size)
    _check_experts(config, parallel)
    refuse(config.precision.reduce != "float32" and parallel.dp_replicate > 1,
           f"precision.reduce={config.precision.reduce} does not reach what copies of the model add up, "
           f"parallel.dp_replicate={parallel.dp_replicate}: write parallel.dp_replicate=1, so that dp_shard takes "
           "their ranks, or precision.reduce=float32")
    parallel = _settle_nodes(parallel, node_ranks or world_size)
    for mixer in {layer.mixer for layer in config.layers}:
        mixer.refuse(config.model.d_model, parallel.tp, parallel.cp)
    _check_tensor(config, parallel)
    _check_context(config, parallel)
    micro_batch = _settle_micro_batch(config, parallel)
    for batch in config.data.batches:
        _check_pipeline(config, parallel, batch // (parallel.dp_replicate * parallel.dp_shard) // micro_batch)
    return config.model_copy(update={
        "parallel": parallel, "data": config.data.model_copy(update={"micro_batch": micro_batch}),
    })


def sequence_pieces(cp: int, window: int | None) -> int:
    """How many equal pieces the ranks of `cp` cut a sequence into.

    window: None where a mixer looks at all positions before. Later pieces then cost more, and each rank takes one from
    both ends; otherwise every piece costs the same.
    """
    return cp if cp == 1 or window is not None else 2 * cp


def _settle_ranks(config: Config, world_size: int) -> ParallelConfig:
    parallel = config.parallel
    degrees = {key: getattr(parallel, key) for key in ("dp_replicate", "tp", "cp", "pp")}
    fixed = math.prod(degrees.values())
    product = " x ".join(f"parallel.{key}={degree}" for key, degree in degrees.items() if degree > 1)
    refuse(world_size % fixed != 0,
            f"{product} is {fixed} ranks, which must divide the {world_size} that were started: "
            f"use {divisors(world_size)}")
    left = world_size // fixed
    dp_shard = left if parallel.dp_shard == -1 else parallel.dp_shard
    product = " x ".join(part for part in (product, f"parallel.dp_shard={dp_shard}") if part)
    refuse(dp_shard != left, f"{product} is {fixed * dp_shard} ranks, but {world_size} were started: "
            f"write parallel.dp_shard={left} or -1")
    return parallel.model_copy(update={"dp_shard": dp_shard})


def _check_experts(config: Config, parallel: ParallelConfig) -> None:
    model, moe, ep, etp = config.model, config.moe, parallel.ep, parallel.etp
    sharing = parallel.dp_shard * parallel.cp * parallel.tp
    for key, degree in (("ep", ep), ("etp", etp)):
        refuse(degree > 1 and config.num_moe_layers == 0,
                f"parallel.{key}={degree}, but model.pattern has no moe layer: write parallel.{key}=1")
    allowed = [n for n in factors(math.gcd(sharing, moe.num_experts)) if sharing % (n * etp) == 0]
    for d_ff in {layer.channel_mixer.d_ff for layer in config.layers if isinstance(layer.channel_mixer, MoEConfig)}:
        refuse(sharing % etp != 0 or d_ff % etp != 0,
               f"parallel.etp={etp} must divide moe.d_ff={d_ff} and dp_shard x cp x tp={sharing} "
               f"(the ranks that share one copy of the model): use {divisors(math.gcd(sharing, d_ff))}")
    refuse(moe.num_experts % ep != 0,
            f"parallel.ep={ep} must divide moe.num_experts={moe.num_experts}: use {any_of(allowed)}")
    refuse(sharing % (ep * etp) != 0,
            f"parallel.ep={ep} x parallel.etp={etp} must divide dp_shard x cp x tp={sharing} "
            f"(the ranks that share one copy of the model): use parallel.ep={any_of(allowed)}")
    efsdp = sharing // (ep * etp)
    refuse(config.num_moe_layers > 0 and model.d_model % efsdp != 0,
            f"each expert is split over {efsdp} ranks (dp_shard x cp x tp={sharing} / ep={ep} / etp={etp}), which "
            f"must divide model.d_model={model.d_model}: use a larger parallel.ep or parallel.dp_replicate")


def _settle_nodes(parallel: ParallelConfig, started: int) -> ParallelConfig:
    """started: ranks on each node."""
    if parallel.dispatcher != "hierarchical":
        return parallel
    ranks, node = parallel.ep * parallel.etp, parallel.node_ranks or started
    fits = [n for n in range(parallel.etp, ranks + 1, parallel.etp) if ranks % n == 0]
    refuse(ranks > node and node not in fits,
           f"parallel.dispatcher=hierarchical with {node} ranks a node cannot share out the {ranks} ranks of "
           f"parallel.ep={parallel.ep} x parallel.etp={parallel.etp}: write parallel.node_ranks={any_of(fits)}, or "
           "parallel.dispatcher=all_to_all")
    return parallel.model_copy(update={"node_ranks": node})


def _check_tensor(config: Config, parallel: ParallelConfig) -> None:
    model, tp, layers = config.model, parallel.tp, set(config.layers)
    if tp == 1:
        return
    sizes = [share for layer in layers for share in layer.mixer.shares(model.d_model).items()]
    sizes += [("feed_forward.d_ff", layer.channel_mixer.d_ff) for layer in layers
              if isinstance(layer.channel_mixer, FeedForwardConfig)]
    sizes.append(("model.vocab_size", model.vocab_size))
    for name, size in sizes:
        refuse(size % tp != 0, f"parallel.tp={tp} must divide {name}={size}: "
               f"use {divisors(math.gcd(*(size for _, size in sizes)))}")
    fsdp = parallel.dp_shard * parallel.cp
    refuse(model.d_model % fsdp != 0,
            f"with parallel.tp={tp}, dp_shard x cp={fsdp} must divide model.d_model={model.d_model}: "
            "use a larger parallel.dp_replicate")
    for weight in {weight for layer in layers for weight in layer.mixer.weights(model.d_model, model.init)}:
        if weight.cut is not None:  # FSDP then cuts the first dim that tp does not
            index = next(index for index, dim in enumerate(weight.dims) if dim != weight.cut)
            size = weight.shape[index]
            refuse(size % fsdp != 0,
                   f"with parallel.tp={tp}, dp_shard x cp={fsdp} must divide the {size} {weight.dims[index]} of the "
                   f"mixers' {weight.name[0]}: use a larger parallel.dp_replicate")


def _check_context(config: Config, parallel: ParallelConfig) -> None:
    pieces = sequence_pieces(parallel.cp, config.longest_window) * parallel.tp
    seq = config.data.seq_len
    refuse(seq % pieces != 0,
            f"data.seq_len={seq} must be a multiple of {pieces} for parallel.cp={parallel.cp} and "
            f"parallel.tp={parallel.tp}: use {round_up(seq, pieces)}")


def _settle_micro_batch(config: Config, parallel: ParallelConfig) -> int:
    data, batch_ranks = config.data, parallel.dp_replicate * parallel.dp_shard
    for batch in data.batches:
        first = batch == data.global_batch
        named = f"data.global_batch={batch}" if first else f"data.batch_schedule: a step of {batch}"
        refuse(batch % batch_ranks != 0, f"{named} must be a multiple of the {batch_ranks} ranks that share it: "
               f"use {round_up(batch, batch_ranks)}")
    shares = [batch // batch_ranks for batch in data.batches]
    share, fewest = math.gcd(*shares), min(shares)
    if data.micro_batch is not None and data.micro_batch > fewest and config.moe.balance_over != "micro_batch":
        return share  # as few passes as there can be; a file that suits few ranks suits more
    if data.micro_batch is not None:
        refuse(share % data.micro_batch != 0,
                f"data.micro_batch={data.micro_batch} must divide a rank's share of {any_of(sorted(set(shares)))} "
                f"sequences (data.global_batch={data.global_batch} over {batch_ranks} ranks): use {divisors(share)}")
        return data.micro_batch
    return share if parallel.pp == 1 else max(
        n for n in factors(share) if fewest // n >= parallel.pp or n == 1)


def _check_pipeline(config: Config, parallel: ParallelConfig, passes: int) -> None:
    pp, schedule = parallel.pp, parallel.pp_schedule
    if pp == 1:
        return
    refuse(parallel.pp_stages > config.model.num_layers,
            f"parallel.pp={pp} cuts the model into {parallel.pp_stages} stages of at least one layer, but "
            f"model.num_layers={config.model.num_layers}: use parallel.pp="
            f"{max(1, config.model.num_layers // (parallel.pp_stages // pp))} or less")
    refuse(schedule == "1f1b" and passes < pp,
            f"parallel.pp_schedule=1f1b needs at least parallel.pp={pp} micro-batches a step, but a rank makes "
            f"{passes}: write a smaller data.micro_batch or parallel.pp_schedule=gpipe")
    rounds = max(1, passes // pp)
    refuse(schedule in ("interleaved_1f1b", "zero_bubble") and passes % rounds != 0,
            f"parallel.pp_schedule={schedule} runs {passes} micro-batches in {rounds} rounds: write a "
            f"data.micro_batch that gives a multiple of parallel.pp={pp}, or parallel.pp_schedule=1f1b")
    refuse(config.model.residual == "rezero" and schedule == "zero_bubble",
           "model.residual=rezero uses one weight twice in a layer, whose backward parallel.pp_schedule=zero_bubble "
           "cannot split: write 1f1b")
    refuse(parallel.compile and schedule == "zero_bubble",
            "parallel.compile=true cannot split backward as parallel.pp_schedule=zero_bubble does: write 1f1b")
