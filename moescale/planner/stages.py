"""Where a pipeline cuts the model: by what layers cost, not by how many they are."""

from __future__ import annotations

from functools import cache

from moescale.config import Config
from moescale.planner.count import layer_flops_per_token


def cut_into_stages(config: Config) -> list[range]:
    """Cut the layers into `parallel.pp_stages` runs, so that the most expensive one costs as little as can be.

    -> the layers of each stage; the head counts with the last one, and no stage is empty
    """
    layers, head = layer_flops_per_token(config)
    count, stages = len(layers), config.parallel.pp_stages

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Cut the layers from `first` on into `left` stages. -> the cost of the most expensive, and where each ends"""
        if left == 1:
            return sum(layers[first:]) + head, (count,)
        options = []
        for end in range(first + 1, count - left + 2):
            worst, ends = best(end, left - 1)
            options.append((max(worst, float(sum(layers[first:end]))), (end, *ends)))
        return min(options)

    ends = best(0, stages)[1]
    return [range(first, end) for first, end in zip((0, *ends[:-1]), ends, strict=True)]
