"""The index of a distributed checkpoint, read without running code.

Torch's own reader unpickles the index, whatever it holds. Here only the classes that an index is made of can be named.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from moescale.config import ConfigError

INDEX = ".metadata"


class _SafeUnpickler(pickle.Unpickler):
    """Looks up the classes of an index and no other, so that no code runs."""

    ALLOWED = frozenset({
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties",
            "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # its home in Python 3.13
    })

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ConfigError(f"the checkpoint's index asks for {module}.{name}, which no checkpoint needs: "
                              "it was not written by MoEScale, and was not loaded")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """Torch's reader of tensors, with an index that runs no code. Tensors are read with `weights_only`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata: Metadata = _SafeUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_index(folder: Path, files: Collection[str]) -> dict[str, TensorStorageMetadata]:
    """Read the index and refuse one that leads out of the checkpoint or does not cover its tensors.

    files: names that the checkpoint consists of. -> what is stored of each tensor, by name
    Raises ConfigError.
    """
    try:
        metadata = SafeReader(folder).read_metadata()
        if not {place.relative_path for place in metadata.storage_data.values()} <= set(files):
            raise ConfigError(f"{folder} is damaged: its index names files that its manifest does not")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
                raise TypeError
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ConfigError(f"{folder} is damaged: its index does not hold the whole of {name}")
        return metadata.state_dict_metadata  # type: ignore[return-value]
    except ConfigError:
        raise
    except Exception as error:  # bytes that are no index can fail in any way
        raise ConfigError(f"{folder} is damaged: its index {INDEX} cannot be read ({type(error).__name__})") from None
