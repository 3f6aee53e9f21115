"""What watching the routing costs: steps with nothing counted, with the load alone, and logged ones, in alternation.

    python tools/benchmark/monitor.py [CONFIG [KEY=VALUE ...]] [--threads 1] [--rounds 40]

Two measures. *Inside* adds up the time that the statistics and the logging take within the steps, exact where the host
computes everything itself. *Whole* compares the medians of whole steps, and is as noisy as the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moescale.config import Config, load_config
from moescale.data.batches import Batch
from moescale.engine.native import NativeEngine
from moescale.monitor.alerts import Alerts
from moescale.monitor.routing_metrics import routing_metrics
from moescale.parallel.expert import moe_layers
from moescale.parallel.mesh import start_mesh
from moescale.record.metrics import JsonLines

WARM_UP = 3
KINDS = ("nothing counted", "the load alone", "logged")
TIMED = ("look", "add", "travelled", "reset")


class Bench:
    """One engine, whose steps are counted in one of three ways."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.inside = config, 0.0
        self.engine = NativeEngine(config, start_mesh(config))
        self.lines = JsonLines(folder, 0, print)
        self.alerts = Alerts(top_k=config.moe.top_k, every=config.monitor.every, dropped_limit=1.0)
        for layer in moe_layers(self.engine.model):
            for name in TIMED:
                setattr(layer.statistics, name, partial(self._timed, getattr(layer.statistics, name)))
            layer.router.observers[:] = [layer.statistics.add_probabilities]

    def step(self, kind: str, batches: list[Batch]) -> tuple[float, float]:
        """Time a step. -> seconds of the whole step, and of what was inside it"""
        for layer in moe_layers(self.engine.model):
            layer.statistics.count(kind != "nothing counted")
        self.inside, started = 0.0, time.perf_counter()
        losses = self.engine.forward_backward(batches, watch=kind == "logged")
        self.engine.step()
        if kind == "logged":
            self._timed(partial(self._log, losses.cross_entropy.item()))
        return time.perf_counter() - started, self.inside

    def _log(self, loss: float) -> None:
        metrics = routing_metrics(self.engine.routing())
        metrics |= {"loss": loss, "loss_max": loss}
        metrics["alerts"] = self.alerts.check(metrics)
        self.lines.write(self.engine.step_count, metrics)

    def _timed(self, function: Callable[..., Any], *args: Any) -> None:
        started = time.perf_counter()
        function(*args)
        self.inside += time.perf_counter() - started


def make_batches(config: Config) -> list[Batch]:
    data = config.data
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(256, config.model.vocab_size), (data.global_batch, data.seq_len), generator=generator)
    token_id = torch.arange(tokens.numel()).view_as(tokens)
    parts = (tokens, tokens.roll(-1, 1), token_id % data.seq_len, token_id)
    return [Batch(*each) for each in zip(*(part.split(data.micro_batch or 1) for part in parts), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, arguments.overrides).for_world(1)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        bench, batches = Bench(config, Path(folder)), make_batches(config)
        for number in range(arguments.rounds + WARM_UP):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                figures = bench.step(kind, batches)
                if number >= WARM_UP:
                    seconds[kind].append(figures)
    median = {kind: [statistics.median(column) for column in zip(*values, strict=True)]
              for kind, values in seconds.items()}
    table = Table("steps", "whole", "inside", title=f"{arguments.config}, medians of {arguments.rounds} steps each")
    for kind, (whole, inside) in median.items():
        table.add_row(kind, f"{1000 * whole:.1f} ms", f"{1000 * inside:.3f} ms")
    Console(width=100).print(table)
    every, (base, idle) = config.monitor.every, median[KINDS[0]]
    for name, column, free in (("inside", 1, idle), ("whole", 0, base)):
        load, logged = (median[kind][column] - free for kind in KINDS[1:])
        print(f"monitor.every={every}, {name}: {((every - 1) * load + logged) / every / base:.3%} of a step")


if __name__ == "__main__":
    main()
