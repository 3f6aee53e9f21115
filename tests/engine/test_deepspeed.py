"""ZeRO around our layers takes the steps that the native engine takes, and goes on where it stopped, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moescale.checkpoint.store import latest_checkpoint
from moescale.engine.base import build_engine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from tests.support.engines import Course, difference, make_config, take_steps, train_each

pytest.importorskip("deepspeed")

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
NATIVE = {"engine": "native"}
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


GATHER_ALL = Path(__file__).parent.parent / "support" / "gather_all.json"  # small weights would stay whole


def zero(stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **({"deepspeed": str(GATHER_ALL)} if stage == 3 else {})}


def check(
    stages: tuple[int, ...], ranks: int, mixture: str, parallel: Mapping[str, int], compute: str, steps: int
) -> None:
    engines = [NATIVE, *map(zero, stages)]
    native, *others = run_ranks(ranks, train_each, engines, mixture, parallel, compute, steps)[0]
    for stage, course in zip(stages, others, strict=True):
        apart = difference(course, native)
        print(f"stage {stage}: {', '.join(f'{name} {found:.1e}' for name, found in apart.items())}")
        for name, found in apart.items():
            assert found < TOLERANCES[compute], f"stage {stage}: {name} differ by {found:.1e}"


@pytest.mark.parametrize(("stages", "ranks", "mixture", "compute"), [
    ((1, 2, 3), 4, "capacity", "float32"), ((1, 3), 2, "bias", "bfloat16")], ids=str)
def test_steps_are_the_native_engines(stages: tuple[int, ...], ranks: int, mixture: str, compute: str) -> None:
    check(stages, ranks, mixture, {"ep": 2}, compute, 2)


@pytest.mark.slow
@pytest.mark.parametrize("compute", TOLERANCES)
@pytest.mark.parametrize(("ranks", "parallel"), [
    (2, {"ep": 1}), (2, {"ep": 2}), (4, {"ep": 1}), (4, {"ep": 2}), (4, {"ep": 4}), (4, {"ep": 2, "etp": 2}),
    (4, {"ep": 2, "cp": 2})], ids=str)
@pytest.mark.parametrize("mixture", ["dropless", "capacity", "bias", "global"])
def test_twenty_steps_are_the_native_engines(
    ranks: int, parallel: dict[str, int], mixture: str, compute: str
) -> None:
    check((0, 1, 2, 3), ranks, mixture, parallel, compute, 20)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_trains_alike(tmp_path: Path, stage: int) -> None:
    file, offload = tmp_path / "ds.json", {"device": "cpu"}
    zeros = {"offload_optimizer": offload, **({"offload_param": offload} if stage == 3 else {}),
             "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"zero_optimization": zeros}))
    engines = [NATIVE, {**zero(stage), "deepspeed": str(file)}]
    native, offloaded = run_ranks(2, train_each, engines, "dropless", {"ep": 2})[0]
    for name, found in difference(offloaded, native).items():
        assert found < 1e-5, f"{name} differ by {found:.1e}"


def reduce_experts_over_all_ranks() -> None:
    made = groups._create_expert_and_data_parallel

    def spoilt(ranks: int) -> None:
        made(ranks)
        groups._EXPERT_DATA_PARALLEL_GROUP[f"ep_size_{ranks}"] = dist.group.WORLD
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[f"ep_size_{ranks}"] = range(dist.get_world_size())

    groups._create_expert_and_data_parallel = spoilt


def count_experts_twice_in_the_norm() -> None:
    made = DeepSpeedZeroOptimizer._average_expert_grad_norms

    def spoilt(self: Any, norms: list[Any]) -> None:
        made(self, norms)
        norms[:] = [norm * (2**0.5 if expert else 1)
                    for norm, expert in zip(norms, self.is_moe_param_group, strict=True)]

    DeepSpeedZeroOptimizer._average_expert_grad_norms = spoilt


@pytest.mark.parametrize(("fault", "shows"), [
    (reduce_experts_over_all_ranks, "weights"), (count_experts_twice_in_the_norm, "norms")])
def test_planted_faults_are_found(fault: Any, shows: str) -> None:
    courses = run_ranks(2, train_each, [NATIVE, zero(2)], "dropless", {"ep": 2}, "float32", 2, fault)[0]
    assert difference(courses[1], courses[0])[shows] > 1e-3


def change_over(
    folder: Path, before: Mapping[str, Any], after: Mapping[str, Any], compute: str
) -> tuple[Course, list[Course]]:
    """Train in one go; and under one engine to step 3, then under another. Returns both, the second in two parts."""
    config = make_config("bias", {"ep": 2}, compute, **before)
    mesh = start_mesh(config)
    unbroken = take_steps(build_engine(config, mesh), config, mesh, range(6))
    engine = build_engine(config, mesh)
    parts = [take_steps(engine, config, mesh, range(3))]
    engine.capture({"config.yaml": config.to_yaml()}, {}).write(folder, 9, mesh.checkpoint_group)
    config = make_config("bias", {"ep": 2}, compute, **after)
    engine = build_engine(config, mesh)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    engine.load(checkpoint)
    parts.append(take_steps(engine, config, mesh, range(3, 6)))
    stop_mesh()
    return unbroken, parts


@pytest.mark.parametrize(("before", "after", "ranks", "compute"), [
    (zero(1), NATIVE, 2, "float32"), (NATIVE, zero(3), 2, "float32"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (NATIVE, zero(2), 4, "float32"), (zero(3), zero(2), 4, "float32"), (NATIVE, zero(0), 2, "float32"),
        (zero(2), zero(2), 2, "bfloat16"), (zero(0), zero(1), 2, "bfloat16"), (zero(3), NATIVE, 2, "bfloat16"))),
], ids=str)
def test_a_run_goes_on_under_the_other_engine(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], ranks: int, compute: str
) -> None:
    unbroken, (first, second) = run_ranks(ranks, change_over, tmp_path, before, after, compute)[0]
    joined = Course(first.losses + second.losses, first.norms + second.norms, second.weights)
    tolerance = 1e-5 if before == after else TOLERANCES[compute]
    for name, found in difference(joined, unbroken).items():
        assert found < tolerance, f"{name} differ by {found:.1e}"
