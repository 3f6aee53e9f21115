"""Checkpoints are whole or absent, load in any layout, and run no code."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.checkpoint import store
from moescale.checkpoint.index import read_metadata
from moescale.checkpoint.store import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from moescale.config import ConfigError, LostRanksError, TrainingError
from moescale.parallel.ranks import run_ranks
from tests.support.saved import make_tensors, save


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in make_tensors().items()}


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tensors = empty()
    assert load_checkpoint(folder, tensors) == {"step": 1, "seed": 5} == read_state(folder)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in make_tensors().items())
    assert (folder / "config.yaml").read_text() == "x: 1\n"
    weights = {name: tensor for name, tensor in empty().items() if name.startswith("model.")}
    load_checkpoint(folder, weights, prefix="model.")
    assert torch.equal(weights["model.a"], make_tensors()["model.a"])


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    """Whatever can be saved can be loaded; random states are uint8."""
    dtypes = [torch.uint8, torch.bool, torch.int8, torch.int16, torch.int64, torch.float64, torch.float8_e4m3fn]
    tensors = {f"t.{dtype}": torch.tensor([0, 1, 1, 0]).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(3.5)}
    folder = save_checkpoint(tmp_path, 1, tensors, {}, {}, keep=1)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_checkpoint(folder, loaded)
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_a_folder_of_the_same_step_that_is_not_whole_is_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "checkpoint.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    assert save(tmp_path) == latest_checkpoint(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_the_last_few_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001.partial").mkdir(parents=True)
    for step in (1, 2, 3, 20):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000020"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"


@pytest.mark.parametrize("name", [
    "mine.partial", "step_00000007.partial", "step_1.partial", "step_00000009.partial", "step_00000007.old.partial",
])
def test_what_somebody_else_put_there_stays(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    mine = tmp_path / "checkpoints" / name
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    if name == "step_00000009.partial":  # a checkpoint that was put aside
        (mine / "notes.txt").rename(mine / "checkpoint.json")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1)
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    if name == "step_00000007.partial":
        with pytest.raises(ConfigError, match=r"step_00000007\.partial is in the way"):
            save(tmp_path, 7)
        assert [path.read_text() for path in mine.iterdir()] == ["mine"]


def test_a_link_among_the_leftovers_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "checkpoints" / "step_00000007.partial").symlink_to(mine)
    save(tmp_path, 2)
    assert mine.is_dir()
    assert (tmp_path / "checkpoints" / "step_00000007.partial").is_symlink()


def _cut(tensors: dict[str, torch.Tensor], dim: int) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(min(dim, tensor.ndim - 1))], src_data_rank=None)
            for name, tensor in tensors.items()}


def _on_ranks(run_dir: Path, dim: int, write: bool) -> bool:
    dist.init_process_group("gloo")
    tensors = _cut(make_tensors() if write else empty(), dim)
    if write:
        save_checkpoint(run_dir, 4, tensors, {}, {}, keep=3)
    else:
        load_checkpoint(run_dir / "checkpoints" / "step_00000004", tensors)
    same = all(torch.equal(tensors[name].full_tensor(), tensor) for name, tensor in make_tensors().items())
    dist.destroy_process_group()
    return same


def test_any_layout_reads_what_any_layout_wrote(tmp_path: Path) -> None:
    assert all(run_ranks(2, _on_ranks, tmp_path, 0, True))
    assert all(run_ranks(3, _on_ranks, tmp_path, 1, False))  # uneven parts of other dims
    tensors = empty()
    load_checkpoint(tmp_path / "checkpoints" / "step_00000004", tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in make_tensors().items())


def refused(folder: Path, *words: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(folder, tensors or empty())
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_damage_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for number, spoil in enumerate((
        lambda file: file.write_bytes(file.read_bytes()[:-7]),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"),
    )):
        folder = save(tmp_path, 10 + number, keep=9)
        spoil(folder / "__0_0.distcp")
        refused(folder, "damaged", "__0_0.distcp", f"remove {folder} to go on from step_")
    folder = save(tmp_path, 20)
    (folder / "checkpoint.json").write_text("{")
    refused(folder, "damaged")
    refused(tmp_path / "nothing", "is not a checkpoint")


def test_another_model_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tensors = empty()
    refused(folder, "another model", "model.a has shape [6, 4] there and [6, 5] here",
            tensors={**tensors, "model.a": torch.zeros(6, 5)})
    refused(folder, "model.z is not in it", tensors={**tensors, "model.z": torch.zeros(1)})
    refused(folder, "optim.c is not in this model", tensors={k: v for k, v in tensors.items() if k != "optim.c"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.b", "optim.c"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, name: str) -> None:
    folder, tensors = save(tmp_path, 1), make_tensors()
    tensors[name].view(-1)[-1] = value
    with pytest.raises(TrainingError, match=f"{name} .*step_00000001"):
        save_checkpoint(tmp_path, 2, tensors, {}, {}, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    large = {"w": torch.full((4,), 3e38), "none": torch.zeros(0)}
    save_checkpoint(tmp_path, 3, large, {}, {}, keep=1)  # whose sum is not finite


def test_what_is_not_finite_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors()
    save(tmp_path, 1)
    tensors["model.b"][3, 2, 1] = float("nan")
    with monkeypatch.context() as blind:
        blind.setattr(store, "not_finite", lambda *args: None)
        older, folder = (save_checkpoint(tmp_path, step, tensors, {}, {}, keep=9) for step in (2, 3))
    refused(folder, "model.b", f"remove {folder} {older} to go on from step_00000001")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    refused(folder, "model.b", "to start anew")
    load_checkpoint(folder, {"optim.c": torch.zeros(7, dtype=torch.bfloat16)}, prefix="optim.")


def _not_finite_on_one(run_dir: Path) -> str:
    dist.init_process_group("gloo")
    tensors = _cut(make_tensors(), 0)
    if dist.get_rank() == 1:
        tensors["model.a"].to_local()[0] = float("inf")
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(run_dir, 7, tensors, {}, {}, keep=3)
    return str(caught.value)


def test_what_is_not_finite_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    messages = run_ranks(2, _not_finite_on_one, tmp_path, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "model.a" in messages[0]
    assert not (tmp_path / "checkpoints").exists()


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, and make its manifest agree, as one who means harm would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"][name] = [len(data), zlib.crc32(data)]
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


INDEXES = {
    "no pickle": b"garbage", "nothing": b"", "no index": pickle.dumps({"a": 1}),
    "no entries": pickle.dumps(Metadata({"a": 1}, storage_data={"x": 3})),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("data", INDEXES.values(), ids=INDEXES.keys())
def test_an_index_that_is_none_is_one_line(tmp_path: Path, data: bytes) -> None:
    folder = save(tmp_path)
    _replace(folder, ".metadata", data)
    refused(folder, "damaged: its index .metadata cannot be read")


def test_an_index_with_holes_is_refused(tmp_path: Path) -> None:
    """Torch would leave those parts of the weights as they were, without a word."""
    folder = save(tmp_path)
    index = read_metadata(folder)
    index.state_dict_metadata["model.a"].chunks.clear()  # type: ignore[union-attr]
    _replace(folder, ".metadata", pickle.dumps(index))
    refused(folder, "does not hold the whole of model.a")


def test_files_of_any_size_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    index = read_metadata(folder)
    far = {name: dataclasses.replace(place, offset=2**40, length=2**40) for name, place in index.storage_data.items()}
    _replace(folder, ".metadata", pickle.dumps(dataclasses.replace(index, storage_data=far)))
    assert {place.offset for place in read_metadata(folder).storage_data.values()} == {2**40}


FILES: list[object] = [
    None, [".metadata"], {}, {".metadata": None}, {".metadata": [1]}, {".metadata": ["1", 2]},
    {".metadata": [1, 2], "../x": [1, 2]},
]


@pytest.mark.parametrize("files", FILES, ids=repr)
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, files: object) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"files": files}))
    refused(folder, "damaged: its checkpoint.json cannot be read", f"remove {folder} to go on from step_00000001")


def test_no_code_runs(tmp_path: Path) -> None:
    harmful = Malicious()
    harmful.target = tmp_path / "harm"
    folder = save(tmp_path, 1)
    _replace(folder, ".metadata", pickle.dumps(harmful))
    refused(folder, "posix.mkdir", "was not loaded")
    folder = save(tmp_path, 2)
    whole = (folder / "__0_0.distcp").read_bytes()
    torch.save(harmful, tmp_path / "bad.pt")
    bad = (tmp_path / "bad.pt").read_bytes()
    _replace(folder, "__0_0.distcp", (bad + whole)[: max(len(whole), len(bad))])
    refused(folder)
    assert not harmful.target.exists()


def _forked(work: Callable[[], object]) -> BaseProcess:
    def run() -> None:
        torch.set_num_threads(1)
        work()

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def _whole_after_kill(run_dir: Path, done: int) -> int:
    """Load what is left. done: a step that was saved for certain. -> the step of the last good checkpoint"""
    folder = latest_checkpoint(run_dir)
    assert folder is not None
    tensors = empty()
    step = load_checkpoint(folder, tensors)["step"]
    assert step >= done
    assert all(torch.equal(tensors[name], tensor) for name, tensor in make_tensors().items())
    for other in (run_dir / "checkpoints").iterdir():
        if other.suffix != ".partial":
            load_checkpoint(other, empty())
    return step


def test_a_kill_at_a_random_moment_leaves_the_last_good_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    done, log = 0, tmp_path / "done"

    def save_many() -> None:
        for step in range(done + 1, done + 1000):
            save(tmp_path, step, keep=2)
            log.write_text(f"{step:09d}")

    for _ in range(10):
        writer = _forked(save_many)
        before = done
        while not log.exists() or int(log.read_text() or 0) <= before:
            assert writer.is_alive()
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        writer.kill()
        writer.join(10)
        done = _whole_after_kill(tmp_path, int(log.read_text() or before))


CHANGES = ("fsync", "mkdir", "rename", "rmdir", "unlink")


def _save_until(change: int, run_dir: Path) -> None:
    """Save two more steps, and die before the change-th change that the file system would see."""
    left = iter(range(change, -1, -1))

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    save(run_dir, 2, keep=1)
    save(run_dir, 3, keep=1)


def test_a_kill_before_every_single_change_leaves_the_last_good_one(tmp_path: Path) -> None:
    seen = set()
    for change in range(200):
        run_dir = tmp_path / str(change)
        save(run_dir, 1)
        writer = _forked(lambda change=change, run_dir=run_dir: _save_until(change, run_dir))
        writer.join(20)
        seen.add(_whole_after_kill(run_dir, 1))
        if writer.exitcode == 0:
            break
        assert writer.exitcode == -signal.SIGKILL
        save(run_dir, 9, keep=1)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000009"], "leftovers go"
    assert writer.exitcode == 0
    assert change > 20, "the changes were not seen"
    assert seen == {1, 2, 3}


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


def _full_disk_on_one(run_dir: Path, full: int) -> str:
    """A limit on the size of files stands in for the disk: it too cuts a write in the middle."""
    dist.init_process_group("gloo")
    if dist.get_rank() == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    tensors = _cut({"w": torch.ones(300, 300)}, 0)
    return _attempt(lambda: save_checkpoint(run_dir, 7, tensors, {}, {}, keep=1))


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_ends_all_and_harms_nothing(tmp_path: Path, full: int) -> None:
    folder = save(tmp_path, 1)
    messages = run_ranks(2, _full_disk_on_one, tmp_path, full, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "file too large; the last good one is step_00000001" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    load_checkpoint(folder, empty())


def _trouble_on_one(run_dir: Path, place: str) -> str:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        setattr(store, place, fail)
    if place != "check_sums":
        return _attempt(lambda: load_checkpoint(run_dir / "checkpoints" / "step_00000001", _cut(empty(), 0)))
    return _attempt(lambda: save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), {}, {}, keep=3))


@pytest.mark.parametrize("place", ["check_sums", "_read_manifest", "_verify"])
def test_trouble_on_one_rank_is_told_by_all(tmp_path: Path, place: str) -> None:
    folder = save(tmp_path, 1)
    messages = run_ranks(2, _trouble_on_one, tmp_path, place, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "no space left on device" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def _bug_on_one(run_dir: Path) -> str:
    dist.init_process_group("gloo")
    state = {"seed": {1} if dist.get_rank() == 0 else 1}
    if dist.get_rank() == 1:
        return _attempt(lambda: save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), state, {}, keep=3))
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), state, {}, keep=3)
    return ""


def test_a_bug_on_one_rank_leaves_none_waiting(tmp_path: Path) -> None:
    assert "not JSON serializable" in run_ranks(2, _bug_on_one, tmp_path, timeout_seconds=30)[1]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "remove_marked", fail)
    with pytest.warns(UserWarning, match="could not be removed: permission denied"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000002"
    save(tmp_path, 3, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def _seen_late(run_dir: Path, seconds: float) -> str:
    """Save on two ranks; what rank 1 wrote appears late where others look, as on a network disk."""
    dist.init_process_group("gloo")
    store.SAVED_SECONDS = 1.5  # type: ignore[assignment]
    if dist.get_rank() == 1:
        real = store.check_sums

        def sums(folder: Path, pattern: str) -> dict[str, list[int]]:
            found = real(folder, pattern)
            for name in found if pattern == "__1_*" else ():
                hidden = run_dir / name
                (folder / name).rename(hidden)
                threading.Timer(seconds, lambda name=name, hidden=hidden: hidden.rename(folder / name)).start()
            return found

        store.check_sums = sums
    return _attempt(lambda: save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), {}, {}, keep=1))


def test_a_file_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert run_ranks(2, _seen_late, tmp_path, 0.6, timeout_seconds=30) == ["", ""]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000007"]
    load_checkpoint(tmp_path / "checkpoints" / "step_00000007", empty())


def test_a_checkpoint_that_is_not_seen_whole_removes_no_older_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    messages = run_ranks(2, _seen_late, tmp_path, 600.0, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "__1_0.distcp, which rank 1 wrote, is missing" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    load_checkpoint(folder, empty())


def _slow_writer(run_dir: Path) -> str:
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        real = store.write_tensors
        store.write_tensors = lambda *args: (time.sleep(3), real(*args))
    try:
        save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), {}, {}, keep=1, group=group)
    except LostRanksError as error:
        return str(error)
    return ""


def test_a_save_that_takes_too_long_names_its_own_limit(tmp_path: Path) -> None:
    for message in run_ranks(2, _slow_writer, tmp_path, timeout_seconds=30):
        assert "saving step 7" in message
        assert "checkpoint.timeout_seconds" in message
