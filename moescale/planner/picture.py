"""The layout of a run as a few lines of text: which ranks share what, and whether that goes between hosts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from moescale.config import Config
from moescale.planner.stages import cut_into_stages

MOST_GROUPS = 3  # that are written out
MOST_RANKS = 8  # of a group
MOST_HOSTS = 4
MOST_STAGES = 8


def draw_layout(config: Config, hosts: Sequence[str]) -> list[str]:
    """Draw who shares what. config: settled. hosts: of each rank. Returns lines; none for one process."""
    parallel, size = config.parallel, len(hosts)
    if size == 1:
        return []
    outer = (parallel.pp, parallel.dp_replicate)
    fsdp = parallel.dp_shard * parallel.cp
    dense = (*outer, fsdp, parallel.tp)
    sequence = (*outer, parallel.dp_shard, parallel.cp, parallel.tp)
    sharing = fsdp * parallel.tp
    sparse = (*outer, sharing // (parallel.ep * parallel.etp), parallel.ep, parallel.etp)
    axes = [
        ("pp", "follow each other", dense, 0), ("dp_replicate", "copy the model", dense, 1),
        ("fsdp", "share the weights", dense, 2), ("cp", "share each sequence", sequence, 3),
        ("tp", "share each matrix", dense, 3),
    ]
    if config.num_moe_layers > 0:
        axes += [("efsdp", "share each expert", sparse, 2), ("ep", "share the experts", sparse, 3),
                 ("etp", "cut each expert", sparse, 4)]
    rows = []
    for name, what, shape, axis in axes:
        if shape[axis] > 1:
            groups = axis_groups(shape, axis)
            within = all(len({hosts[rank] for rank in group}) == 1 for group in groups)
            rows.append((f"{name} {shape[axis]}", what, _groups_text(groups), "within hosts" if within else
                         "between hosts"))
    places = list(dict.fromkeys(hosts))
    where = [f"{_ranks_text([rank for rank, other in enumerate(hosts) if other == host])} on {host}"
             for host in places[:MOST_HOSTS]]
    where += [f"and {len(places) - MOST_HOSTS} more hosts"] if len(places) > MOST_HOSTS else []
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"layout of {size} ranks: {', '.join(where)}"]
    for *columns, place in rows:
        lines.append("  " + "  ".join(f"{text:{width}}" for text, width in zip(columns, widths, strict=True)) +
                     (f"  {place}" if len(places) > 1 else "").rstrip())
    return [line.rstrip() for line in (*lines, *_stage_lines(config))]


def axis_groups(shape: Sequence[int], axis: int) -> list[list[int]]:
    """List the ranks of each group along one axis of a mesh whose last axis is innermost."""
    stride = math.prod(shape[axis + 1:])
    firsts = [first for first in range(math.prod(shape)) if first // stride % shape[axis] == 0]
    return [[first + place * stride for place in range(shape[axis])] for first in firsts]


def _stage_lines(config: Config) -> list[str]:
    """Say which layers lie where, in a pipeline."""
    parallel = config.parallel
    if parallel.pp == 1:
        return []
    stages = [f"{stage}: {span.start}-{span.stop - 1}" if len(span) > 1 else f"{stage}: {span.start}"
              for stage, span in enumerate(cut_into_stages(config))]
    shown = stages if len(stages) <= MOST_STAGES else [*stages[:MOST_STAGES - 1], "...", stages[-1]]
    return [f"  layers of each stage  {', '.join(shown)}"]


def _groups_text(groups: Sequence[Sequence[int]]) -> str:
    shown = " | ".join(_ranks_text(group) for group in groups[:MOST_GROUPS])
    return shown + (f" | ... {len(groups)} groups" if len(groups) > MOST_GROUPS else "")


def _ranks_text(ranks: Sequence[int]) -> str:
    """Write neighbours as a span, and others one by one."""
    if len(ranks) > 1 and all(after == before + 1 for before, after in itertools.pairwise(ranks)):
        return f"{ranks[0]}-{ranks[-1]}"
    shown = list(map(str, ranks))
    return " ".join(shown if len(shown) <= MOST_RANKS else [*shown[:MOST_RANKS - 2], "..", shown[-1]])
