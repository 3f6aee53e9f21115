"""The profiler's trace names the parts of a mixture of experts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moescale.engine.native import NativeEngine
from moescale.monitor.tracer import Tracer
from moescale.parallel.mesh import start_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import make_batches, make_config


def profile(run_dir: Path, ranks: int, last: int) -> None:
    """Run to the last of four steps, of which the second and third are asked for."""
    config = make_config("mixtral", {"ep": ranks})
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    tracer = Tracer(run_dir, mesh.rank, trace=range(0), profile=range(2, 4), report=print)
    for step in range(1, last + 1):
        with tracer.step(step, engine, []):
            engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))
    tracer.close()


@pytest.mark.parametrize(("ranks", "last"), [(1, 2), (2, 4)])  # the first ends before all that is asked for
def test_a_profile_has_named_spans(tmp_path: Path, ranks: int, last: int) -> None:
    run_ranks(ranks, profile, tmp_path, ranks, last)
    end = min(last, 3)
    for rank in range(ranks):
        with gzip.open(tmp_path / f"profile/steps_2-{end}_rank_{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
        passes = (end - 1) * 4 * 2  # steps, layers, micro-batches
        stretches = {"route": 1, "experts": 1, "dispatch": min(ranks, 2), "combine": min(ranks, 2)}
        assert {name: names.count(name) for name in stretches} == {
            name: passes * number for name, number in stretches.items()}
