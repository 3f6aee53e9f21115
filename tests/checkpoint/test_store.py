"""Checkpoints are whole or absent, load in any layout, and run no code."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moescale.checkpoint import store
from moescale.checkpoint.store import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from moescale.config import ConfigError
from tests.ranks import run_ranks


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(6, 4, generator=generator),
        "model.b": torch.randn(12, 8, 4, generator=generator),
        "optim.c": torch.randn(7, generator=generator).to(torch.bfloat16),
    }


def save(run_dir: Path, step: int = 1, keep: int = 3) -> Path:
    return save_checkpoint(run_dir, step, make_tensors(), {"seed": 5}, {"config.yaml": "x: 1\n"}, keep=keep)


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


def test_the_last_few_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001.partial").mkdir(parents=True)
    for step in (1, 2, 3, 20):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000020"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000020"


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


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, and make its manifest agree, as one who means harm would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"][name] = [len(data), zlib.crc32(data)]
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


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


WRITER = """
import sys
from pathlib import Path
from tests.checkpoint.test_store import save
print("ready", flush=True)
for step in range(1, 1000):
    save(Path(sys.argv[1]), step, keep=2)
"""


def test_a_kill_at_any_moment_leaves_the_last_good_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    step = 0
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 + draw.random() * 0.3)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for folder in (tmp_path / "checkpoints").glob("step_*"):
            if folder.suffix != ".partial":
                load_checkpoint(folder, empty())
                step += 1
    assert step, "nothing was ever written: the test shows nothing"


def _full_disk_on_one(run_dir: Path) -> str:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        class Full(store.FileSystemWriter):
            def write_data(self, *args: object, **kwargs: object) -> None:
                raise OSError(28, "No space left on device")

        store.FileSystemWriter = Full  # type: ignore[misc]
    try:
        save_checkpoint(run_dir, 7, _cut(make_tensors(), 0), {}, {}, keep=3)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_full_disk_on_one_rank_ends_all_and_harms_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    messages = run_ranks(2, _full_disk_on_one, tmp_path, timeout_seconds=30)
    assert messages[0] == messages[1]
    assert "no space left on device" in messages[0]
    assert "the last good one is step_00000001" in messages[0]
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]
    load_checkpoint(folder, empty())
