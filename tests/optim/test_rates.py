"""Weights that may not learn as fast as the others, under each engine."""

from __future__ import annotations

from typing import Any

import pytest

from moescale.config import parse_config
from moescale.engine.base import build_engine
from moescale.parallel.mesh import start_mesh, stop_mesh, world_size
from moescale.parallel.ranks import run_ranks
from tests.support.engines import whole
from tests.support.layouts import FAMILIES, SEQ, make_batches

RATE = 4e-3
SYSTEMS = {"log_decay", "frequency", "p", "b", "log_step"}


def farthest(engine: dict[str, Any]) -> dict[str, float]:
    """Take Adam's first step, which moves a weight by the learning rate, whatever its gradient."""
    config = parse_config({
        **FAMILIES["systems"], "run": engine, "data": {"seq_len": SEQ, "global_batch": 8, "tokenizer": "none.json"},
        "optim": {"lr": RATE, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 1e9, "eps": 1e-12},
    }, "test").for_world(world_size())
    mesh = start_mesh(config)
    made = build_engine(config, mesh)
    before = whole(made.parameters())
    made.forward_backward(make_batches(0, mesh.batch_rank, mesh.batch_size))
    made.step()
    after = whole(made.parameters())
    stop_mesh()
    return {name: float((weight - before[name]).abs().max()) for name, weight in after.items()}


@pytest.mark.parametrize("engine", [{}, {"engine": "deepspeed", "zero_stage": 1}], ids=str)
def test_s4s_systems_learn_no_faster_than_their_authors_let_them(engine: dict[str, Any]) -> None:
    """A, B and steps have a rate of at most 0.001; what reads the states, and all else, the run's."""
    if engine:
        pytest.importorskip("deepspeed")
    moved = run_ranks(2 if engine else 1, farthest, engine)[0]
    slow = {name for name in moved if name.rsplit(".", 1)[-1] in SYSTEMS and "systems" in name and
            not name.startswith("blocks.2")}  # which is LSSL's
    assert {name.rsplit(".", 1)[-1] for name in slow} == SYSTEMS
    for name, distance in moved.items():
        assert distance == pytest.approx(1e-3 if name in slow else RATE, rel=1e-2), name
