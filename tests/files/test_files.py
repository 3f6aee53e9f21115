"""Files and folders are whole or absent, and nothing of somebody else's is taken for what a killed writer left."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from moescale.files.locks import FileLock, is_locked, lock
from moescale.files.publish import temporary_beside
from moescale.files.writing import replace_text, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    replace_text(place, "first")

    def fail() -> None:
        with replacing(place) as file:
            file.write(b"sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert place.read_text() == "first"
    assert names(tmp_path) == ["state.json"]


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    left, at_work = temporary_beside(place), temporary_beside(place)
    others = [tmp_path / "state.json.old.tmp", tmp_path / "state.json.copy-7.tmp"]
    for path in (left, at_work, *others):
        path.touch()
    with FileLock(at_work):
        replace_text(place, "now")
        assert names(tmp_path) == sorted(path.name for path in (place, at_work, *others))
    replace_text(place, "then")
    assert names(tmp_path) == sorted(path.name for path in (place, *others))


def _hold(path: Path, ready: Event, done: Event) -> None:
    with lock(path):
        ready.set()
        done.wait(20)


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    path, context = tmp_path / "building", multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, ready, done))
    process.start()
    assert ready.wait(20)
    assert is_locked(path, unknown=False)
    with FileLock(path) as attempt:
        assert not attempt.taken
    process.kill()
    process.join(20)
    assert not is_locked(path, unknown=True)
    with FileLock(path, shared=True) as first, FileLock(path, shared=True) as second:
        assert first.taken
        assert second.taken
        assert is_locked(path, unknown=False)
    assert not is_locked(tmp_path / "absent", unknown=True)
