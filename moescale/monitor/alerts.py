"""Says in words when a run goes wrong: dead experts, a router that collapses, much that is dropped, loss spikes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator
from typing import Any

from moescale.record.figures import Line, by_layer, of_all

PATIENCE_STEPS = 30  # what is wrong must be so for about as long, in up to three logged steps
DEAD_SHARE = 0.01  # of the rows that are an expert's even share
ENOUGH_ROWS = 50  # of an even share, below which an expert may be idle by chance
COLLAPSED = 0.25  # of the way from all tokens with the same experts (0) to all experts alike (1)
JUMP, LEAST_JUMP, SPREADS = 0.15, 0.2, 3.0  # of a loss above those before: a share, nats, and deviations of its noise
REMEMBERED, ENOUGH_LOSSES = 10, 5


class Alerts:
    """Reads every logged step, and says once what has gone wrong, and again when it was well in between.

    every: steps between logged ones. dropped_limit: the share dropped above which it is too much.
    """

    def __init__(self, *, top_k: int, every: int, dropped_limit: float) -> None:
        self.top_k, self.dropped_limit = top_k, dropped_limit
        self.lines: deque[Line] = deque(maxlen=min(3, max(1, PATIENCE_STEPS // every)))
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.highest: deque[float] = deque(maxlen=3)  # the highest loss of the steps up to each logged one
        self.known: set[str] = set()

    def check(self, metrics: Line) -> list[str]:
        """Give the alerts that are new."""
        self.lines.append(metrics)
        found = dict(self._routing()) if len(self.lines) == self.lines.maxlen else {}
        if "loss" in metrics:  # else of an update that was left out
            found.update(self._loss(metrics))
            self.losses.append(metrics["loss"])
            self.highest.append(metrics["loss_max"])
        new = [text for key, text in found.items() if key not in self.known]
        self.known = set(found)
        return new

    def _routing(self) -> Iterator[tuple[str, str]]:
        """Give what is wrong with the routing: a name for it, and words."""
        counted: dict[int, list[Any]] = {}
        for line in self.lines:
            for layer, counts in by_layer(line, "tokens_per_expert").items():
                counted.setdefault(layer, []).append(counts)
        for layer, lines in counted.items():
            load = [sum(counts) for counts in zip(*lines, strict=True)]
            mean = sum(load) / len(load)
            dead = [expert for expert, rows in enumerate(load) if rows < DEAD_SHARE * mean]
            if dead and mean >= ENOUGH_ROWS:
                experts = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
                yield f"dead {layer} {dead}", (f"dead experts: layer {layer}, {len(dead)} of {len(load)} ({experts}) "
                                               f"get less than {DEAD_SHARE:.0%} of the mean load")
            effective = sum(load) ** 2 / max(1, sum(rows**2 for rows in load))
            spread = (effective - self.top_k) / max(1, len(load) - self.top_k)
            if len(load) > self.top_k and mean > 0 and spread < COLLAPSED:
                yield f"collapse {layer}", (f"collapse: layer {layer} uses {effective:.1f} of its {len(load)} experts, "
                                            "counted by load")
        dropped = of_all("dropped_share")
        shares = [line[dropped] for line in self.lines if dropped in line]
        if shares and min(shares) > self.dropped_limit:
            yield "dropped", (f"drops: {shares[-1]:.0%} of the choices have no row, more than "
                              f"monitor.alert_dropped={self.dropped_limit}")

    def _loss(self, metrics: Line) -> Iterator[tuple[str, str]]:
        if len(self.losses) < ENOUGH_LOSSES:
            return
        highest, losses = max(self.highest), list(self.losses)
        bends = [abs(losses[index - 1] - 2 * losses[index] + losses[index + 1]) for index in range(1, len(losses) - 1)]
        noise = 1.48 * statistics.median(bends) / 6**0.5  # a normal deviation, whatever the trend
        if metrics["loss_max"] > highest + max(JUMP * abs(highest), LEAST_JUMP, SPREADS * noise):
            yield "loss", f"loss spike: {metrics['loss_max']:.3f}, after {highest:.3f} at most"
