"""The run directory, which every rank must see, and the checkpoint in it that all of them go on from."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from moescale.checkpoint.store import MANIFEST, find_damage, missing_file, newest_first, put_aside
from moescale.cluster.agreement import Agreement, ranks_text
from moescale.config import ConfigError
from moescale.files.locks import FileLock

SHARED_SECONDS = 30.0  # until a node sees on a network disk, when a run starts, what another one wrote
CLAIM_SECONDS = 10.0  # ranks of a run that was killed may be about to end


@contextmanager
def shared_directory(ranks: Agreement, name: str) -> Iterator[Path]:
    """Make and hold the run directory, as rank 0, and see to it that every rank sees it; nothing empty is left behind.

    Raises ConfigError, with the hosts that see another one.
    """
    path = Path(name).expanduser()
    first = ranks.launch.rank == 0
    made = [folder for folder in (path, *path.parents) if not folder.exists()] if first else []
    claim: FileLock | None = None
    try:
        if first:
            claim = ranks.together(lambda: _claim(path, name))
        else:
            ranks.together(lambda: None)
        if ranks.launch.size > 1:
            _probe(ranks, path, name)
        yield path
    finally:
        if claim is not None:
            claim.close()
        with suppress(OSError):  # not empty: a run's
            for folder in made:
                folder.rmdir()


def _claim(path: Path, name: str) -> FileLock:
    """Make the directory and lock it, so that no two runs write into it; a process that ends lets go."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + CLAIM_SECONDS
        while not (claim := FileLock(path)).taken:
            if time.monotonic() > deadline:
                raise ConfigError(f"run.dir={path} is in use by another run: wait for it, or write another run.dir")
            time.sleep(0.2)
        return claim
    except OSError as error:
        raise ConfigError(f"run.dir={name} cannot be made: {error.strerror}: write another") from None


def _probe(ranks: Agreement, path: Path, name: str) -> None:
    """Write a file that all ranks must see, and see one that each node writes."""
    rank = ranks.launch.rank
    probe = path / str(ranks.on_first(lambda: _write(path / f".probe-{secrets.token_hex(6)}", name)))
    answers = ranks.launch.local_rank == 0
    answer = probe.with_name(f"{probe.name}.{rank}")
    try:
        seen = _wait(probe.exists)
        problem = None
        if seen and answers:
            try:
                _write(answer, name)
            except ConfigError as error:
                problem = str(error)
        ranks.settle([seen, problem], lambda said: _refuse_unseen(said, ranks.hosts, name))
        answering = ranks.settle(answers, lambda said: [rank for rank, answer in enumerate(said) if answer])
        ranks.on_first(lambda: _refuse_unanswered(probe, answering, ranks.hosts, name))
    finally:
        for file in ([answer, probe] if rank == 0 else [answer]):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _write(file: Path, name: str) -> str:
    try:
        file.write_text("")
    except OSError as error:
        raise ConfigError(f"run.dir={name} cannot be written: {error.strerror}") from None
    return file.name


def _refuse_unseen(said: Sequence[tuple[bool, str | None]], hosts: Sequence[str], name: str) -> None:
    blind = [rank for rank, (seen, _) in enumerate(said) if not seen]
    if blind:
        places = ", ".join(sorted({hosts[rank] for rank in blind}))
        raise ConfigError(f"run.dir={name}: {ranks_text(blind)} ({places}) did not see within {SHARED_SECONDS:g} s "
                          f"what rank 0 ({hosts[0]}) wrote there: write the absolute path of a directory that all "
                          "nodes share")
    for rank, (_, problem) in enumerate(said):
        if problem is not None:
            raise ConfigError(f"rank {rank} on {hosts[rank]}: {problem}")


def _refuse_unanswered(probe: Path, answering: Sequence[int], hosts: Sequence[str], name: str) -> None:
    for rank in answering:
        if not _wait(probe.with_name(f"{probe.name}.{rank}").exists):
            raise ConfigError(f"run.dir={name}: rank 0 ({hosts[0]}) did not see within {SHARED_SECONDS:g} s what rank "
                              f"{rank} ({hosts[rank]}) wrote there: write a directory that all nodes share")


def choose_checkpoint(
    ranks: Agreement, run_dir: Path, *, rename: bool = True
) -> tuple[Path | None, tuple[str, ...]]:
    """Let rank 0 choose the checkpoint to go on from, and see to it that every rank sees that very one, undamaged.

    Instead of a damaged one the one before it is taken. rename: damaged ones, so that no run looks at them again.
    Returns the folder, None to start anew, and lines that say what was damaged.
    Raises ConfigError where none is whole, and with the hosts that lack it and what they lack.
    """
    damage: dict[str, str] = {}  # by the name of the folder
    while (choice := ranks.on_first(lambda: _describe(_newest(run_dir, damage)))) is not None:
        name, manifest, whole = choice
        folder = run_dir / "checkpoints" / str(name)
        problem = _problem_of(ranks, folder, manifest, whole)
        if problem is None:
            notes = ranks.on_first(partial(_settle_damage, run_dir, damage, folder.name, rename))
            return folder, tuple(notes)
        damage[folder.name] = problem
    if damage:
        said = ", ".join(f"{name} ({problem})" for name, problem in damage.items())
        raise ConfigError(f"all checkpoints in {run_dir}/checkpoints are damaged: {said}: remove them to start anew, "
                          "or write another run.dir")
    return None, ()


def _problem_of(ranks: Agreement, folder: Path, manifest: str, whole: bool) -> str | None:
    """Let all ranks look at a checkpoint, each at a share of its files. Returns what is damaged.

    whole: whether every file has its size where rank 0 looks. Raises ConfigError with the hosts that see less.
    """
    if whole:
        lacking = _wait_for_nothing(lambda: _lacking(folder, manifest))
        ranks.settle(lacking, lambda said: _refuse_lacking(said, ranks.hosts, folder))
    found = ranks.together(lambda: find_damage(folder, ranks.launch.rank, ranks.launch.size))
    return ranks.settle(found, lambda said: next((problem for problem in said if problem is not None), None))


def _newest(run_dir: Path, without: Collection[str]) -> Path | None:
    return next((folder for folder in newest_first(run_dir) if folder.name not in without), None)


def _settle_damage(run_dir: Path, damage: Mapping[str, str], chosen: str, rename: bool) -> list[str]:
    """Rename damaged checkpoints, so that they count no longer among those that are kept. Returns what to say."""
    notes = []
    for name, problem in damage.items():
        left = put_aside(run_dir / "checkpoints" / name) if rename else f"a run keeps it as {name}.damaged"
        notes.append(f"{name} is damaged: {problem}; {left}, and the run goes on from {chosen}")
    return notes


def _describe(folder: Path | None) -> tuple[str, str, bool] | None:
    if folder is None:
        return None
    try:
        manifest = _hash(folder / MANIFEST)
    except OSError:
        manifest = ""
    return folder.name, manifest, _lacking(folder, manifest) is None


def _lacking(folder: Path, manifest: str) -> str | None:
    """Say what of a checkpoint is missing here, or differs from what rank 0 sees. -> None when it is whole"""
    try:
        if _hash(folder / MANIFEST) != manifest:
            return f"another {MANIFEST} in"
        name = missing_file(folder)
        return None if name is None else f"no whole {name} in"
    except (OSError, ConfigError):
        return f"no {MANIFEST} in"


def _refuse_lacking(said: Sequence[str | None], hosts: Sequence[str], folder: Path) -> None:
    blind = [rank for rank, lacking in enumerate(said) if lacking is not None]
    if blind:
        places = ", ".join(sorted({hosts[rank] for rank in blind}))
        raise ConfigError(f"{ranks_text(blind)} ({places}) saw {said[blind[0]]} {folder} within {SHARED_SECONDS:g} s, "
                          f"from which rank 0 ({hosts[0]}) goes on: wait until the disk shows it there, or write "
                          "a run.dir that all nodes share")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _wait(there: Callable[[], bool]) -> bool:
    return _wait_for_nothing(lambda: None if there() else "missing") is None


def _wait_for_nothing(missing: Callable[[], str | None]) -> str | None:
    """Look repeatedly until nothing is missing, for a limited time. -> what is still missing"""
    deadline = time.monotonic() + SHARED_SECONDS
    while (lacking := missing()) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    return lacking
