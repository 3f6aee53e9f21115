"""The profiler's trace names the parts of a mixture of experts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moescale.engine.native import NativeEngine
from moescale.monitor.trace import Tracer
from moescale.parallel.mesh import start_mesh
from moescale.parallel.ranks import run_ranks
from tests.parallel.test_layouts import make_batches, make_config


def profile(run_dir: Path, ranks: int) -> None:
    config = make_config("mixtral", {"ep": ranks})
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    tracer = Tracer(run_dir, mesh.rank, trace=range(0), profile=range(2, 4))
    for step in range(1, 5):
        with tracer.step(step, engine.model, []):
            engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_has_named_spans(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, profile, tmp_path, ranks)
    for rank in range(ranks):
        with gzip.open(tmp_path / f"profile/steps_2-3_rank_{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
        passes = 2 * 4 * 2  # steps, layers, micro-batches
        stretches = {"route": 1, "experts": 1, "dispatch": min(ranks, 2), "combine": min(ranks, 2)}
        assert {name: names.count(name) for name in stretches} == {
            name: passes * number for name, number in stretches.items()}
