"""Checkpoints that are written while training goes on: the same bytes, one at a time, and no word lost."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moescale.checkpoint import store
from moescale.checkpoint.background import BackgroundWriter
from moescale.checkpoint.capture import Capture, HostCopy
from moescale.checkpoint.store import read_state, read_stored
from moescale.config import ConfigError
from moescale.data.batches import Batches
from moescale.data.token_file import prepare_tokens
from moescale.engine.native import NativeEngine
from moescale.parallel.mesh import start_mesh, stop_mesh
from moescale.parallel.ranks import run_ranks
from moescale.saving import Saver
from tests.support.joined import make_config, whole_tensors, write_text
from tests.support.saved import make_tensors


def save_both_ways(folder: Path, parallel: dict[str, int]) -> bool:
    """Save step 2 at once, and from a copy while two more steps are done. Returns whether both are bit-equal."""
    config = make_config(folder, parallel, {})
    batches = Batches(prepare_tokens(config.data).train, seq_len=32, global_batch=8, seed=3)
    mesh = start_mesh(config)
    engine, writer, trained = NativeEngine(config, mesh), BackgroundWriter(), threading.Event()

    def train(steps: int) -> None:
        for _ in range(steps):
            engine.forward_backward(batches.micro_batches(engine.step_count, mesh.batch_rank, mesh.batch_size, 2))
            engine.step()

    train(2)
    engine.capture({}, {}).write(folder / "at_once", 1, mesh.checkpoint_group)
    moment = engine.capture({}, {}, HostCopy())
    before = {name: tensor.clone() for name, tensor in whole_tensors(engine).items()}

    def write() -> Path:
        assert trained.wait(60)
        return moment.write(folder / "in_background", 1, mesh.checkpoint_group)

    writer.start(write)
    train(2)  # while the write is under way
    assert not writer.is_over
    trained.set()
    assert writer.wait() == folder / "in_background/checkpoints/step_00000002"
    after = whole_tensors(engine)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("norm.weight"))
    equal = []
    for run in ("at_once", "in_background"):
        engine.load(folder / run / "checkpoints/step_00000002")
        equal.append(all(torch.equal(tensor, before[name]) for name, tensor in whole_tensors(engine).items()))
    stop_mesh()
    return all(equal)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {"ep": 2}), (4, {"pp": 2, "tp": 2})], ids=str)
def test_a_save_in_the_background_is_the_one_at_once(tmp_path: Path, ranks: int, parallel: dict[str, int]) -> None:
    write_text(tmp_path)
    assert run_ranks(ranks, save_both_ways, tmp_path, parallel) == [True] * ranks
    at_once, background = (tmp_path / run / "checkpoints/step_00000002" for run in ("at_once", "in_background"))
    assert read_state(at_once) == read_state(background)
    assert read_stored(at_once) == read_stored(background)


class Moments:
    """Stands for an engine: one moment after another."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, host: HostCopy | None) -> Capture:
        self.step += 1
        tensors = make_tensors()
        return Capture(self.step, tensors if host is None else host.fill(tensors), {"seed": 5}, {})


@pytest.fixture
def told() -> list[object]:
    return []


@pytest.fixture
def saver(tmp_path: Path, told: list[object]) -> Saver:
    return Saver(lambda moment: moment.write(tmp_path, 3, None), background=True, key="checkpoint.every",
                 saved=lambda step, folder: told.append((step, folder.name)), report=told.append)


def test_there_are_never_two_at_once(
    monkeypatch: pytest.MonkeyPatch, saver: Saver, told: list[object]
) -> None:
    under_way, most, moments = [0], [0], Moments()

    def finish(*args: object) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.2)
        real(*args)
        under_way[0] -= 1

    real = store._finish
    monkeypatch.setattr(store, "_finish", finish)
    monkeypatch.setattr("moescale.saving.LONG_SECONDS", 0.1)
    began = time.monotonic()
    saver.save(moments)
    assert time.monotonic() - began < 0.15, "the first one keeps nobody waiting"
    saver.save(moments)
    assert saver.finish(must=True).name == "step_00000002"
    assert most == [1]
    (first, word, second) = told
    assert (first, second) == ((1, "step_00000001"), (2, "step_00000002"))
    assert "waited 0." in word


def test_a_write_that_fails_is_told_at_the_next_step_and_tried_again_at_the_next_save(
    monkeypatch: pytest.MonkeyPatch, saver: Saver, told: list[object]
) -> None:
    moments, real = Moments(), store._finish

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_finish", fail)
    saver.save(moments)
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        saver.look()
    (word,) = told
    assert "no checkpoint of step 1 could be written" in word
    assert "no space left on device" in word
    assert "the next save tries again" in word
    with pytest.raises(ConfigError, match="no checkpoint of step 2"):
        saver.save(moments, last=True)
    monkeypatch.setattr(store, "_finish", real)
    saver.save(moments, last=True)
    assert saver.last.name == "step_00000003"


def lose_a_rank(folder: Path) -> str:
    """Let rank 1 go while rank 0 writes. Returns what rank 0 is told."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        return ""
    writer = BackgroundWriter()
    moment = Capture(1, make_tensors(), {"seed": 5}, {})
    writer.start(partial(moment.write, folder, 1, None))
    try:
        writer.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_that_is_lost_during_a_write_ends_the_run(tmp_path: Path) -> None:
    said = run_ranks(2, lose_a_rank, tmp_path, timeout_seconds=30)[0]
    assert said.startswith("LostRanksError: rank 0, saving step 1")
