"""What a layer adds to a step where sequences are shared: collectives of its own, and no router's wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.profiler import profile

from moescale.config import parse_config
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import FAMILIES, make_batches

WAIT = "aten::_local_scalar_dense"  # the host reads a number of the device


def count_calls(parallel: dict[str, Any], layers: int) -> Counter[str]:
    """Count the waits of routers and all collectives of one step's two micro-batches."""
    family = FAMILIES["mixtral"]
    config = parse_config({
        **family, "model": {**family["model"], "num_layers": layers}, "parallel": parallel,
        "data": {"seq_len": 24, "global_batch": 8, "micro_batch": 4, "tokenizer": "none.json"},
    }, "test").for_world(2)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    batches = make_batches(0, mesh.batch_rank, mesh.batch_size)
    with profile() as seen:
        engine.forward_backward(batches)
    stop_mesh()
    return Counter(event.name for event in seen.events()
                   if (event.name == WAIT and routes(event)) or event.name.startswith("c10d::"))


def routes(event: Any) -> bool:
    """Say whether a router's call encloses this one."""
    return event is not None and (event.name == "route" or routes(event.cpu_parent))


@pytest.mark.parametrize(("parallel", "collectives"), [({"tp": 2}, 20), ({"cp": 2}, 21)], ids=str)
def test_valid_tokens_are_counted_once_a_micro_batch(parallel: dict[str, Any], collectives: int) -> None:
    few, many = (run_ranks(2, count_calls, parallel, layers)[0] for layers in (2, 4))
    assert (few.pop(WAIT), many.pop(WAIT)) == (2, 2), "one in each of two micro-batches, however many layers"
    a_layer = (many.total() - few.total()) // 2
    assert a_layer == collectives, "a count takes no collective of its own"
