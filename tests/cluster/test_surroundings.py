"""What machines offer is held to what the run needs, and all ranks hear the same."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moescale.cluster import surroundings
from moescale.cluster.agreement import Agreement
from moescale.cluster.launch import Launch, read_launch
from moescale.cluster.recovery import open_memory
from moescale.cluster.surroundings import Machine, Needs, compare_machines, describe_machine, look_around
from moescale.config import parse_config
from moescale.parallel.ranks import run_ranks
from moescale.start import needs_of

GIB = 2**30
NEEDS = Needs(rank_bytes=10 * GIB, checkpoint_bytes=5 * GIB, checkpoints=4, memory_dir="/dev/shm")
GPU = Machine("H100", True, 70 * GIB, 100 * GIB, 1000.0, 10 * GIB)
HOSTS = ["node0", "node0", "node1", "node1"]


@pytest.mark.parametrize(("check", "changes", "words"), [
    ("devices", {"device": "A100"}, ("H100 on ranks 0-2 (node0)", "A100 on rank 3 (node1)")),
    ("memory", {"free_bytes": 9 * GIB}, ("rank 3 (node1): 9.0 GiB are free", "take 10.0 GiB")),
    ("memory", {"own_memory": False, "free_bytes": 19 * GIB}, ("2 ranks on node1: 19.0 GiB", "take 20.0 GiB")),
    ("disk", {"disk_free_bytes": 19 * GIB}, ("19.0 GiB are free in run.dir (node1)", "up to 4 lie there")),
    ("copies", {"copies_bytes": 9 * GIB}, ("9.0 GiB are free for copies in checkpoint.memory_dir=/dev/shm (node1)",
                                           "up to 10.0 GiB")),
    ("copies", {"copies_bytes": None}, ("how much is free in checkpoint.memory_dir=/dev/shm", "node1")),
    ("clocks", {"clock": 1007.25}, ("rank 3 (node1) is 7.2 s ahead of",)),
    ("clocks", {"clock": 990.0}, ("rank 3 (node1) is 10.0 s behind",)),
])
def test_what_one_machine_lacks_is_named(check: str, changes: dict, words: tuple[str, ...]) -> None:
    machines = [GPU] * 3 + [replace(GPU, **changes)]
    found = {finding.check: finding for finding in compare_machines(machines, HOSTS, NEEDS)}
    assert [name for name, finding in found.items() if finding.level != "ok"] == [check]
    for word in words:
        assert word in found[check].text
    good = compare_machines([GPU] * 4, HOSTS, NEEDS)
    assert [finding.level for finding in good] == ["ok"] * 5


def test_copies_of_one_host_have_no_neighbours_and_of_other_runs_none_are_kept() -> None:
    alone = [replace(GPU, copies_bytes=10 * GIB)] * 4  # twice all weights and moments
    assert [finding.level for finding in compare_machines(alone, ["node0"] * 4, NEEDS)] == ["ok"] * 5
    without = compare_machines(alone, ["node0"] * 4, replace(NEEDS, memory_dir=None))
    assert "copies" not in [finding.check for finding in without]


def test_what_copies_of_this_run_take_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, run, memory = Agreement(Launch()), tmp_path / "run", tmp_path / "memory"
    for folder in (run, memory):
        folder.mkdir()
    place = open_memory(ranks, run, str(memory))
    (place.folder / "file").write_bytes(bytes(1000))
    (memory / "another").write_bytes(bytes(500))
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda _: SimpleNamespace(free=70))
    (tmp_path / "other").mkdir()
    for folder, copies in ((run, 1070), (tmp_path / "other", 70)):
        assert describe_machine(ranks.launch, folder, str(memory), 0.0).copies_bytes == copies


def look(run_dir: Path, ahead: float) -> list[str]:
    ranks = Agreement(read_launch())
    with ranks.one_voice():
        ranks.meet(20)
        if ranks.launch.rank == 1:
            real = time.time
            surroundings.time.time = lambda: real() + ahead
        found = look_around(ranks, run_dir, replace(NEEDS, rank_bytes=1))
        return [f"{finding.check} {finding.level}" for finding in found]


@pytest.mark.parametrize(("ahead", "level"), [(0.0, "ok"), (3.0, "warn")])
def test_ranks_compare_their_clocks_and_all_hear_the_same(tmp_path: Path, ahead: float, level: str) -> None:
    first, *others = run_ranks(3, look, tmp_path, ahead, timeout_seconds=40)
    assert f"clocks {level}" in first
    assert others == [first] * 2


def test_needs_are_those_of_weights_gradients_and_moments() -> None:
    config = parse_config({"data": {"micro_batch": 1}, "parallel": {"dp_replicate": 2}}, "test").for_world(4)
    needs = needs_of(config, 4)
    weights = needs.checkpoint_bytes / 12  # float32, and AdamW keeps two moments
    assert math.isclose(needs.rank_bytes, weights * 16 / 2, rel_tol=1e-6), "two copies of the model, each on two ranks"
    assert needs.checkpoints == config.checkpoint.keep + 1
    assert needs.memory_dir is None, "no copies are kept"
