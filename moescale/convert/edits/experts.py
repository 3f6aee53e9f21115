"""Other experts than the source's: a dense model's made into some, fewer of them, more of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moescale.config import Config, ConfigError, parse_config
from moescale.convert.copying import Recipe
from moescale.convert.fingerprint import has_rows
from moescale.convert.formats.native import native_weights
from moescale.convert.mapping.mapped import Opened, by_weight, read_weight
from moescale.convert.mapping.table import NativeName
from moescale.convert.run import Change
from moescale.spec.weights import Weight

ROUTER_STD = 0.02  # of the routers that an upcycled model begins with


def upcycle(opened: Opened, num_experts: int, top_k: int | None, granularity: int, noise: float) -> Change:
    """Make each dense feed-forward a mixture of experts that computes the same (Sparse Upcycling; He et al., 2024).

    granularity: parts that a copy is cut into along d_ff; a router gives all parts of a copy one score, and top_k takes
    whole copies. noise: share of each matrix's standard deviation that is added to it; the logits then change.
    """
    config, dense, parts = opened.config, opened.config.feed_forward, granularity
    top_k = 2 * parts if top_k is None else top_k
    if config.num_moe_layers:
        raise ConfigError("--upcycle takes a dense model; this one has experts: write --experts N for more of them")
    widths = {layer.channel_mixer.d_ff for layer in config.layers if layer.channel_mixer is not None}
    if not widths:
        raise ConfigError("--upcycle makes feed-forwards into experts, and this model has none")
    for key, number in (("--upcycle", num_experts), ("--top-k", top_k),
                        *(("feed_forward.d_ff", width) for width in widths)):
        if number % parts:
            raise ConfigError(f"--granularity {parts} must divide {key} {number}")
    pattern = []
    for entry in config.model.pattern:
        keys = {key: value // parts if key == "d_ff" else value for key, value in entry.feed_forward.items()}
        of_mixer = {"mixer": entry.mixer, entry.mixer: getattr(entry, entry.mixer)}
        kind = "none" if entry.channel_mixer == "none" else "moe"
        pattern.append({"channel_mixer": kind, **of_mixer, "moe": keys})
    changed = _with(config, model={"pattern": pattern}, moe={
        "num_experts": num_experts, "top_k": top_k, "d_ff": dense.d_ff // parts, "router": "mixtral",
        "activation": dense.activation,
    })
    recipes: dict[NativeName, Recipe] = {}
    for name, weight in native_weights(changed).items():
        if name.expert is not None:
            *mixer, _, part = name.weight  # of the mixture's experts
            take = _part(name.expert % parts, parts, columns=_reads_hidden(weight))
            recipes[name] = Recipe((NativeName((*mixer, part, "weight")),), _noisy(take, noise, name))
        elif has_rows(weight):
            recipes[name] = Recipe((), _random_rows(weight.shape, parts, name))
        else:
            recipes[name] = Recipe((name,))
    return Change(changed, recipes, f"upcycle {num_experts} {top_k} {parts} {noise}", noise == 0)


def _with(config: Config, **groups: Mapping[str, Any]) -> Config:
    """Give the run other values, checked as if they were read from a file."""
    values = config.model_dump(mode="json")
    values |= {group: {**values[group], **new} for group, new in groups.items()}
    return parse_config(values, "the new model")


def _reads_hidden(weight: Weight) -> bool:
    """Say whether a matrix of a feed-forward is the one that its hidden features meet."""
    return weight.dims[-1] == "d_ff"


def _part(index: int, count: int, columns: bool) -> Callable[[Iterator[Tensor]], Tensor]:
    """Take one part of a matrix along d_ff. Weights of a copy's parts are 1/count each, which `down` makes good for."""
    if columns:
        return lambda tensors: next(tensors).chunk(count, 1)[index] * count
    return lambda tensors: next(tensors).chunk(count)[index]


def _noisy(
    take: Callable[[Iterator[Tensor]], Tensor], noise: float, name: NativeName
) -> Callable[[Iterator[Tensor]], Tensor]:
    if not noise:
        return take

    def add(tensors: Iterator[Tensor]) -> Tensor:
        values = take(tensors)
        drawn = torch.randn(values.shape, generator=_generator(name))
        return values + (noise * values.float().std() * drawn).to(values.dtype)

    return add


def _random_rows(shape: Sequence[int], parts: int, name: NativeName) -> Callable[[Iterator[Tensor]], Tensor]:
    def draw(tensors: Iterator[Tensor]) -> Tensor:
        rows = torch.randn(shape[0] // parts, shape[1], generator=_generator(name))
        return (ROUTER_STD * rows).repeat_interleave(parts, 0)

    return draw


def _generator(name: NativeName) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:7], "big"))


def replicate(opened: Opened, num_experts: int, noise: float) -> Change:
    """Give every expert as many copies, beside it, with its row of the router; logits stay.

    A token goes to all copies of the experts that it went to, which share its weight. Switch goes to one copy, whose
    weight is its share of the probability: its `down` makes good for that.
    """
    config, moe = opened.config, opened.config.moe
    _need_experts(config, "--experts")
    times = num_experts // moe.num_experts
    if num_experts % moe.num_experts or times < 2:
        raise ConfigError(f"--experts {num_experts} must be a multiple of the {moe.num_experts} that there are")
    if moe.router == "gshard" or moe.top_k_groups < moe.num_expert_groups:
        what = "gshard takes two experts" if moe.router == "gshard" else "groups are chosen by a few of their experts"
        raise ConfigError(f"--experts cannot keep the logits of this model: {what}")
    one = moe.router == "switch"
    changed = _with(config, moe={
        "num_experts": num_experts, "top_k": moe.top_k * (1 if one else times),
        "capacity_factor": moe.capacity_factor and moe.capacity_factor * (1 if one else times),
    })
    recipes: dict[NativeName, Recipe] = {}
    for name, weight in native_weights(changed).items():
        if name.expert is not None:
            scale = times if one and _reads_hidden(weight) else 1
            original = name._replace(expert=name.expert // times)
            recipes[name] = Recipe((original,), _noisy(_scaled(scale), noise, name))
        elif has_rows(weight):
            recipes[name] = Recipe((name,), lambda tensors: next(tensors).repeat_interleave(times, 0))
        else:
            recipes[name] = Recipe((name,))
    return Change(changed, recipes, f"experts {num_experts} {noise}", noise == 0)


def _scaled(scale: int) -> Callable[[Iterator[Tensor]], Tensor]:
    return next if scale == 1 else lambda tensors: next(tensors) * scale


def _need_experts(config: Config, option: str) -> None:
    if not config.num_moe_layers:
        raise ConfigError(f"{option} needs a model with experts: write --upcycle N to make a dense one into such")


def reduce(opened: Opened, loads: Mapping[int, Sequence[int]], number: int, *, merge: bool) -> Change:
    """Leave out each layer's idlest experts, or merge each with the kept one that its router row is most like.

    loads: rows of each expert, by layer. number: experts less. Merged matrices are means weighed by load.
    """
    config, option = opened.config, "--merge-experts" if merge else "--drop-experts"
    _need_experts(config, option)
    left = config.moe.num_experts - number
    if left < config.moe.top_k or left < 1:
        raise ConfigError(f"{option} {number} leaves {left} experts, fewer than moe.top_k={config.moe.top_k}")
    if config.moe.num_expert_groups > 1:
        raise ConfigError(f"{option} would leave groups of unequal size: moe.num_expert_groups="
                          f"{config.moe.num_expert_groups}")
    changed = _with(config, moe={"num_experts": left})
    sources = {layer: _sources(opened, layer, counts, left, merge) for layer, counts in loads.items()}
    recipes: dict[NativeName, Recipe] = {}
    for name, weight in native_weights(changed).items():
        layer = name.layer or 0
        if name.expert is not None:
            merged = sources[layer][name.expert]
            mean = _mean([loads[layer][index] for index in merged])
            recipes[name] = Recipe(tuple(name._replace(expert=index) for index in merged), mean)
        elif has_rows(weight):
            recipes[name] = Recipe((name,), _rows(sources[layer], loads[layer]))
        else:
            recipes[name] = Recipe((name,))
    return Change(changed, recipes, f"{option} {number} {dict(loads)}", keeps_logits=False)


def _sources(opened: Opened, layer: int, counts: Sequence[int], left: int, merge: bool) -> list[list[int]]:
    """List for each kept expert, in order, the old ones that it is made of, itself first."""
    busiest = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    kept = sorted(busiest[:left])
    made = {expert: [expert] for expert in kept}
    if merge:
        name = NativeName(("blocks", str(layer), "channel_mixer", "router", "weight"))
        rows = torch.nn.functional.normalize(read_weight(opened, by_weight(opened.pieces)[name], name).float(), dim=-1)
        for expert in busiest[left:]:
            made[kept[int((rows[kept] @ rows[expert]).argmax())]].append(expert)
    return [made[expert] for expert in kept]


def _mean(loads: Sequence[int]) -> Callable[[Iterator[Tensor]], Tensor]:
    """Average by load, one tensor in memory at a time beside the sum; a lone one passes as it is."""
    shares = [load / sum(loads) if sum(loads) else 1 / len(loads) for load in loads]

    def mean(tensors: Iterator[Tensor]) -> Tensor:
        if len(shares) == 1:
            return next(tensors)
        total = shares[0] * next(tensors).float()
        for share in shares[1:]:
            total.add_(next(tensors), alpha=share)
        return total

    return mean


def _rows(sources: Sequence[Sequence[int]], counts: Sequence[int]) -> Callable[[Iterator[Tensor]], Tensor]:
    def gather(tensors: Iterator[Tensor]) -> Tensor:
        old = next(tensors)
        return torch.stack([
            _mean([counts[index] for index in merged])(old[index] for index in merged) for merged in sources])

    return gather


def permute(opened: Opened, orders: Mapping[int, Sequence[int]], files: Mapping[str, str]) -> Change:
    """Renumber experts: weights, router rows, biases and optimizer state alike. orders: old number of each new one"""
    recipes: dict[NativeName, Recipe] = {}
    for name, weight in opened.weights.items():
        if name.expert is not None:
            recipes[name] = Recipe((name._replace(expert=orders[name.layer or 0][name.expert]),))
        elif has_rows(weight):
            recipes[name] = Recipe((name,), _picked(orders[name.layer or 0]))
        else:
            recipes[name] = Recipe((name,))
    return Change(opened.config, recipes, f"place {dict(orders)}", keeps_logits=True, files=files)


def _picked(order: Sequence[int]) -> Callable[[Iterator[Tensor]], Tensor]:
    return lambda tensors: next(tensors)[list(order)]
