"""How far routing moved: against a recount, the same in every layout, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from moescale.data.split import TokenSplit
from moescale.data.tokenizer import ByteTokenizer
from moescale.engine.base import Choices
from moescale.engine.native import NativeEngine
from moescale.evaluate import Evaluation
from moescale.monitor.routing_metrics import routing_metrics
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from moescale.record.held_out import moved
from tests.support import splits
from tests.support.layouts import VOCAB, make_batches, make_config

TOKENS = 400  # fewer than are followed, so that the last sequence ends in padding


def make_split() -> TokenSplit:
    tokens = np.random.default_rng(7).integers(0, VOCAB, TOKENS).astype(np.uint16)
    return splits.make_split([tokens], [np.array([0, 31, 200])], VOCAB)


def run(folder: Path, family: str, parallel: dict[str, Any], follow: bool) -> dict[str, Any]:
    """Four steps. -> losses, figures of routing before and after each look, what the looks gave"""
    config = make_config(family, parallel)
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    evaluation = Evaluation(config, mesh, make_split(), ByteTokenizer(), folder, print)
    losses, counts, looks = [], [], [evaluation.follow(engine)] if follow else []
    for step in range(4):
        losses.append(float(engine.forward_backward(make_batches(step, mesh.batch_rank, mesh.batch_size))
                            .cross_entropy))
        engine.step()
        if follow and step % 2 == 1:
            for look in (False, True):
                if look:
                    looks.append(evaluation.follow(engine))
                counts.append(routing_metrics(engine.routing()))
    cut = [isinstance(parameter, DTensor) for parameter in engine.model.parameters()]
    stop_mesh()
    return {"losses": losses, "counts": counts, "looks": looks, "cut": cut}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {family: run_ranks(1, run, tmp_path_factory.mktemp("one"), family, {}, True)[0]
            for family in ("mixtral", "left_behind", "surest")}


@pytest.mark.parametrize(("family", "ranks", "parallel"), [
    ("mixtral", 4, {"pp": 2, "ep": 2}), ("mixtral", 4, {"tp": 2, "cp": 2, "ep": 4}), ("surest", 4, {}),
    ("left_behind", 2, {"pp": 2}),  # jitter and dropout draw by token id
], ids=str)
def test_moved_is_the_same_in_every_layout(
    one_rank: dict[str, Any], tmp_path: Path, family: str, ranks: int, parallel: dict[str, Any]
) -> None:
    results = run_ranks(ranks, run, tmp_path, family, parallel, True)
    alone = run_ranks(ranks, run, tmp_path, family, parallel, False)
    expected = one_rank[family]["looks"]
    assert expected[0] == {}, "nothing to compare the first look with"
    assert 0 < expected[1]["moe/moved"] < 1
    assert results[0]["looks"] == [pytest.approx(look, abs=1e-12) for look in expected]
    for result, undisturbed in zip(results, alone, strict=True):
        assert result["losses"] == undisturbed["losses"]
        assert result["cut"] == undisturbed["cut"], "no weights stay gathered"
        assert result["counts"][::2] == result["counts"][1::2], "what is looked at is not counted"


def test_moved_equals_a_recount(tmp_path: Path) -> None:
    config = make_config("left_behind", {})
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    evaluation = Evaluation(config, mesh, make_split(), ByteTokenizer(), tmp_path, print)
    found: list[dict[tuple[int, int], set[int]]] = []
    for _ in range(2):
        seen: list[Choices] = []
        with engine.record(training=False, choices=seen.append):
            figures = evaluation.follow(engine)
        found.append({(each.layer, token_id): set(experts) - {-1} for each in seen for token_id, experts
                      in zip(each.token_id.tolist(), each.expert.tolist(), strict=True) if token_id >= 0})
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 2 * (TOKENS - 1)
    for layer in (1, 3):
        other = [found[0][key] != found[1][key] for key in found[0] if key[0] == layer]
        assert figures[f"moe/layer_{layer:02d}/moved"] == pytest.approx(sum(other) / (TOKENS - 1))
        assert 0 < sum(other) < TOKENS - 1
    assert figures["moe/moved"] == pytest.approx((figures["moe/layer_01/moved"] + figures["moe/layer_03/moved"]) / 2)


def test_the_order_of_experts_is_no_move() -> None:
    before = np.array([[[0, 1], [2, 3], [-1, -1]], [[0, 1], [2, -1], [-1, -1]]])
    now = np.array([[[1, 0], [3, 2], [5, 5]], [[1, 2], [-1, 2], [5, 5]]])
    assert moved(now, before, [0, 7], 2) == {"moe/layer_00/moved": 0, "moe/layer_07/moved": 0.5, "moe/moved": 0.25}
