"""Which layouts to prove: read from text, enumerated, or drawn; each one checked against the user's configuration."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from moescale.config import Config, ConfigError
from moescale.engine.base import check_engine

MAX_RANKS = 64  # each one is a process of this machine
TOKENS = {
    "rep": "dp_replicate", "dp_replicate": "dp_replicate", "dp": "dp_shard", "dp_shard": "dp_shard", "tp": "tp",
    "pp": "pp", "cp": "cp", "ep": "ep", "etp": "etp",
}


@dataclass(frozen=True)
class Layout:
    """The degrees of `parallel`, under the same names."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        short = {degree: token for token, degree in reversed(TOKENS.items())}
        words = [f"{short[name]}{degree}" for name, degree in self.degrees.items() if degree > 1]
        return " ".join(words) or "dp1"

    @property
    def degrees(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def used(self) -> set[str]:
        return {name for name, degree in self.degrees.items() if degree > 1}

    def settle(self, config: Config, schedule: str = "gpipe", micro_batch: int | None = None) -> Config:
        """Lay a run out so. Raises ConfigError where it does not fit, or its engine cannot: training's own rules.

        schedule: gpipe takes any number of micro-batches. micro_batch: None as in `Config.for_world`.
        """
        parallel = config.parallel.model_copy(update={**self.degrees, "pp_schedule": schedule})
        if parallel.dispatcher == "hierarchical":  # several nodes, as small as can be
            node = self.etp if self.ep % 2 or self.ep == 2 else 2 * self.etp
            parallel = parallel.model_copy(update={"node_ranks": node})
        data = config.data.model_copy(update={"micro_batch": micro_batch})
        settled = config.model_copy(update={"parallel": parallel, "data": data}).for_world(self.ranks)
        check_engine(settled)
        return settled

    def fits(self, config: Config) -> bool:
        try:
            self.settle(config)
        except ConfigError:
            return False
        return True

    def changes(self, other: Layout) -> tuple[int, int]:
        """How far another layout is: how many degrees differ, then by how much."""
        pairs = list(zip(self.degrees.values(), other.degrees.values(), strict=True))
        return sum(ours != theirs for ours, theirs in pairs), sum(abs(ours - theirs) for ours, theirs in pairs)


def parse_layouts(text: str, config: Config) -> list[Layout]:
    """Read layouts such as `tp2 ep4, pp2 dp2 ep2`. Raises ConfigError for one that is unknown or does not fit."""
    layouts = [_parse(part, config) for part in text.split(",") if part.strip()]
    if not layouts:
        raise ConfigError('--layouts names no layout: write e.g. --layouts "tp2 ep4, pp2 dp2 ep2"')
    for layout in layouts:
        check_layout(layout, config)
    return list(dict.fromkeys(layouts))


def _parse(text: str, config: Config) -> Layout:
    degrees: dict[str, int] = {}
    for word in text.split():
        match = re.fullmatch(r"([a-z_]+?)=?([1-9][0-9]*)", word)
        name = TOKENS.get(match[1]) if match else None
        if match is None or name is None:
            raise ConfigError(f"layout {text.strip()!r}: {word!r} is not known: write dp2, rep2, tp2, pp2, cp2, ep2 or "
                              "etp2, with any number, and a comma between layouts")
        if name in degrees:
            raise ConfigError(f"layout {text.strip()!r} names {match[1]} twice")
        degrees[name] = int(match[2])
    if "dp_shard" not in degrees:  # experts are spread over ranks that other degrees count; dp makes up what lacks
        layout = Layout(**degrees)
        degrees["dp_shard"] = next(
            n for n in range(1, layout.ep * layout.etp + 1) if n * layout.cp * layout.tp % (layout.ep * layout.etp) == 0
        )
    return Layout(**degrees)


def check_layout(layout: Layout, config: Config) -> None:
    """Raise ConfigError, which names the nearest layouts that fit, unless this one does."""
    if layout.ranks > MAX_RANKS:
        raise ConfigError(f"layout {layout} is {layout.ranks} ranks, each a process of this machine: "
                          f"use at most {MAX_RANKS}")
    try:
        layout.settle(config)
    except ConfigError as error:
        near = sorted(every_layout(config, layout.ranks), key=layout.changes)
        distance = layout.changes(near[0])[0] if near else 0
        names = [str(other) for other in near if layout.changes(other)[0] == distance][:3]
        advice = f"nearest that fit {_ranks(layout.ranks)}: {', '.join(names)}" if names else (
            f"no layout of {_ranks(layout.ranks)} fits this configuration")
        raise ConfigError(f"layout {layout}: {error}; {advice}") from None


def every_layout(config: Config, ranks: int) -> list[Layout]:
    """Find all layouts of so many ranks that the configuration allows, by trying them."""
    return [layout for layout in _candidates(ranks) if layout.fits(config)]


def layouts_of(config: Config, ranks: int) -> list[Layout]:
    """Like every_layout. Raises ConfigError where there is none, or where the machine would not bear it."""
    if ranks > MAX_RANKS:
        raise ConfigError(f"--ranks {ranks}: each rank is a process of this machine: use at most {MAX_RANKS}")
    layouts = every_layout(config, ranks)
    if not layouts:
        raise ConfigError(f"no layout of {_ranks(ranks)} fits this configuration: try another --ranks")
    return layouts


def sample_layouts(config: Config, seed: int, count: int = 6) -> list[Layout]:
    """Draw layouts of 2 and of 4 ranks such that each degree that can be above one is, in at least one of them.

    Raises ConfigError where none fits.
    """
    layouts = [layout for ranks in (2, 4) for layout in every_layout(config, ranks)]
    if not layouts:
        raise ConfigError("no layout of 2 or of 4 ranks fits this configuration: name some with --layouts")
    random.Random(seed).shuffle(layouts)
    layouts.sort(key=lambda layout: -layout.ranks)  # stable; four ranks show more
    chosen: list[Layout] = []
    missing = {name for layout in layouts for name in layout.used}
    while missing:
        chosen.append(max(layouts, key=lambda layout: len(missing & layout.used)))
        missing -= chosen[-1].used
    chosen += [layout for layout in layouts if layout not in chosen][: max(0, count - len(chosen))]
    return chosen


def _candidates(ranks: int) -> Iterator[Layout]:
    for dp_replicate, dp_shard, tp, pp, cp in _factors(ranks, 5):
        sharing = dp_shard * tp * cp
        for ep in _divisors(sharing):
            for etp in _divisors(sharing // ep):
                yield Layout(dp_replicate, dp_shard, tp, pp, cp, ep, etp)


def _factors(number: int, count: int) -> Iterator[Sequence[int]]:
    """Write a number as a product of `count` factors, in every way."""
    if count == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factors(number // first, count - 1):
            yield (first, *rest)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
