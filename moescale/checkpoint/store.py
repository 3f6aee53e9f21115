"""Checkpoints through torch's distributed checkpoint: any layout writes, any layout reads.

A checkpoint is a folder `RUN/checkpoints/step_00000100`: tensors as `*.distcp`, their index `.metadata`, small texts
such as config.yaml, and `checkpoint.json`, the manifest with the size and checksum of every other file. It is written
beside its place and renamed, so that a kill at any moment leaves the last good one. Weights that are cut over ranks
must be DTensors: of plain tensors under one name only one rank's is kept.

On a network disk what one node wrote may be seen late on another. Rank 0 looks at every file where it lies, and each
rank reads back a neighbour's, before the folder is renamed and before an older checkpoint is removed.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moescale.checkpoint.index import INDEX, SafeReader, read_metadata, tensors_of
from moescale.checkpoint.readers import ATTEMPTS, trying_again
from moescale.checkpoint.tensor_files import check_sums, not_finite, read_tensors, unlike, write_tensors
from moescale.checkpoint.together import Failed, Ranks, describe, limited
from moescale.config import ConfigError, DamagedError, NotFiniteError
from moescale.files.leftovers import MARK, discard, is_ours, make_marked, remove_marked, set_aside, unmark
from moescale.files.locks import FileLock, is_locked
from moescale.files.reading import inside, read_json
from moescale.files.writing import sync, write_synced

FORMAT = 1
MANIFEST = "checkpoint.json"
NAME = re.compile(r"step_([0-9]{8,15})")
FILE = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # names in a manifest
LARGEST_STEP = 10**15
LEFTOVER = re.compile(r"step_[0-9]{8,15}(\.old)?\.partial")
UNMARKED = re.compile(r"__\d+_\d+\.distcp|\.metadata|config\.yaml|tokenizer\.json")  # what older versions left
SAVED_SECONDS = 60.0  # until a node sees on a network disk what another one has saved
MOMENT_DTYPES = {torch.float32, torch.bfloat16}  # each is read as the other: who goes on was asked about that
T = TypeVar("T")


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], files: Mapping[str, str | bytes], *,
    keep: int, group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint and remove all but the last `keep`; every rank calls.

    state: small values for the manifest. files: small ones by name. group: of all ranks, through which they speak,
    whose time-out is that of the save; None = the default one. Returns its folder.
    Raises ConfigError on every rank when it could not be written on any, and NotFiniteError when a tensor holds what is
    no finite number; what existed before stays.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    ranks = Ranks(group)
    with limited(f"saving step {step}"):
        spoilt = not_finite(tensors, ranks)
    if spoilt is not None:
        good = latest_checkpoint(run_dir)
        raise NotFiniteError(f"step {step}: {spoilt} holds values that are no finite numbers, and nothing was saved; "
                             "try a lower optim.lr or a longer optim.warmup_steps; the last good checkpoint is "
                             f"{good or 'none'}", step, spoilt)
    partial = folder.with_suffix(".partial")
    try:
        with limited(f"saving step {step}"):
            ranks.on_first(lambda: _make_room(partial, files))
            ranks.together(lambda: write_tensors(partial, tensors, ranks))
            found = ranks.together(lambda: check_sums(partial, f"__{ranks.rank}_*"))
            listing = {name: sums for part in ranks.gather(found) for name, sums in part.items()}
            ranks.together(lambda: _check_written(partial, listing, ranks))
            ranks.on_first(lambda: _finish(partial, folder, {"step": step, **state}, listing))
    except Failed as error:
        if ranks.rank == 0:
            discard(partial)
        good = latest_checkpoint(run_dir)
        raise ConfigError(f"no checkpoint of step {step} could be written to {folder.parent}: {error}; "
                          f"the last good one is {good.name if good else 'none'}") from None
    if ranks.rank == 0:
        _remove_old(folder.parent, keep)
    return folder


def load_checkpoint(
    folder: Path, tensors: dict[str, Tensor], *, prefix: str = "", group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Fill the tensors, plain or cut in any layout, in place; every rank calls.

    prefix: only names that begin with it are expected. group: as in `save_checkpoint`. Returns the state, with `step`.
    Raises ConfigError for a folder that is damaged, for a checkpoint of another model, and for values that are no
    finite numbers.
    """
    ranks = Ranks(group)
    try:
        with limited(f"loading {folder}"):
            manifest = ranks.together(lambda: _read_manifest(folder))
            files = manifest["files"]
            share = sorted(files)[ranks.rank :: ranks.size]
            ranks.together(lambda: _verify(folder, {name: files[name] for name in share}))
            names = {name for part in ranks.gather(list(tensors)) for name in part}  # a pipeline's ranks hold others
            index = ranks.together(lambda: read_metadata(folder))
            ranks.together(lambda: _compare(folder, tensors_of(index, folder, files), tensors, names, prefix))
            ranks.together(lambda: read_tensors(SafeReader(folder, index), tensors, ranks))
            spoilt = not_finite(tensors, ranks)
            if spoilt is not None:
                raise Failed(f"{folder}: {spoilt} holds values that are no finite numbers; "
                              f"{_advice(folder, _last_finite(folder, tensors, ranks))}")
    except Failed as error:
        raise ConfigError(str(error)) from None
    return dict(manifest["state"])


def begin_assembly(run_dir: Path, step: int) -> Path:
    """Make the folder that files of a checkpoint are brought to from elsewhere; one rank calls. Raises OSError."""
    partial = run_dir / "checkpoints" / f"step_{step:08d}.partial"
    _make_room(partial, {})
    return partial


def finish_assembly(partial: Path, state: dict[str, Any], listing: dict[str, list[int]]) -> Path:
    """Make a checkpoint of the files that were brought; the same rank calls. Returns its folder.

    state: as in `save_checkpoint`, with `step`. listing: size and checksum of each file.
    Raises ConfigError and OSError.
    """
    deadline = time.monotonic() + SAVED_SECONDS
    for name, (size, _) in listing.items():
        while (problem := unlike(partial / name, size, None)) is not None:
            if time.monotonic() > deadline:
                raise ConfigError(f"{name} {problem} in {partial} after {SAVED_SECONDS:g} s")
            time.sleep(0.2)
    folder = partial.with_suffix("")
    _finish(partial, folder, state, dict(listing))
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """Read the small values alone. Raises ConfigError."""
    return dict(_read_manifest(folder)["state"])


def read_files(folder: Path) -> dict[str, list[int]]:
    """Read the size and the checksum of each file that makes a checkpoint. Raises ConfigError."""
    return dict(_read_manifest(folder)["files"])


def read_stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Say what is stored of each tensor, by its name. Raises ConfigError."""
    return tensors_of(read_metadata(folder), folder, _read_manifest(folder)["files"])


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Hold every file to its size and checksum, and return the manifest. Raises ConfigError."""
    manifest = _read_manifest(folder)
    _verify(folder, manifest["files"])
    return manifest


def find_damage(folder: Path, rank: int, num_ranks: int) -> str | None:
    """Say what of a checkpoint is damaged, in the share of the files that this rank looks at.

    Those that as many ranks wrote are those that they read, so that they are read from the disk once.
    """
    try:
        files = _read_manifest(folder)["files"]
        return _damage(folder, {name: sums for name, sums in files.items() if _writer(name) % num_ranks == rank})
    except DamagedError:
        return f"its {MANIFEST} cannot be read"
    except OSError as error:
        return describe(error)


def _writer(name: str) -> int:
    """Read off the name of a file which rank wrote it; rank 0, if it does not say so."""
    found = re.match(r"__(\d+)_", name)
    return 0 if found is None else int(found[1])


def newest_first(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, whole or damaged, the last one first."""
    return sorted(_all(run_dir / "checkpoints"), key=_step, reverse=True)


def put_aside(folder: Path) -> str:
    """Give a damaged checkpoint a name by which no run goes on from it. Returns in words where it lies then."""
    aside = folder.with_suffix(".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_suffix(f".damaged{number}")
    try:
        folder.rename(aside)
    except OSError as error:
        return f"it cannot be renamed: {describe(error)}"
    return f"it is kept as {aside.name}"


def write_manifest(folder: Path, state: dict[str, Any]) -> None:
    """List what lies in a folder, which makes it a checkpoint. state: small values, with `step` and `seed`"""
    listing = {name: sums for name, sums in check_sums(folder, "*").items() if name != MANIFEST}
    stored = tensors_of(read_metadata(folder), folder, listing)
    state["optimizer"] = any(name.startswith("optim.") for name in stored)
    write_synced(folder / MANIFEST, json.dumps({"format": FORMAT, "state": state, "files": listing}, indent=1))


def missing_file(folder: Path) -> str | None:
    """Find the first file that a checkpoint's manifest lists and that is not there in its size. Raises ConfigError."""
    for name, (size, _) in _read_manifest(folder)["files"].items():
        if unlike(folder / name, size, None) is not None:
            return str(name)
    return None


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Find the whole checkpoint of the highest step, of a run that may be saving and removing others."""
    parent = run_dir / "checkpoints"
    for _ in range(ATTEMPTS):
        before = _names(parent)
        found = max(_all(parent), key=_step, default=None)
        if found is not None or _names(parent) == before:
            return found
    return None


def up_to(run_dir: Path, step: int, every: int) -> list[Path]:
    """List the checkpoints up to this step that every so many steps ask for, whole or damaged, the last one first."""
    return [folder for folder in newest_first(run_dir) if _step(folder) <= step and _step(folder) % every == 0]


def remove_after(checkpoint: Path) -> None:
    """Remove the checkpoints of later steps than this one, from which a run takes another course. Raises OSError."""
    for folder in newest_first(checkpoint.parent.parent):  # a kill in the middle leaves an older one as the last
        if _step(folder) > _step(checkpoint):
            _remove(folder)


def _names(parent: Path) -> set[str]:
    return {folder.name for folder in parent.iterdir()} if parent.is_dir() else set()


def last_checkpoint(path: Path) -> Path:
    """Find the checkpoint that is meant by a checkpoint's folder or a run directory. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"no such checkpoint: {path}")
    found = path if (path / MANIFEST).exists() else latest_checkpoint(path)
    if found is None:
        raise ConfigError(f"{path} holds no checkpoint: give a run directory or RUN/checkpoints/step_...")
    return found


def read_last(path: Path, read: Callable[[Path], T]) -> T:
    """Read a checkpoint, or the last whole one of a run, which may be removing old ones meanwhile. Raises ConfigError.

    read: is given the checkpoint's folder, which is held as long as it reads.
    """
    def held(folder: Path) -> T:
        with FileLock(folder, shared=True):
            return read(folder)

    try:
        return trying_again(lambda: last_checkpoint(path), lambda folder: (folder / MANIFEST).exists(), held)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {describe(error)}") from None


def _all(parent: Path) -> list[Path]:
    found = parent.iterdir() if parent.is_dir() else iter(())
    return [folder for folder in found if NAME.fullmatch(folder.name) and (folder / MANIFEST).exists()]


def step_of(name: str) -> int:
    """Read the step in a checkpoint's name."""
    return int(name.removeprefix("step_"))


def _step(folder: Path) -> int:
    return step_of(folder.name)


def _make_room(partial: Path, files: Mapping[str, str | bytes]) -> None:
    """Clear away what killed runs left, and nothing else, and begin."""
    for left in partial.parent.glob("*.partial"):
        if LEFTOVER.fullmatch(left.name) and is_ours(left, UNMARKED):
            remove_marked(left)
    if partial.exists() or partial.is_symlink():
        raise ConfigError(f"{partial} is in the way, and no run left it: move it away")
    make_marked(partial)
    for name, content in files.items():
        write_synced(partial / name, content)


def _check_written(partial: Path, listing: dict[str, list[int]], ranks: Ranks) -> None:
    """See that what the ranks wrote lies there: rank 0 for all sizes, each rank for a neighbour's bytes."""
    neighbour = f"__{(ranks.rank - 1) % ranks.size}_"
    read = {name for name in listing if ranks.size > 1 and name.startswith(neighbour)}
    deadline = time.monotonic() + SAVED_SECONDS
    for name in sorted(listing if ranks.rank == 0 else read):
        size, crc = listing[name]
        while (problem := unlike(partial / name, size, crc if name in read else None)) is not None:
            if time.monotonic() > deadline:
                writer = name.removeprefix("__").partition("_")[0]
                raise ConfigError(f"{name}, which rank {writer} wrote, {problem} where rank {ranks.rank} looks, after "
                                  f"{SAVED_SECONDS:g} s: run.dir must lie where every node sees it")
            time.sleep(0.2)


def _finish(partial: Path, folder: Path, state: dict[str, Any], listing: dict[str, list[int]]) -> None:
    """Write the manifest and move the folder into place."""
    for path in partial.iterdir():
        if path.name not in listing and path.name != MARK:
            listing.update(check_sums(partial, path.name))
    write_synced(partial / MANIFEST, json.dumps({"format": FORMAT, "state": state, "files": listing}, indent=1))
    sync(partial)
    tensors_of(read_metadata(partial), partial, listing)  # what a later torch writes and loading refuses shows now
    replaced = folder.with_suffix(".old.partial")
    if folder.exists():  # of the same step: one that is not whole, or the run would have gone on from it
        set_aside(folder, replaced)
    partial.rename(folder)
    unmark(folder)
    sync(folder.parent)
    discard(replaced)


def _remove_old(parent: Path, keep: int) -> None:
    try:
        for folder in sorted(_all(parent), key=_step)[:-keep]:
            if is_locked(folder, unknown=False):  # somebody reads it
                continue  # it goes after a later save
            _remove(folder)
    except OSError as error:  # no reason to end the run: the new checkpoint is in its place
        warnings.warn(f"an old checkpoint could not be removed: {describe(error)}", stacklevel=2)


def _remove(folder: Path) -> None:
    aside = folder.with_suffix(".partial")  # a kill in the middle leaves nothing that looks whole
    set_aside(folder, aside)
    remove_marked(aside)


def _verify(folder: Path, expected: dict[str, list[int]]) -> None:
    problem = _damage(folder, expected)
    if problem is not None:
        raise DamagedError(f"{folder} is damaged: {problem}; {_advice(folder, next(iter(_older(folder)), None))}")


def _damage(folder: Path, expected: dict[str, list[int]]) -> str | None:
    """Find a file that is not as its writer says. Raises ConfigError for one that lies elsewhere."""
    for name, (size, crc) in expected.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        inside(folder, name)
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if check_sums(folder, name)[name][1] != crc:
            return f"{name} was altered"
    return None


def _older(folder: Path) -> list[Path]:
    """List the whole checkpoints of earlier steps, the last one first."""
    earlier = [other for other in _all(folder.parent) if NAME.fullmatch(folder.name) and _step(other) < _step(folder)]
    return sorted(earlier, key=_step, reverse=True)


def _advice(folder: Path, good: Path | None) -> str:
    """Say how to do without a checkpoint. good: the one before it to go on from"""
    between = [str(other) for other in _older(folder) if good is None or _step(other) > _step(good)]
    remove = " ".join([str(folder), *between]) if NAME.fullmatch(folder.name) else str(folder)
    return f"remove {remove} to " + (f"go on from {good.name}" if good else "start anew")


def _last_finite(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> Path | None:
    """Read earlier checkpoints over the tensors, the last one first, until one holds finite numbers alone."""

    def read(name: str) -> None:
        older = folder.with_name(name)
        read_tensors(SafeReader(older, read_metadata(older)), tensors, ranks)

    for name in ranks.gather([older.name for older in _older(folder)])[0]:  # those that the first rank sees
        try:
            ranks.together(partial(read, name))
        except Failed:
            continue
        if not_finite(tensors, ranks) is None:
            return folder.with_name(name)
    return None


def _compare(
    folder: Path, index: dict[str, TensorStorageMetadata], tensors: dict[str, Tensor], names: set[str], prefix: str
) -> None:
    """Refuse another model's tensors by the first name that differs. names: of all ranks' tensors"""
    there = {name: entry for name, entry in index.items() if name.startswith(prefix)}
    for name in sorted(there.keys() | names):
        problem = "is not in this model" if name not in names else _difference(
            name, there.get(name), tensors.get(name))
        if problem is not None:
            raise ConfigError(f"{folder} is a checkpoint of another model: {name} {problem}; "
                              "write another run.dir, or the configuration that it was written with")


def _difference(name: str, entry: TensorStorageMetadata | None, tensor: Tensor | None) -> str | None:
    """Say how a stored tensor differs from this rank's, if it does. tensor: None on a rank that has no part of it"""
    if entry is None:
        return "is not in it"
    if tensor is None:
        return None
    if entry.size != tensor.shape:
        return f"has shape {list(entry.size)} there and {list(tensor.shape)} here"
    dtypes = {entry.properties.dtype, tensor.dtype}
    if len(dtypes) > 1 and not (name.startswith("optim.") and dtypes <= MOMENT_DTYPES):
        return f"has dtype {entry.properties.dtype} there and {tensor.dtype} here"
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST)
        version = manifest["format"]
        if version != FORMAT:
            raise ConfigError(f"{folder} has format {version}; this MoEScale reads format {FORMAT}")
        step, named = manifest["state"]["step"], NAME.fullmatch(folder.name)
        if type(step) is not int or not 0 <= step < LARGEST_STEP or INDEX not in manifest["files"]:
            raise ValueError
        for name, (size, crc) in manifest["files"].items():
            if not FILE.fullmatch(name) or type(size) is not int or type(crc) is not int:
                raise ValueError
        if named is not None and int(named[1]) != step:
            raise ConfigError(f"{folder} holds step {step:,}, so it was renamed: name it step_{step:08d}")
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{folder} is damaged: its {MANIFEST} cannot be read; "
                           f"{_advice(folder, next(iter(_older(folder)), None))}") from None
    return dict(manifest)
