"""The index of a distributed checkpoint, read without running code.

Torch's own reader unpickles the index, whatever it holds, and may build any object on the way. Here it is read into
plain values, and torch's index is made anew of these: of what a tensor's parts are and of where they lie, and of
nothing else that the file may hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from moescale.checkpoint.archive import DTYPES, read_archive, shape_of
from moescale.checkpoint.plain_pickle import MOST_BYTES, Name, PlainPickleError, Record, read_plain
from moescale.checkpoint.strided_view import Stored, box, read_region
from moescale.config import ConfigError
from moescale.files.reading import inside, read_bytes

INDEX = ".metadata"
MOST_ATTRIBUTES = 100  # of an object: torch's have up to six


def read_metadata(folder: Path) -> Metadata:
    """Read the index of a distributed checkpoint, whoever wrote it. Raises ConfigError.

    Objects of classes that torch does not know, such as the plans of other systems, are left out.
    """
    try:
        return _metadata(read_plain(read_bytes(folder / INDEX, MOST_BYTES), tree=False))
    except PlainPickleError as error:
        raise ConfigError(f"{folder} is damaged: its index {INDEX} cannot be read, it {error}") from None
    except OSError as error:
        raise ConfigError(f"{folder} is damaged: its index {INDEX} cannot be read "
                          f"({(error.strerror or str(error)).lower()})") from None


def _metadata(found: Any) -> Metadata:
    """Make torch's index anew. Parts that several tensors share are made for each, as many as have a place."""
    values = _attributes(found, "Metadata", "MCoreMetadata")
    stored, parts = _dict(values.get("storage_data")), 0
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in _dict(values.get("state_dict_metadata")).items():
        if not isinstance(name, str):
            raise PlainPickleError("names a tensor by what is no text")
        entries[name] = _entry(entry, len(stored) - parts)
        parts += len(getattr(entries[name], "chunks", ()))
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, value in stored.items():
        index = _attributes(key, "MetadataIndex")
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            raise PlainPickleError("names a tensor by what is no text")
        places[MetadataIndex(name, None if offset is None else shape_of(offset))] = _storage_info(value)
    return Metadata(entries, storage_data=places)


def _attributes(value: Any, *names: str) -> dict[str, Any]:
    """Take the attributes of an object of torch's class `names[0]`, or of a class of others that extends it."""
    if not isinstance(value, Record) or value.name.rpartition(".")[2] not in names:
        shown = value.name if isinstance(value, Record) else type(value).__name__
        raise PlainPickleError(f"has {shown:.80} in the place of torch's {names[0]}")
    if isinstance(value.state, dict) and len(value.state) > MOST_ATTRIBUTES:
        raise PlainPickleError(f"gives torch's {names[0]} more than {MOST_ATTRIBUTES} attributes")
    return value.attributes()


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise PlainPickleError("has no list of tensors")
    return value


def _entry(value: Any, most_parts: int) -> TensorStorageMetadata | BytesStorageMetadata:
    """Describe what is stored under one name: a tensor, or something else, which nobody reads."""
    if not isinstance(value, Record) or not value.name.endswith(".TensorStorageMetadata"):
        return BytesStorageMetadata()
    found = _attributes(value, "TensorStorageMetadata")
    state = _attributes(found.get("properties"), "TensorProperties") or found["properties"].state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Name) or dtype.name not in DTYPES:
        raise PlainPickleError("holds a tensor of a dtype that torch does not know")
    chunks = found.get("chunks")
    if not isinstance(chunks, list):
        raise PlainPickleError("holds a tensor without parts")
    if len(chunks) > most_parts:
        raise PlainPickleError("lists more parts of tensors than it says where they lie")
    size = torch.Size(shape_of(found.get("size")))
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype.name]), size, [_chunk(chunk) for chunk in chunks])


def _chunk(value: Any) -> ChunkStorageMetadata:
    found = _attributes(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(torch.Size(shape_of(found.get("offsets"))), torch.Size(shape_of(found.get("sizes"))))


def _storage_info(value: Any) -> _StorageInfo:
    found = _attributes(value, "_StorageInfo")
    path, offset, length = (found.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(path, str) or len(path) > 1000 or found.get("transform_descriptors"):
        raise PlainPickleError("holds a part that is not stored as it is")
    for number in (offset, length):  # bytes, each as large as a file
        shape_of((number,))
    return _StorageInfo(path, offset, length)  # type: ignore[arg-type]


def read_part(folder: Path, info: _StorageInfo) -> Stored:
    """Find the one tensor that lies at a place of a distributed checkpoint's file. Raises ConfigError."""
    path = inside(folder, info.relative_path)
    found = read_archive(path, info.offset, info.length)
    if not isinstance(found, Stored):
        raise ConfigError(f"{folder} is damaged: {path.name} does not hold the tensors that its index says")
    return found


def read_object(folder: Path, metadata: Metadata, name: str) -> Any:
    """Read what is stored under a name and is no tensor into plain values. Raises ConfigError."""
    info = metadata.storage_data.get(MetadataIndex(name))
    if info is None:
        raise ConfigError(f"{folder} is damaged: its index {INDEX} does not say where {name} lies")
    return read_archive(inside(folder, info.relative_path), info.offset, info.length)


class SafeReader(FileSystemReader):
    """Torch's reader of distributed checkpoints, but that index and tensors are read by code that builds no object."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        """metadata: as `read_metadata` gave it."""
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return replace(self._metadata, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs of each tensor, and no more."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise ConfigError(f"{self.path} holds {item.storage_index.fqn}, which is no tensor")
            stored = read_part(Path(self.path), self.storage_data[item.storage_index])
            part = box(stored.shape, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(read_region(stored, part).reshape(target.shape))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def tensors_of(metadata: Metadata, folder: Path, files: Collection[str]) -> dict[str, TensorStorageMetadata]:
    """Refuse an index that leads out of the checkpoint or does not cover its tensors.

    files: names that the checkpoint consists of. Returns what is stored of each tensor, by name. Raises ConfigError.
    """
    if not {info.relative_path for info in metadata.storage_data.values()} <= set(files):
        raise ConfigError(f"{folder} is damaged: its index names files that its manifest does not")
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{folder} is damaged: its index {INDEX} cannot be read, {name:.80} is no tensor")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ConfigError(f"{folder} is damaged: its index does not hold the whole of {name}")
        found[name] = entry
    return found
