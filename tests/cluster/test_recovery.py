"""Copies in the memory of hosts: a host may be lost with all that it held, and no step with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.memory import COPY, MemoryCopies
from moescale.checkpoint.store import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from moescale.cluster.agreement import Agreement
from moescale.cluster.launch import read_launch
from moescale.cluster.recovery import open_memory, partners, recover_from_memory
from moescale.config import ConfigError
from moescale.parallel.ranks import run_ranks
from tests.support.saved import make_tensors

HOSTS = 2  # that ranks pretend to be on, in equal numbers


def test_partners_are_on_the_next_host() -> None:
    assert partners(["a", "a"]) == [None, None]
    assert partners(["a", "a", "b", "b"]) == [2, 3, 0, 1]
    assert partners(["a", "b", "b", "c"]) == [1, 3, 3, 0]
    for nodes in (["a", "b", "a", "b"], ["a", "a", "b", "b", "b", "c"]):
        assert all(nodes[to] != nodes[rank] for rank, to in enumerate(partners(nodes)) if to is not None)


def meet(hosts: int) -> Agreement:
    """Take this forked rank for one of those that launchers on so many hosts have started."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = size // hosts
    os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local), GROUP_RANK=str(rank // local))
    ranks = Agreement(read_launch())
    ranks.meet(30)
    return ranks


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor + step for name, tensor in make_tensors().items()}


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def keep_steps(run_dir: Path, memory: Path, hosts: int, steps: list[int], full: bool = False) -> list[str]:
    """Keep these steps in memory, after step 2 on the disk, and return what went wrong.

    full: host 1 has no space for the last of them.
    """
    ranks = meet(hosts)
    dist.init_process_group("gloo", store=ranks.store, rank=ranks.launch.rank, world_size=ranks.launch.size)
    save_checkpoint(run_dir, 2, cut(tensors_at(2)), {"seed": 5}, {"config.yaml": "x: 1\n"}, keep=3)
    place = open_memory(ranks, run_dir, str(memory))
    copies = MemoryCopies(place, None, lambda: latest_checkpoint(run_dir))
    problems, host = [], HostCopy()
    for step in steps:
        if full and step == steps[-1] and ranks.launch.node == 1:
            os.posix_fallocate = refuse_space  # type: ignore[assignment]
        try:
            copies.write(Capture(step, host.fill(cut(tensors_at(step))), {"seed": 5}, {"config.yaml": "x: 1\n"}))
        except ConfigError as error:
            problems.append(str(error))
    with ranks.one_voice():
        dist.destroy_process_group()
    return problems


def refuse_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


def go_on(run_dir: Path, memory: Path) -> tuple[str, ...]:
    ranks = meet(1)
    with ranks.one_voice():
        return recover_from_memory(ranks, run_dir, str(memory))


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def recovered(run_dir: Path, memory: Path, ranks: int = 2) -> tuple[int, str]:
    """Go on with so many ranks; return the step on the disk, of its own values, and what was said."""
    (said, *others) = run_ranks(ranks, go_on, run_dir, memory, timeout_seconds=60)
    assert all(other == said for other in others)
    folder = latest_checkpoint(run_dir)
    assert folder is not None
    state, tensors = read_state(folder), {name: torch.zeros_like(tensor) for name, tensor in make_tensors().items()}
    load_checkpoint(folder, tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_at(state["step"]).items())
    assert state["seed"] == 5
    assert (folder / "config.yaml").read_text() == "x: 1\n"
    return state["step"], " ".join(said)


@pytest.mark.parametrize(("ranks", "hosts"), [(2, 2), (4, 2), (4, 4)])
def test_a_host_that_is_lost_takes_no_step_along(tmp_path: Path, memory: Path, ranks: int, hosts: int) -> None:
    assert run_ranks(ranks, keep_steps, tmp_path / "run", memory, hosts, [3, 4], timeout_seconds=60) == [[]] * ranks
    (home,) = memory.iterdir()
    assert home.stat().st_mode & 0o777 == 0o700
    first, *_, last = sorted(home.iterdir())
    assert [path.name for path in first.iterdir()] == ["step_00000004"], "one copy is kept"
    assert len(list(first.rglob("*.distcp"))) == 2 * ranks // hosts, "its own, and another host's"
    shutil.rmtree(last if ranks == 2 else first)
    step, said = recovered(tmp_path / "run", memory)
    assert step == 4
    assert "step 4 was brought back" in said
    assert recovered(tmp_path / "run", memory) == (4, ""), "it is on the disk now"


def test_what_is_not_whole_or_given_up_is_not_taken(tmp_path: Path, memory: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, keep_steps, run, memory, HOSTS, [3], timeout_seconds=60) == [[], []]
    (home,) = memory.iterdir()
    first, second = (place / "step_00000003" for place in sorted(home.iterdir()))
    # Both hosts hold both files. One byte of one of them is turned in both places, the size stays.
    for place in (first, second):
        content = (place / "__1_0.distcp").read_bytes()
        (place / "__1_0.distcp").write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    step, said = recovered(run, memory)
    assert step == 2
    assert "step 3, which the memory of hosts holds, cannot be used" in said
    assert not list((run / "checkpoints").glob("*.partial"))
    # A file that is on no host.
    for place in (first, second):
        (place / "__1_0.distcp").unlink()
    assert recovered(run, memory) == (2, "")
    # The checkpoint after which the copy was made is gone: somebody went back.
    shutil.rmtree(run / "checkpoints/step_00000002")
    assert run_ranks(1, go_on, run, memory, timeout_seconds=60) == [()]
    assert latest_checkpoint(run) is None


def test_a_copy_made_after_a_checkpoint_that_was_removed_is_given_up(tmp_path: Path, memory: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, keep_steps, run, memory, 1, [3], timeout_seconds=60) == [[], []]
    (copy,) = memory.rglob(COPY)
    assert json.loads(copy.read_text())["after"] == "step_00000002"
    kept = shutil.copytree(run, tmp_path / "kept")
    shutil.rmtree(run / "checkpoints/step_00000002")
    assert run_ranks(2, go_on, run, memory, timeout_seconds=60) == [(), ()]
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    assert recovered(run, memory)[0] == 3
    # A run of the same name that began anew knows nothing of these copies.
    shutil.rmtree(run)
    assert run_ranks(2, go_on, run, memory, timeout_seconds=60) == [(), ()]


def test_a_host_without_space_keeps_the_copy_before(tmp_path: Path, memory: Path) -> None:
    run = tmp_path / "run"
    problems = run_ranks(2, keep_steps, run, memory, HOSTS, [3, 4], True, timeout_seconds=60)
    assert problems[0] == problems[1] != []
    assert "no copy of step 4" in problems[0][0]
    assert "no space left on device" in problems[0][0]
    assert recovered(run, memory)[0] == 3
