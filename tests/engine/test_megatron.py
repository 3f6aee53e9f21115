"""Megatron-Core's GPTModel is our model, and its engine trains as the native one, on processors taken for GPUs.

No GPU: `tests/support/megatron.py` answers what asks for one. All that is computed is Megatron's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.checkpoint.store import latest_checkpoint
from moescale.config import Config
from moescale.engine.base import RoutingCounts, build_engine
from moescale.engine.megatron_settings import layout_of
from moescale.engine.megatron_weights import NativeWeights
from moescale.model.build import build_model as build_own_model
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.engines import Course, batches_of, difference, take_steps
from tests.support.engines import make_config as make_run
from tests.support.models import make_config, make_tensors

pytest.importorskip("megatron.core", reason="needs megatron-core")
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.transformer.moe import experts

from moescale.engine import megatron as engine_module
from moescale.engine.megatron import build_model, hidden_keys
from tests.support.megatron import SHAPES, fake_ranks, on_processor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
EPS = 1e-3  # of AdamW, with which a gradient near zero moves a weight no further than others
TOKENS = torch.arange(40).view(2, 20) * 7 % 264


def put_all(weights: NativeWeights, model: torch.nn.Module, ours: Mapping[str, Tensor]) -> None:
    """Write our weights where Megatron's model keeps them."""
    theirs = dict(model.state_dict())
    for name in weights.pieces:
        weights.put(name, ours[name], theirs)


def both_logits(config: Config) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """Run our model and theirs with the same weights. Returns their logits, and whether what they hold is ours."""
    on_processor()
    model = build_own_model(config, "cpu")
    tensors = {name.removeprefix("model."): tensor for name, tensor in make_tensors(config).items()}
    model.load_state_dict(tensors)
    with fake_ranks(0, 1), torch.no_grad():
        theirs = build_model(config).eval()
        weights = NativeWeights(config, layout_of(config), (0, 0, 0))
        put_all(weights, theirs, tensors)
        hidden = hidden_keys(torch.arange(20).expand(2, 20), config.attention.window)
        logits = theirs(TOKENS, torch.arange(20).expand(2, 20), hidden)
        same = {name: torch.equal(tensor, tensors[name]) for name, tensor in weights.show(theirs.state_dict())}
    return model.logits(TOKENS), logits, same


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_logits(shape: str, dispatcher: str) -> None:
    model, moe = SHAPES[shape]
    config = make_config(model, moe)
    config = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"dispatcher": dispatcher})})
    ours, theirs, same = run_ranks(1, both_logits, config)[0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert all(same.values())
    assert same.keys() == build_own_model(config, "meta").state_dict().keys()


def shapes_of(config: Config, rank: int, size: int, tp: int, pp: int, ep: int, **settings: Any) -> dict[str, Any]:
    """Build one rank's part without values. Returns the shapes of its tensors, by name"""
    on_processor()
    experts.gg.assert_grouped_gemm_is_available = lambda: None  # a package for GPUs alone
    experts.jit_fuser = lambda function: function
    degrees = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
               "expert_model_parallel_size": ep}
    with fake_ranks(rank, size, **degrees, expert_tensor_parallel_size=1), torch.device("meta"):
        stage = rank // (size // pp)
        model = build_model(config, first=stage == 0, last=stage == pp - 1, **settings)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)], ids=str)
def test_names_and_shapes(shape: str, tp: int, pp: int, ep: int) -> None:
    model, moe = SHAPES[shape]
    if shape in ("dense", "gelu") and ep > 1:
        pytest.skip("no experts")
    size = max(2, tp, ep) * pp
    config = make_config(model, moe)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": tp, "pp": pp, "ep": ep})})
    for rank in range(size):
        ranks = rank % tp, rank // (size // pp), rank % ep
        assert run_ranks(1, shapes_of, config, rank, size, tp, pp, ep)[0] == NativeWeights(
            config, layout_of(config), ranks).shapes
        if shape == "mixture" and pp == 1:  # all experts of a rank in two matrices, in the files of older ones
            grouped = {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True}
            assert run_ranks(1, partial(shapes_of, **grouped), config, rank, size, tp, pp, ep)[0] == NativeWeights(
                config, replace(layout_of(config), style="grouped"), ranks).shapes


Layout = dict[str, int]


def take_courses(
    mixture: str, layout: Layout, compute: str, steps: range, spoil: Callable[[], None] = lambda: None
) -> list[tuple[Course, RoutingCounts, float]]:
    """Train from the same first weights under the native engine and under Megatron's, and evaluate.

    Returns for each its course, the counts of the last step, and the cross entropy of batches with padding.
    """
    on_processor()
    spoil()
    found = []
    for name in ("native", "megatron"):
        config = make_run(mixture, layout, compute, EPS, engine=name)
        mesh = start_mesh(config)
        engine = build_engine(config, mesh)
        course = take_steps(engine, config, mesh, steps, padding=False)
        found.append((course, engine.routing(), engine.evaluate(batches_of(0, config, mesh))))
    stop_mesh()
    return found


def compare(ranks: int, *arguments: Any) -> dict[str, float]:
    """Train on so many ranks, whose stages have the weights together. Returns the largest relative differences."""
    found = run_ranks(ranks, take_courses, *arguments)
    (native, counts, loss), (megatron, other, other_loss) = found[0]
    tolerance = TOLERANCES[arguments[2]]
    assert other_loss == pytest.approx(loss, rel=tolerance)
    for index, layer in counts.layers.items():
        assert tolerance > 1e-5 or other.layers[index].tokens_per_expert == layer.tokens_per_expert
        assert other.layers[index].tokens == layer.tokens
        assert other.layers[index].entropy == pytest.approx(layer.entropy, rel=tolerance)
    ours, theirs = ({name: tensor for rank in found for name, tensor in rank[place][0].weights.items()}
                    for place in (0, 1))
    return difference(replace(megatron, weights=theirs), replace(native, weights=ours))


def check(ranks: int, mixture: str, layout: Layout, compute: str, steps: range) -> None:
    for name, found in compare(ranks, mixture, layout, compute, steps).items():
        print(f"{ranks} {mixture} {layout} {compute} {name} {found:.1e}")
        assert found < TOLERANCES[compute], f"{name} differ by {found:.1e}"


@pytest.mark.parametrize(("ranks", "mixture", "layout"), [(2, "dropless", {"ep": 2}), (4, "none", {"tp": 2, "pp": 2})],
                         ids=str)
def test_steps_are_the_native_engines(ranks: int, mixture: str, layout: Layout) -> None:
    check(ranks, mixture, layout, "float32", range(0, 6, 2))  # in others are fewer passes than stages


@pytest.mark.slow
@pytest.mark.parametrize("compute", TOLERANCES)
@pytest.mark.parametrize(("ranks", "mixture", "layout"), [
    (2, "dropless", {"ep": 2}), (2, "bias", {"ep": 2}), (2, "pass", {"ep": 2}), (4, "bias", {"ep": 2}),
    (4, "dropless", {"ep": 2, "dispatcher": "all_gather"}), (4, "dropless", {"ep": 2, "pp": 2}),
    (1, "dropless", {}), (2, "none", {"tp": 2}), (4, "none", {"tp": 2, "pp": 2}), (2, "none", {})], ids=str)
def test_twenty_steps_are_the_native_engines(ranks: int, mixture: str, layout: Layout, compute: str) -> None:
    check(ranks, mixture, layout, compute, range(0, 40, 2) if "pp" in layout else range(20))


def build_spoilt(config: Config, spoil: Callable[[torch.nn.Module], None], **settings: Any) -> torch.nn.Module:
    model = build_model(config, **settings)
    spoil(model)
    return model


def reduce_experts_over_all_ranks() -> None:
    def mark(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.allreduce = True

    engine_module.build_model = partial(build_spoilt, spoil=mark)


def count_halves_in_the_norm() -> None:
    engine_module.build_model = partial(build_model, perform_initialization=False)  # which also marks what tp cuts


def decay_embeddings() -> None:
    engine_module.ParamPredicate = lambda name, fn: ParamPredicate(name, lambda parameter: False)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "mixture", "layout", "shows"), [
    (reduce_experts_over_all_ranks, "dropless", {"ep": 2}, "weights"),
    (count_halves_in_the_norm, "none", {"tp": 2}, "norms"), (decay_embeddings, "dropless", {"ep": 2}, "weights")])
def test_planted_faults_are_found(fault: Callable[[], None], mixture: str, layout: Layout, shows: str) -> None:
    ((native, _, _), (megatron, _, _)), _ = run_ranks(2, take_courses, mixture, layout, "float32", range(2), fault)
    assert difference(megatron, native)[shows] > 5e-5


def change_over(folder: Path, before: str, after: str, mixture: str, layout: Layout) -> tuple[Course, list[Course]]:
    """Train in one go; and under one engine to step 2, then under another. Returns both, the second in two parts."""
    on_processor()
    config = make_run(mixture, layout, "float32", EPS, engine=before)
    mesh = start_mesh(config)
    unbroken = take_steps(build_engine(config, mesh), config, mesh, range(4), padding=False)
    engine = build_engine(config, mesh)
    parts = [take_steps(engine, config, mesh, range(2), padding=False)]
    engine.capture({"config.yaml": config.to_yaml()}, {}).write(folder, 9, mesh.checkpoint_group)
    config = make_run(mixture, layout, "float32", EPS, engine=after)
    engine = build_engine(config, mesh)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    engine.load(checkpoint)
    parts.append(take_steps(engine, config, mesh, range(2, 4), padding=False))
    stop_mesh()
    return unbroken, parts


@pytest.mark.parametrize(("before", "after", "mixture", "layout"), [
    ("native", "megatron", "bias", {"ep": 2}), ("megatron", "native", "bias", {"ep": 2}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("native", "megatron", "none", {"tp": 2}), ("megatron", "native", "none", {"tp": 2}),
        ("megatron", "megatron", "dropless", {"ep": 2})))], ids=str)
def test_a_run_goes_on_under_the_other_engine(
    tmp_path: Path, before: str, after: str, mixture: str, layout: Layout
) -> None:
    unbroken, (first, second) = run_ranks(2, change_over, tmp_path, before, after, mixture, layout)[0]
    joined = Course(first.losses + second.losses, first.norms + second.norms, second.weights)
    for name, found in difference(joined, unbroken).items():
        print(f"{before} {after} {mixture} {name} {found:.1e}")
        assert found < 1e-5, f"{name} differ by {found:.1e}"
