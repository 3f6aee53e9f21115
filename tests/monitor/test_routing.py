"""What is logged adds up: against a recount of the trace, token by token, in every kind of layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moescale.engine.native import NativeEngine
from moescale.monitor.routing_metrics import routing_metrics
from moescale.monitor.tracer import Tracer
from moescale.parallel.mesh import start_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import make_batches, make_config
from tests.support.mixtures import KINDS, Kind, make_layer
from tests.support.runs import check_figures

STEP, EXPERTS = 3, 8


def trace(run_dir: Path, family: str, parallel: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Take a few steps and trace the last. -> its metrics, this rank's place among those that share the experts"""
    config = make_config(family, parallel)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    tracer = Tracer(run_dir, mesh.rank, trace=range(STEP, STEP + 1), profile=range(0), report=print)
    for step in range(1, STEP + 1):
        batches = make_batches(step, mesh.batch_rank, mesh.batch_size)
        with tracer.step(step, engine, [(batch.tokens, batch.token_id) for batch in batches]):
            engine.forward_backward(batches)
    metrics = routing_metrics(engine.routing())
    return metrics, 0 if mesh.expert_group is None else torch.distributed.get_rank(mesh.expert_group)


@pytest.mark.parametrize(("family", "ranks", "parallel"), [
    ("mixtral", 1, {}), ("mixtral", 2, {"ep": 2}), ("gshard", 1, {"recompute": "full"}),
    ("gshard", 4, {"tp": 2, "ep": 4, "recompute": "full"}), ("expert_choice", 4, {"pp": 2, "cp": 2, "ep": 2}),
    ("surest", 2, {"dp_shard": 2}), ("mixtral", 4, {"ep": 4, "row_budget": 0.6}),
], ids=str)
def test_counts_equal_a_recount_of_the_trace(
    tmp_path: Path, family: str, ranks: int, parallel: dict[str, Any]
) -> None:
    results = run_ranks(ranks, trace, tmp_path, family, parallel)
    metrics, ep = results[0][0], parallel.get("ep", 1)
    assert all(result[0] == metrics for result in results), "every rank knows the same"
    load: Counter[tuple[int, int]] = Counter()
    experts_of: dict[tuple[int, int], set[int]] = {}
    sent = [[0] * ranks for _ in range(ranks)]
    far: Counter[int] = Counter()
    token_of = {int(token_id): int(token) for batch in make_batches(STEP, 0, 1)
                for token_id, token in zip(batch.token_id.flatten(), batch.tokens.flatten(), strict=True)}
    for rank in range(ranks):
        rows = pyarrow.parquet.read_table(tmp_path / f"trace/step_{STEP:08d}_rank_{rank}.parquet").to_pylist()
        places: dict[tuple[int, int], set[int]] = {}
        for row in rows:
            key = row["layer"], row["serial"]
            assert row["step"] == STEP
            assert row["token"] == token_of[row["serial"]]
            load[row["layer"], row["expert"]] += 1
            assert row["expert"] not in experts_of.setdefault(key, set()), "an expert twice"
            experts_of[key].add(row["expert"])
            places.setdefault(key, set()).add(row["expert"] * ep // EXPERTS)
        place, first = results[rank][1], rank - results[rank][1]  # ranks that share experts are neighbours here
        for (layer, _), owners in places.items():
            far[layer] += bool(owners - {place})
            for owner in owners:
                sent[rank][first + owner] += 1
    tokens = sum(token_id >= 0 for token_id in token_of)
    check_figures(metrics)
    for layer in range(4):
        name = f"moe/layer_{layer:02d}"
        assert metrics[f"{name}/tokens_per_expert"] == [load[layer, expert] for expert in range(EXPERTS)]
        if family == "expert_choice":
            assert metrics[f"{name}/dropped"] == tokens - sum(key[0] == layer for key in experts_of)
        else:
            assert sum(metrics[f"{name}/tokens_per_expert"]) == tokens * 2 - metrics[f"{name}/dropped"]
        if ep > 1:
            assert metrics[f"{name}/other_ranks"] == pytest.approx(far[layer] / tokens, rel=1e-6)
            assert metrics[f"{name}/other_nodes"] == 0
    assert (metrics["moe/dropped_share"] > 0) == (family not in ("mixtral",))
    if ep > 1 and "row_budget" not in parallel:  # with one, a token travels in several passes
        assert metrics["moe/rows_between_ranks"] == sent
        away = sum(sum(line) for line in sent) - sum(sent[rank][rank] for rank in range(ranks))
        assert metrics["moe/bytes_sent"] == away * 32 * 4


def test_nodes_are_told_from_ranks(tmp_path: Path) -> None:
    parallel = {"ep": 4, "dispatcher": "hierarchical", "node_ranks": 2}
    metrics = run_ranks(4, trace, tmp_path, "mixtral", parallel)[0][0]
    assert 0 < metrics["moe/other_nodes"] < metrics["moe/other_ranks"] <= 1


class Operations(TorchDispatchMode):
    """Writes down which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sums_are_their_definitions(kind: Kind) -> None:
    layer, token_id = make_layer(kind), torch.arange(24).view(3, 8)
    token_id[1, 5:] = -1
    x, seen = torch.randn(3, 8, 8), []
    probabilities = layer.router.probabilities
    layer.router.probabilities = lambda logits: seen.append(probabilities(logits)) or seen[-1]
    routing, _ = layer.router(x, token_id)
    layer.statistics.reset()
    seen.clear()
    _, losses = layer(x, token_id)
    with torch.no_grad():
        layer.eval()(x, token_id)  # is not counted
    rows = seen[0][token_id >= 0].double()
    entropy, confidence, balance, z, slots = layer.statistics.sums.tolist()
    assert entropy == pytest.approx(sum(-p * p.log() for row in rows for p in row).item(), rel=1e-5)
    assert confidence == pytest.approx(sum(max(row.tolist()) for row in rows), rel=1e-6)
    assert [balance, z] == pytest.approx(losses.tolist(), rel=1e-6)
    load = layer.statistics.tokens_per_expert.sum().item()
    assert load <= slots if kind.factor is not None else slots == 0
    layer.statistics.watching = False
    with Operations() as operations:
        layer.statistics.add_probabilities(seen[0], token_id >= 0)
        layer.statistics.add(layer.router, routing, [routing], losses, token_id >= 0)
    assert not operations.names & {"_local_scalar_dense", "nonzero", "_to_copy"}, "nothing that the host waits for"
    assert layer.statistics.sums.tolist() == [entropy, confidence, balance, z, slots]
    assert layer.statistics.tokens_per_expert.sum().item() == 2 * load, "the load is counted in every step"
