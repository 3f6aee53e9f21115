"""One flipped bit is found by an audit, and named with its rank and tensor."""

from __future__ import annotations

import pytest
import torch

from moescale.audit import Audit, fingerprint
from moescale.comm.collectives import local_tensor
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.flips import flip, flipped_once
from tests.support.layouts import make_batches, make_config

HOSTS = ["host0", "host1", "host2", "host3"]


def audit_steps(layout: dict[str, int], kinds: list[str], rank: int) -> list[tuple[str | None, bool, str | None]]:
    """Run an audited step with each kind of flip on one rank.

    Returns what the audit says of each, whether the gradients are right, and what it says of the copies of weights.
    """
    config = make_config("mixtral", layout, "float32")
    mesh = start_mesh(config)
    engine, results = NativeEngine(config, mesh), []
    batches = make_batches(0, mesh.batch_rank, mesh.batch_size)
    audit = Audit(engine, mesh, 1, HOSTS)
    for kind in kinds:
        engine.clear_gradients()
        engine.forward_backward(batches)
        expected = {name: fingerprint(local_tensor(weight.grad)) for name, weight in engine.parameters().items()}
        if kind in ("activation", "gradient") and mesh.rank == rank:
            with flipped_once(engine.model.blocks["2"], kind):
                _, said = audit.forward_backward(batches, watch=True)
        else:
            _, said = audit.forward_backward(batches, watch=True)
        right = all(torch.equal(fingerprint(local_tensor(weight.grad)), expected[name])
                    for name, weight in engine.parameters().items())
        engine.step()
        if kind == "weight" and mesh.rank == rank:
            flip(engine.parameters()[WEIGHT], 3, 2)
        if kind == "moment" and mesh.rank == rank:
            flip(engine.capture({}, {}).tensors[MOMENT], 3, 2)
        results.append((said, right, audit.compare_copies(engine.step_count)))
    stop_mesh()
    return results


MENDED = "was not the same in two runs; the step was run again until two runs agreed"
OUTPUT, GRADIENT = (f"the {what} layer 2's channel_mixer on rank 1 (host1) {MENDED}" for what in (
    "output of", "gradient after"))
WEIGHT = "blocks.2.mixer.q.weight"
MOMENT = f"optim.exp_avg_sq.{WEIGHT}"
BETWEEN = f"{WEIGHT} differs between rank 0 (host0) and rank 1 (host1), and which is right is not known"


@pytest.mark.parametrize(("layout", "expected"), [
    ({"dp_replicate": 2}, {"none": (None, None), "activation": (OUTPUT, None), "weight": (None, BETWEEN)}),
    ({"dp_replicate": 2}, {"moment": (None, BETWEEN.replace(WEIGHT, MOMENT))}),
    ({"dp_shard": 2, "ep": 2}, {"activation": (OUTPUT, None), "gradient": (GRADIENT, None)}),
    ({"pp": 2}, {"none": (None, None), "activation": (OUTPUT, None)}),
    ({"dp_replicate": 4}, {"weight": (None, f"{WEIGHT} on rank 1 (host1) is not as other ranks hold it")}),
], ids=["copies", "copies of moments", "experts", "stages", "four copies"])
def test_a_flip_is_named_and_what_can_be_is_mended(
    layout: dict[str, int], expected: dict[str, tuple[str | None, str | None]]
) -> None:
    ranks = max(layout.values())
    for results in run_ranks(ranks, audit_steps, layout, list(expected), 1, timeout_seconds=60):
        for (said, right, differs), wanted in zip(results, expected.values(), strict=True):
            assert (said, differs) == wanted
            assert right
