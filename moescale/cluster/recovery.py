"""A run that is started again finds what the disk lacks: in the memory of hosts, or in a storage elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moescale.checkpoint.memory import MemoryPlace, bring, held
from moescale.checkpoint.remote import RemoteStorage
from moescale.checkpoint.store import (
    MANIFEST,
    begin_assembly,
    finish_assembly,
    latest_checkpoint,
    read_files,
    read_state,
)
from moescale.checkpoint.together import describe
from moescale.cluster.agreement import Agreement
from moescale.config import ConfigError
from moescale.files.leftovers import discard
from moescale.files.writing import replace_text

T = TypeVar("T")
TOKEN = ".memory-copies"  # in the run directory: which copies are this run's, and not an earlier one's of its name


def open_memory(ranks: Agreement, run_dir: Path, memory_dir: str) -> MemoryPlace:
    """Make the folder for this host's copies, and choose whose copies go where; all ranks call.

    Each rank sends its part to one on the next host, in a ring. Raises ConfigError.
    """
    launch = ranks.launch
    token = ranks.on_first(lambda: _read_token(run_dir) or _new_token(run_dir))
    nodes = ranks.settle([launch.host, launch.node], lambda said: [tuple(each) for each in said])
    shared = len({node for host, node in map(tuple, nodes) if host == launch.host}) > 1
    folder = _home(run_dir, memory_dir, token) / (f"{launch.host}-{launch.node}" if shared else launch.host)
    first = launch.local_rank == 0
    ranks.together(lambda: _make(folder) if first else None)
    return MemoryPlace(folder, partners([str(node) for node in nodes]), first)


def try_memory(ranks: Agreement, run_dir: Path, memory_dir: str) -> None:
    """See whether `open_memory` can make its folders, and leave nothing behind; all ranks call. Raises ConfigError."""
    token = str(ranks.on_first(lambda: _read_token(run_dir) or secrets.token_hex(8)))
    folder = _home(run_dir, memory_dir, token) / f".probe-{secrets.token_hex(6)}"
    first, there = ranks.launch.local_rank == 0, folder.parent.exists()
    try:
        ranks.together(lambda: _make(folder) if first else None)
    finally:
        if first:
            for made in [folder] if there else [folder, folder.parent]:
                with suppress(OSError):  # another node of this machine still has its own there
                    made.rmdir()


def taken_by_copies(run_dir: Path, memory_dir: str) -> int:
    """Add up the bytes of this run's copies on this machine."""
    token = _read_token(run_dir)
    if token is None:
        return 0
    total = 0
    for file in _home(run_dir, memory_dir, token).rglob("*"):
        with suppress(OSError):  # another rank may be making room
            total += file.stat().st_size if file.is_file() else 0
    return total


def partners(nodes: Sequence[str]) -> list[int | None]:
    """Choose for each rank one on the next host, in a ring; None where there is one host alone. nodes: of each rank"""
    ring = list(dict.fromkeys(nodes))
    if len(ring) == 1:
        return [None] * len(nodes)
    ranks = {node: [rank for rank, other in enumerate(nodes) if other == node] for node in ring}
    chosen: list[int | None] = []
    for rank, node in enumerate(nodes):
        others = ranks[ring[(ring.index(node) + 1) % len(ring)]]
        chosen.append(others[ranks[node].index(rank) % len(others)])
    return chosen


def recover_from_memory(ranks: Agreement, run_dir: Path, memory_dir: str) -> tuple[str, ...]:
    """Write the newest step to the disk that hosts hold all files of between them, if it is newer; all ranks call.

    Returns lines to print. What cannot be used is said there, and the run goes on from the disk.
    """
    token = ranks.on_first(lambda: _read_token(run_dir))
    if token is None:
        return ()
    home = _home(run_dir, memory_dir, token)
    mine = held(home) if ranks.launch.local_rank == 0 else []
    choice = ranks.settle(mine, lambda said: _choose(said, _step(latest_checkpoint(run_dir))))
    if choice is None:
        return ()
    step, copy, holders = choice["step"], choice["copy"], choice["holders"]
    problem = _assemble(ranks, run_dir, step, lambda _: (copy["state"], copy["files"]), lambda names: holders,
                        partial(bring, home, step))
    if problem is not None:
        return (f"step {step}, which the memory of hosts holds, cannot be used: {problem}",)
    return (f"step {step} was brought back from the memory of "
            f"{', '.join(sorted({ranks.hosts[rank] for rank in holders.values()}))}",)


def recover_from_storage(ranks: Agreement, run_dir: Path, storage: RemoteStorage) -> tuple[str, ...]:
    """Fetch the newest checkpoint from a storage, where the run directory holds none; all ranks call.

    Returns lines to print. Raises ConfigError where there is one that cannot be fetched.
    """
    def newest() -> int | None:
        return None if latest_checkpoint(run_dir) is not None else max(storage.steps(), default=None)

    step = ranks.on_first(newest)
    if step is None:
        return ()

    def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
        storage.fetch(step, MANIFEST, folder / MANIFEST)
        found = read_state(folder), read_files(folder)
        (folder / MANIFEST).unlink()  # it is written anew when all files are there
        return found

    problem = _assemble(ranks, run_dir, step, read, lambda names: {
        name: index % ranks.launch.size for index, name in enumerate(sorted(names))}, partial(storage.fetch, step))
    if problem is not None:
        raise ConfigError(f"step {step} in checkpoint.url={storage.url} cannot be fetched: {problem}; write "
                          "checkpoint.url=null to start anew")
    return (f"step {step} was fetched from {storage.url}",)


def _assemble(
    ranks: Agreement, run_dir: Path, step: int,
    read: Callable[[Path], tuple[dict[str, Any], dict[str, list[int]]]],
    share: Callable[[Collection[str]], Mapping[str, int]],
    fetch: Callable[[str, Path, Sequence[int]], None],
) -> str | None:
    """Put a checkpoint together in the run directory from files that lie elsewhere; return why it failed, if it did.

    read: gives rank 0 the state, and the files with sizes and checksums. share: chooses for each file the rank that
    brings it. fetch: brings a file by its name to a place on the disk.
    """
    def begin() -> Any:
        return read(begin_assembly(run_dir, step))

    folder = run_dir / "checkpoints" / f"step_{step:08d}.partial"
    try:
        state, files = ranks.on_first(lambda: _told(begin))
        of_rank = share(files)

        def bring_mine() -> None:
            for name, sums in files.items():
                if of_rank[name] == ranks.launch.rank:
                    fetch(name, folder / name, sums)

        ranks.together(lambda: _told(bring_mine))
        ranks.on_first(lambda: _told(lambda: str(finish_assembly(folder, state, files))))
    except ConfigError as error:
        if ranks.launch.rank == 0:
            discard(folder)
        return str(error)
    return None


def _choose(said: Sequence[Sequence[Mapping[str, Any]]], on_disk: int) -> dict[str, Any] | None:
    """Choose the newest step of which every file is held, and for each file the rank that brings it.

    A copy that was made after a checkpoint that the disk no longer has is of a course that somebody gave up.
    """
    copies: dict[str, dict[str, int]] = {}  # copy.json -> file -> rank
    for rank, found in enumerate(said):
        for each in found:
            holders = copies.setdefault(json.dumps(each["copy"], sort_keys=True), {})
            for name in each["present"]:
                holders.setdefault(name, rank)
    best: dict[str, Any] | None = None
    for text, holders in copies.items():
        copy = json.loads(text)
        step = copy["state"]["step"]
        whole = holders.keys() >= copy["files"].keys()
        if whole and step > max(on_disk, best["step"] if best else -1) and _step_named(copy["after"]) <= on_disk:
            best = {"step": step, "copy": copy, "holders": holders}
    return best


def _told(work: Callable[[], T]) -> T:
    """Turn what a disk says into a line for all ranks."""
    try:
        return work()
    except OSError as error:
        raise ConfigError(describe(error)) from None


def _step(folder: Path | None) -> int:
    return -1 if folder is None else _step_named(folder.name)


def _step_named(name: str) -> int:
    return int(name.removeprefix("step_")) if name else -1


def _home(run_dir: Path, memory_dir: str, token: str) -> Path:
    """Name the folder of this run's copies on this machine."""
    run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    return Path(memory_dir).expanduser() / f"moescale-{os.getuid()}-{run}-{token}"


def _make(folder: Path) -> None:
    """Make the folder of a host, which nobody else may read. Raises ConfigError."""
    home = folder.parent
    try:
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
        if home.is_symlink() or home.stat().st_uid != os.getuid():
            raise ConfigError(f"{home} is another user's: write another checkpoint.memory_dir")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"checkpoint.memory_dir={home.parent} cannot be used: {describe(error)}; write a folder on "
                          "a file system in memory, or checkpoint.in_memory=null") from None


def _read_token(run_dir: Path) -> str | None:
    try:
        token = (run_dir / TOKEN).read_text()
    except (OSError, ValueError):
        return None
    return token if re.fullmatch("[0-9a-f]{16}", token) else None


def _new_token(run_dir: Path) -> str:
    token = secrets.token_hex(8)
    try:
        replace_text(run_dir / TOKEN, token)
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir} cannot be written: {describe(error)}") from None
    return token
