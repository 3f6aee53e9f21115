"""Checkpoints in a storage elsewhere, by URL: whole or not counted, and fetched where the disk has none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from typer.testing import CliRunner

from moescale.checkpoint.remote import RemoteStorage
from moescale.checkpoint.store import latest_checkpoint, load_checkpoint
from moescale.cli import app
from moescale.cluster.agreement import Agreement
from moescale.cluster.launch import Launch, read_launch
from moescale.cluster.recovery import recover_from_storage
from moescale.config import ConfigError, parse_config
from moescale.parallel.ranks import run_ranks
from tests.support.command_line import TINY
from tests.support.launched import losses
from tests.support.saved import make_tensors, save


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server on this machine that speaks S3."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_DEFAULT_REGION", "us-east-1"),
                        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")):
        monkeypatch.setenv(name, value)
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/run"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder in each kind of storage."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"file://{tmp_path}/elsewhere" if request.param == "file" else f"memory://{tmp_path.name}/run"


def fetch(run_dir: Path, storage: RemoteStorage) -> tuple[str, ...]:
    return recover_from_storage(Agreement(Launch()), run_dir, storage)


def test_what_is_pushed_comes_back(tmp_path: Path, url: str) -> None:
    storage, run = RemoteStorage(url), tmp_path / "run"
    assert fetch(run, storage) == ()
    for step in (1, 2, 3):
        storage.push(save(run, step), 2, None)
    assert storage.steps() == [2, 3]
    assert fetch(run, storage) == (), "the disk has some"
    shutil.rmtree(run)
    (said,) = fetch(run, storage)
    assert said == f"step 3 was fetched from {url}"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in make_tensors().items()}
    load_checkpoint(run / "checkpoints/step_00000003", tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in make_tensors().items())


def test_what_is_not_whole_does_not_count_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    storage = RemoteStorage(f"file://{elsewhere}")
    for step in (1, 2):
        storage.push(save(run, step), 3, None)
    shutil.rmtree(run)
    (elsewhere / "step_00000002/checkpoint.json").unlink()
    assert storage.steps() == [1]
    part = elsewhere / "step_00000001/__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"step 1 in checkpoint.url=.* has other bytes"):
        fetch(run, storage)
    assert not list((run / "checkpoints").iterdir())


def test_the_course_that_a_run_has_left_is_let_go_of(tmp_path: Path, url: str) -> None:
    storage, run = RemoteStorage(url), tmp_path / "run"
    for step in (1, 4, 5, 6):
        storage.push(save(run, step), 4, None)
    storage.remove_after(run / "checkpoints/step_00000001", None)
    assert storage.steps() == [1]
    for step in (2, 3):
        storage.push(save(run, step, keep=9), 2, None)
    assert storage.steps() == [2, 3]


def test_a_push_keeps_its_own_steps_beside_later_ones_that_stayed(tmp_path: Path) -> None:
    storage, run = RemoteStorage(f"file://{tmp_path}/elsewhere"), tmp_path / "run"
    for step in (4, 5, 6):
        storage.push(save(run, step), 3, None)
    shutil.rmtree(run)
    (tmp_path / "elsewhere/step_00000004/__9_0.distcp").write_text("of other ranks")
    for step, keep, left in ((1, 1, [1, 4, 5, 6]), (2, 2, [1, 2, 4, 5, 6]), (3, 2, [2, 3, 4, 5, 6]), (4, 1, [4, 5, 6])):
        storage.push(save(run, step, keep=9), keep, None)
        assert storage.steps() == left
    assert not (tmp_path / "elsewhere/step_00000004/__9_0.distcp").exists(), "this step was written anew"


def push_where_no_list_comes(folder: Path, url: str) -> list[str]:
    """Push on ranks of which the first one cannot list the storage, and go back. Returns what each is told."""
    dist.init_process_group("gloo")
    storage, said = RemoteStorage(url), []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage._files, "ls", refuse)
        for work in (lambda: storage.push(folder, 1, None), lambda: storage.remove_after(folder, None)):
            try:
                work()
            except ConfigError as error:
                said.append(str(error))
    return said


def test_a_storage_that_cannot_be_listed_is_told_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    url = f"file://{tmp_path}/elsewhere"
    folder = save(tmp_path / "run")
    first, second = run_ranks(2, push_where_no_list_comes, folder, url, timeout_seconds=30)
    assert first == second
    pushed, removed = first
    assert pushed == f"{folder} is on the disk, but could not be copied to {url}: {url}: permission denied"
    assert removed.startswith("what is newer than step 1, to which the run goes back, could not be removed from")


def push_and_fetch(run_dir: Path, again: Path, url: str) -> list[str]:
    ranks = Agreement(read_launch())
    ranks.meet(30)
    dist.init_process_group("gloo", store=ranks.store, rank=ranks.launch.rank, world_size=ranks.launch.size)
    storage = RemoteStorage(url)
    storage.push(run_dir / "checkpoints/step_00000001", 1, None)
    with ranks.one_voice():
        return list(recover_from_storage(ranks, again, storage))


def test_ranks_share_out_the_files(tmp_path: Path) -> None:
    save(tmp_path / "run")
    url = f"file://{tmp_path}/elsewhere"
    said = run_ranks(2, push_and_fetch, tmp_path / "run", tmp_path / "again", url, timeout_seconds=30)
    assert said == [[f"step 1 was fetched from {url}"]] * 2
    load_checkpoint(tmp_path / "again/checkpoints/step_00000001", make_tensors())


def test_a_run_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/0.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "text/1.txt").write_text("the lazy dog sleeps. " * 200)
    config = {**TINY, "data": {**TINY["data"], "held_out": 0.5}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["train", "tiny.yaml", *words])
        assert result.exit_code == 0, result.output
        return result.output

    where = f"checkpoint.url=file://{tmp_path}/elsewhere"
    run("run.dir=whole", "run.steps=10")
    run("run.dir=first", "run.steps=5", where)
    assert "step 5 was fetched from" in run("run.dir=second", "run.steps=10", where)
    assert losses(tmp_path / "second")[-1][0] == 10
    assert latest_checkpoint(tmp_path / "second") is not None
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["step_00000005", "step_00000010"]
    # A storage that takes nothing is said, and training goes on to the last save, which must succeed.
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("no folder")
    result = CliRunner().invoke(app, ["train", "tiny.yaml", "run.dir=third", "run.steps=10", where])
    assert result.exit_code == 2
    assert "could not be copied to" in result.output


@pytest.mark.parametrize(("url", "words"), [
    ("nonesuch://bucket/run", "Protocol not known: nonesuch"), ("s3:/bucket", "write a URL such as s3://bucket/run"),
    ("s3://key:secret@bucket/run", "a password or key would be kept"),
])
def test_a_url_that_cannot_work_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RemoteStorage(parse_config({"checkpoint": {"url": url}}, "test").checkpoint.url or "")


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"needs a package: pip install gcsfs, or"):
        RemoteStorage("gs://bucket/run")
