"""Runs a training step in many layouts on this machine, and compares each to one process."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moescale.config import Config, ConfigError
from moescale.data.batches import Batch
from moescale.engine.base import check_engine
from moescale.parallel import pipeline  # noqa: F401  it takes a while, which forked ranks need not repeat
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import RanksError, run_ranks
from moescale.verify.candidates import Layout
from moescale.verify.compare import TOLERANCES, Deviation, compare, diagnose
from moescale.verify.observation import Observation, make_batches, observe_step
from moescale.verify.shrink import MICRO_BATCHES

SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble", "gpipe")
MAX_DRAWS = 10


@dataclass(frozen=True)
class Case:
    """One way to run one layout. config: settled."""

    passes: int  # micro-batches
    compute: str
    config: Config


@dataclass(frozen=True)
class LayoutResult:
    """The result of one layout. schedules: the pipeline schedules that were run. figures: by passes and compute.

    diagnosis: empty when everything agrees with one process. error: the traceback of a rank that raised.
    """

    layout: Layout
    schedules: tuple[str, ...]
    seconds: float
    figures: dict[tuple[int, str], list[Deviation]]
    diagnosis: str
    error: str = ""


@dataclass(frozen=True)
class Proof:
    """All that is needed to try layouts. config: shrunk. references: the step of one process, by compute."""

    config: Config
    batches: Batch
    references: dict[str, Observation]


def prepare(config: Config, seed: int) -> Proof:
    """Take the step of a shrunk run on one process, in both precisions, under the native engine.

    When two experts are nearly equal for some token, rounding decides between them, differently in each layout, which
    proves nothing: then other batches are drawn, a few times, and those with the largest gap are taken.
    """
    alone = config.model_copy(update={"run": config.run.model_copy(update={"engine": "native"})})
    passes = _numbers_of_passes(config, Layout())[0]
    proofs: list[Proof] = []
    for attempt in range(MAX_DRAWS):
        batches = make_batches(config, seed + attempt)
        references = {
            compute: run_ranks(1, _reference, _case(alone, Layout(), passes, compute, "gpipe").config, batches)[0]
            for compute in TOLERANCES
        }
        proofs.append(Proof(config, batches, references))
        if references["float32"].closest > TOLERANCES["float32"]:
            break
    return max(proofs, key=lambda proof: proof.references["float32"].closest)


def try_layouts(proof: Proof, layouts: Sequence[Layout], timeout_seconds: float) -> Iterator[LayoutResult]:
    """Run one layout after another. timeout_seconds: of each"""
    turn = 0
    for layout in layouts:
        cases = make_cases(proof.config, layout, turn)
        turn += layout.pp > 1
        yield _try(proof, layout, cases, timeout_seconds)


def make_cases(config: Config, layout: Layout, turn: int) -> list[Case]:
    """List the runs of one layout: every number of passes, every precision of the engine.

    turn: which schedule comes first.
    """
    order = SCHEDULES[turn % 3 :] + SCHEDULES[: turn % 3]
    cases = []
    for passes in _numbers_of_passes(config, layout):
        fitting = (schedule for schedule in order if _fits(config, layout, passes, schedule))
        schedule = next(fitting, "gpipe")
        each = (_case(config, layout, passes, compute, schedule) for compute in TOLERANCES)
        cases += [case for case in each if _runs(case.config)]
    return cases


def _runs(config: Config) -> bool:
    try:
        check_engine(config)
    except ConfigError:
        return False
    return True


def _numbers_of_passes(config: Config, layout: Layout) -> tuple[int, ...]:
    """List the numbers of passes to try; a balance loss per micro-batch allows only the one with the same sequences."""
    if config.moe.balance_over != "micro_batch":
        return MICRO_BATCHES
    assert config.data.micro_batch is not None
    return (config.data.global_batch // (layout.dp_replicate * layout.dp_shard) // config.data.micro_batch,)


def _fits(config: Config, layout: Layout, passes: int, schedule: str) -> bool:
    if schedule != "gpipe" and passes == 1:
        return False  # nothing to interleave
    try:
        _case(config, layout, passes, "float32", schedule)
    except ConfigError:
        return False
    return True


def _case(config: Config, layout: Layout, passes: int, compute: str, schedule: str) -> Case:
    share = config.data.global_batch // (layout.dp_replicate * layout.dp_shard)
    settled = layout.settle(config, schedule, share // passes)
    precision = config.precision.model_copy(update={"compute": compute})
    return Case(passes, compute, settled.model_copy(update={"precision": precision}))


def _try(proof: Proof, layout: Layout, cases: list[Case], timeout_seconds: float) -> LayoutResult:
    begin = time.monotonic()
    figures, diagnosis, error = {}, "", ""
    try:
        results = run_ranks(layout.ranks, _compare_cases, cases, proof, timeout_seconds=timeout_seconds)
        for case, result in zip(cases, results[0], strict=True):
            figures[case.passes, case.compute] = result
            wrong = diagnose(result, TOLERANCES[case.compute])
            if wrong and not diagnosis:
                diagnosis = f"{wrong} ({case.compute}, micro-batches {case.passes})"
    except RanksError as raised:
        error = str(raised).strip()
        diagnosis = _last_line(error)
    schedules = tuple(dict.fromkeys(case.config.parallel.pp_schedule for case in cases)) if layout.pp > 1 else ()
    return LayoutResult(layout, schedules, time.monotonic() - begin, figures, diagnosis, error)


def _last_line(error: str) -> str:
    """Say what a rank raised, and in which line of MoEScale."""
    lines = error.splitlines()
    ours = re.findall(r'File ".*?(moescale/[a-z_/]+\.py)", line (\d+)', error)
    return f"{lines[-1]} ({':'.join(ours[-1])})" if ours else lines[-1]


def _reference(config: Config, batches: Batch) -> Observation:
    return observe_step(config, start_mesh(config), batches)


def _compare_cases(cases: Sequence[Case], proof: Proof) -> list[list[Deviation]]:
    """Run on one rank of a layout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an exception travels to the parent; what libraries log is noise
    mesh = start_mesh(cases[0].config)
    results = []
    for case in cases:
        mesh = replace(mesh, parallel=case.config.parallel)  # the schedule alone is another
        step = observe_step(case.config, mesh, proof.batches)
        results.append(compare(step, proof.references[case.compute], mesh.world_group))
    stop_mesh()
    return results
