"""Files that hold tensors: safetensors, torch's pickles, torch's distributed checkpoints. No data is read here.

Each can be opened, as names and places, and laid out, as a file of its full size with room for the data, which comes
later and in any order. A pickle may name the classes that the caller lists and no others; sizes must fit the file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
from collections.abc import Collection, Mapping
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import skip_data

from moescale.checkpoint.archive import read_archive, shape_of
from moescale.checkpoint.index import INDEX, read_metadata, read_part
from moescale.checkpoint.strided_view import Chunk, Shape, Stored, box, covers_once, stored_whole
from moescale.config import ConfigError
from moescale.files.reading import explain, open_regular
from moescale.files.reading import inside as inside

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}
POINTER = b"version https://git-lfs"
LARGEST_HEADER = 100_000_000  # bytes, as the format itself says
Sizes = Mapping[str, tuple[Shape, torch.dtype]]


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read where each tensor lies, by name, and the texts in the header. Raises ConfigError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_pointer(path, file.read(len(POINTER)))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError
            header = json.loads(file.read(length), object_pairs_hook=_once)
        texts = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ConfigError(f"{path}: {name} has dtype {entry['dtype']}, which MoEScale cannot read: save the "
                                  "model as float32 or bfloat16")
            begin, end = (shape_of([offset])[0] for offset in entry["data_offsets"])
            stored = stored_whole(path, 8 + length + begin, DTYPES[entry["dtype"]], shape_of(entry["shape"]))
            if end - begin != stored.size_bytes:
                raise ValueError
            tensors[name] = stored
        ends = sorted(entry["data_offsets"] for entry in header.values())
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {explain(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is no safetensors file, or its header is damaged") from None
    if ends != sorted(ends) or any(one[1] > two[0] for one, two in pairwise(ends)):
        raise ConfigError(f"{path} is damaged: two of its tensors lie in one place")
    wanted = 8 + length + max((end for _, end in ends), default=0)
    if wanted != size:
        raise ConfigError(f"{path} is damaged: it has {size:,} bytes, its header describes {wanted:,}")
    return tensors, texts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; one that has a name twice is refused, for readers differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def create_safetensors(path: Path, sizes: Sizes) -> dict[str, Stored]:
    """Lay out a file for tensors of these shapes and dtypes, and return where each will lie."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in sizes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return open_safetensors(path)[0]


def sizes_by_file(sizes: Sizes) -> dict[str, Sizes]:
    """Sort tensors by the file that each key names before its colon, and name them by what follows it."""
    by_file: dict[str, dict[str, tuple[Shape, torch.dtype]]] = {}
    for key, size in sizes.items():
        file, _, name = key.partition(":")
        by_file.setdefault(file, {})[name] = size
    return dict(by_file)


def create_pickle(path: Path, values: Mapping[str, Any], inside: str, sizes: Sizes) -> dict[str, Stored]:
    """Lay out what `torch.save` would write of the values and, under the key `inside`, of tensors by name.

    Returns where each tensor will lie.
    """
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
        torch.save({**values, inside: tensors} if inside else {**values, **tensors}, path)
    read = read_archive(path)
    return {name: stored for name, stored in (read[inside] if inside else read).items() if name in sizes}


def open_distributed(
    folder: Path, metadata: Metadata | None = None, left_out: Collection[str] = ()
) -> dict[str, Stored]:
    """Find the tensors of a distributed checkpoint. Returns where each lies. Raises ConfigError.

    metadata: its index, where that was read already. left_out: names of tensors that are not wanted.
    """
    metadata = metadata or read_metadata(folder)
    places = metadata.storage_data
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or name in left_out:
            continue  # no tensor, or one that nobody asks for
        shape, parts = tuple(entry.size), []
        chunks = []
        for chunk in entry.chunks:
            info = places.get(MetadataIndex(name, chunk.offsets))
            if info is None or any(begin + length > size for begin, length, size in zip(
                    chunk.offsets, chunk.sizes, shape, strict=True)):
                raise ConfigError(f"{folder} is damaged: its index does not say where all of {name} lies")
            item = read_part(folder, info)
            if math.prod(item.shape) != math.prod(chunk.sizes) or item.dtype != entry.properties.dtype:
                raise ConfigError(f"{folder} is damaged: {info.relative_path} does not hold {name} as its index says")
            parts.append(box(shape, chunk.offsets, chunk.sizes))
            chunks.append(Chunk(item.chunks[0].path, item.chunks[0].offset, parts[-1]))
        tensors[name] = Stored(entry.properties.dtype, shape, tuple(chunks))
        if covers_once(shape, parts):
            raise ConfigError(f"{folder} is damaged: its index does not hold the whole of {name} once")
    return tensors


def create_distributed(folder: Path, files: Mapping[str, Sizes], leading: Mapping[str, int]) -> dict[str, Stored]:
    """Lay out a distributed checkpoint. files: which tensors go into each file.

    leading: how many leading dims of a tensor are cut into chunks of one, so that a rank reads what it needs; 0 if not
    named. Returns where each tensor will lie.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    tensors: dict[str, Stored] = {}
    for file_name, sizes in files.items():
        with (folder / file_name).open("wb") as file:
            for name, (shape, dtype) in sizes.items():
                cut = leading.get(name, 0)
                size = (*(1 for _ in shape[:cut]), *shape[cut:])
                chunks, stored = [], []
                for leading_offsets in product(*map(range, shape[:cut])):
                    offsets = (*leading_offsets, *(0 for _ in shape[cut:]))
                    start = file.tell()
                    stored.append(Chunk(folder / file_name, _reserve(file, size, dtype), box(shape, offsets, size)))
                    places[MetadataIndex(name, offsets)] = _StorageInfo(file_name, start, file.tell() - start)
                    chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(size)))
                entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
                tensors[name] = Stored(dtype, shape, tuple(stored))
    with (folder / INDEX).open("wb") as index_file:
        pickle.dump(Metadata(entries, storage_data=places), index_file)
    return tensors


def _reserve(file: Any, shape: Shape, dtype: torch.dtype) -> int:
    """Append what `torch.save` would, with room for the data, and return where the data will begin."""
    start = file.tell()
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        torch.save(torch.empty(shape, dtype=dtype), file)
    return start + _header_size(shape, dtype)


@cache
def _header_size(shape: Shape, dtype: torch.dtype) -> int:
    """Count the bytes before the data of a tensor that `torch.save` writes alone."""
    with tempfile.TemporaryFile() as archive, FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        torch.save(torch.empty(shape, dtype=dtype), archive)
        archive.seek(0)
        return int(torch.load(archive, weights_only=True).untyped_storage()._checkpoint_offset)  # our own


def refuse_pointer(path: Path, content: bytes) -> None:
    """Refuse what Git leaves in the place of a large file that was not downloaded. content: at least its first words"""
    if content.startswith(POINTER):
        raise ConfigError(f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` there")
