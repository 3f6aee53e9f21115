"""Gradients that travel in bfloat16: each rank's sum is rounded once, and the sum of all of them never."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moescale.comm.collectives import all_gather
from moescale.config import ConfigError, parse_config
from moescale.engine.native import NativeEngine
from moescale.parallel.fsdp import RoundedReduceScatter
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.layouts import make_batches, make_config, whole
from tools.benchmark.traffic import Counter as Traffic


class Watched(RoundedReduceScatter):
    """Holds each sum to the definition, and counts them by the dtype of what came in."""

    calls: ClassVar[Counter[torch.dtype]] = Counter()

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object) -> None:
        parts = all_gather(input_tensor, group).unflatten(1, (group.size(), -1))[:, group.rank()]
        super().__call__(output_tensor, input_tensor, group, op)
        torch.testing.assert_close(output_tensor.double(), parts.bfloat16().double().sum(0), rtol=1e-6, atol=1e-9)
        self.calls[input_tensor.dtype] += 1


def gradients(parallel: dict[str, Any], compute: str, reduce: str, *, counted: bool = False) -> dict[str, Any]:
    """Take a step's two passes on this rank. Returns gradients, and the bytes that it sent over fsdp, where counted."""
    config = make_config("mixtral", parallel, compute)
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"reduce": reduce})})
    mesh = start_mesh(config)
    engine = NativeEngine(config, mesh)
    batches = make_batches(0, mesh.batch_rank, mesh.batch_size)
    with Traffic() if counted else nullcontext() as traffic:
        engine.forward_backward(batches)
    made = {name: whole(parameter.grad) for name, parameter in engine.parameters().items()}
    assert mesh.dense is not None
    sent = 0 if traffic is None else traffic.sent[mesh.dense["fsdp"].get_group().group_name]
    stop_mesh()
    return {"gradients": made, "sent": sent, "passes": len(batches), "calls": dict(Watched.calls)}


@pytest.mark.parametrize(("ranks", "parallel", "compute"), [
    (4, {"tp": 2, "ep": 2}, "bfloat16"), (4, {"pp": 2}, "float32"),
], ids=str)
def test_each_ranks_sum_is_rounded_once(
    ranks: int, parallel: dict[str, Any], compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_ranks(ranks, gradients, parallel, compute, "float32")
    monkeypatch.setattr("moescale.parallel.fsdp.RoundedReduceScatter", Watched)
    watched = run_ranks(ranks, gradients, parallel, compute, "bfloat16")
    for exact, rounded in zip(plain, watched, strict=True):
        assert rounded["passes"] > 1
        assert rounded["calls"].keys() == {torch.float32}, "what passes add up is not rounded before it is sent"
        for name, expected in exact["gradients"].items():
            gradient = rounded["gradients"][name]
            assert gradient.dtype == torch.float32
            error = float((gradient - expected).norm() / expected.norm())
            if "router" in name or ("norm" in name and "tp" in parallel):
                assert error == 0, f"{name} is small and stays as it is"
            else:
                assert 2**-12 < error < 2**-8, f"{name}: {error:.1e}"


def test_bytes_of_gradients_halve() -> None:
    """Half of each gradient goes to the other rank, but for routers' in 2 bytes an element instead of 4."""
    count = partial(gradients, counted=True)
    plain, rounded = (run_ranks(2, count, {}, "float32", reduce)[0] for reduce in ("float32", "bfloat16"))
    elements = sum(gradient.numel() for name, gradient in plain["gradients"].items() if "router" not in name)
    assert plain["sent"] - rounded["sent"] == 2 * elements // 2


def test_what_it_does_not_reach_is_refused() -> None:
    config = parse_config({"precision": {"reduce": "bfloat16"}, "parallel": {"dp_replicate": 2}}, "test")
    with pytest.raises(ConfigError, match=r"parallel\.dp_replicate=2: write parallel\.dp_replicate=1"):
        config.for_world(4)
    with pytest.raises(ConfigError, match=r"write precision\.reduce=float32"):
        parse_config({"precision": {"reduce": "bfloat16", "compute": "float64"}}, "test")
