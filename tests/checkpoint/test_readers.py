"""Checkpoints are read beside a run that saves new ones and removes old ones."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moescale.checkpoint import store
from moescale.checkpoint.store import latest_checkpoint, load_checkpoint, read_last, save_checkpoint
from moescale.cli import app
from moescale.config import ConfigError, load_config
from moescale.convert.run import open_source
from moescale.files.locks import FileLock, is_locked
from tests.support.models import make_config, write_run


@contextmanager
def saving(run: Path, *, holds: bool) -> Iterator[Callable[[], int]]:
    """Let another process save the run's checkpoint again and again, under a new step each time, and keep one.

    holds: it waits for readers; one that does not must leave them time. Gives what says how many it has saved.
    """
    first = latest_checkpoint(run)
    assert first is not None
    tensors = {name: torch.zeros(entry.size) for name, entry in store.read_stored(first).items()}
    load_checkpoint(first, tensors)
    files = {"config.yaml": (first / "config.yaml").read_text()}
    done = multiprocessing.get_context("fork").Value("i", 0)

    def work() -> None:
        torch.set_num_threads(1)
        os.sync = os.fsync = lambda *_: None  # type: ignore[assignment]
        if not holds:
            store.is_locked = lambda folder, unknown: False  # type: ignore[assignment]
        for step in itertools.count(10):
            save_checkpoint(run, step, tensors, {"seed": 0}, files, keep=1)
            done.value = step - 9
            time.sleep(0 if holds else 0.8)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    try:
        yield lambda: done.value
        assert process.is_alive(), "the writer goes on whoever reads"
    finally:
        process.kill()
        process.join(10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", make_config({"num_layers": 1, "window": None}))


@pytest.mark.parametrize("holds", [True, False], ids=["a writer that waits for readers", "one that does not"])
def test_every_command_reads_beside_a_writer(run: Path, tmp_path: Path, holds: bool) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    commands = {
        "inspect": lambda number: ["convert", "--inspect", "--json", str(source)],
        "convert": lambda number: ["convert", str(source), str(tmp_path / f"to{number}"), "--to", "hf"],
        "generate": lambda number: ["generate", str(source), "--tokens", "2"],
    }
    with saving(source, holds=holds) as saved:
        deadline = time.monotonic() + 60
        while saved() < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        begin = saved()
        for number in range(50):
            for name, command in commands.items():
                result = CliRunner().invoke(app, command(number))
                assert result.exit_code == 0, f"{name}: {result.output} {result.exception!r}"
                if name == "inspect":
                    assert len(json.loads(result.output)["fingerprints"]) > 3
            if number >= 3 and saved() > begin + 2:
                break
        assert saved() > begin + 2, "it saved meanwhile"


def test_a_checkpoint_that_is_read_stays(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    first = latest_checkpoint(source)
    assert first is not None
    tensors, texts = {"model.x": torch.zeros(2)}, {"config.yaml": "run: {}"}
    opened = open_source(source)
    for step in (10, 11, 12):
        save_checkpoint(source, step, tensors, {"seed": 0}, texts, keep=1)
    assert is_locked(first, unknown=False)
    assert sorted(path.name for path in (source / "checkpoints").iterdir()) == [first.name, "step_00000012"]
    del opened
    assert not is_locked(first, unknown=True)
    save_checkpoint(source, 13, tensors, {"seed": 0}, texts, keep=1)
    assert [path.name for path in (source / "checkpoints").iterdir()] == ["step_00000013"]


def test_what_goes_away_each_time_is_one_line(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    first = latest_checkpoint(source)
    assert first is not None
    tries: list[Path] = []

    def read(folder: Path) -> None:
        tries.append(folder)
        (folder / "checkpoint.json").rename(folder / "gone")
        try:
            FileLock(folder / "nothing")
        finally:
            shutil.copytree(folder, folder.with_name(f"step_{len(tries) + 10:08d}"))
            new = folder.with_name(f"step_{len(tries) + 10:08d}")
            (new / "gone").rename(new / "checkpoint.json")

    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        read_last(source, read)
    assert len(set(tries)) == len(tries) > 3


@pytest.mark.parametrize("step", [-1, 10**30, 1.5, True, "5", None, [5]])
def test_a_step_that_cannot_be_is_one_line(run: Path, tmp_path: Path, step: object) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    first = latest_checkpoint(source)
    assert first is not None
    manifest = json.loads((first / "checkpoint.json").read_text())
    manifest["state"]["step"] = step
    (first / "checkpoint.json").write_text(json.dumps(manifest))
    for command in (["convert", "--inspect", str(source)], ["generate", str(source)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.exception
        assert "checkpoint.json cannot be read" in result.output


def test_a_folder_that_was_renamed_is_named(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    first = latest_checkpoint(source)
    assert first is not None
    first.rename(first.with_name("step_00009999"))
    (source / "checkpoints" / ("step_" + "9" * 200)).mkdir()
    result = CliRunner().invoke(app, ["generate", str(source)])
    assert result.exit_code == 2, result.exception
    assert "step_00009999" in result.output
    assert first.name in result.output


def test_files_of_a_checkpoint_are_its_own(run: Path, tmp_path: Path) -> None:
    """A link leads out, a pipe would be waited for; the manifest may say of both what is true."""
    for kind in ("link", "pipe"):
        source = tmp_path / kind
        shutil.copytree(run, source)
        first = latest_checkpoint(source)
        assert first is not None
        manifest = json.loads((first / "checkpoint.json").read_text())
        (tmp_path / "outside.json").write_text("")
        manifest["files"]["tokenizer.json"] = [0, 0]
        (first / "checkpoint.json").write_text(json.dumps(manifest))
        if kind == "link":
            (first / "tokenizer.json").symlink_to(tmp_path / "outside.json")
        else:
            os.mkfifo(first / "tokenizer.json")
        for command in (["convert", "--inspect", str(source)], ["generate", str(source), "--tokens", "1"]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 2, result.exception
            assert "tokenizer.json" in result.output


def test_another_model_is_refused_before_it_is_made(run: Path, tmp_path: Path) -> None:
    """Its configuration may ask for more memory than there is."""
    source = tmp_path / "run"
    shutil.copytree(run, source)
    first = latest_checkpoint(source)
    assert first is not None
    text = (first / "config.yaml").read_text()
    size = load_config(first / "config.yaml").model.d_model
    altered = text.replace(f"d_model: {size}\n", "d_model: 800000000\n").encode()
    (first / "config.yaml").write_bytes(altered)
    store.write_manifest(first, store.read_state(first))
    result = CliRunner().invoke(app, ["generate", str(source)])
    assert result.exit_code == 2, result.exception
    assert "another model" in result.output
