"""Torch's archives, as `torch.save` writes them, read into plain values and places of tensors without torch's reader.

An archive is a zip file whose entries are not compressed: `data.pkl` holds the values, `data/N` the elements of
tensors. It may be a part of a file, as the parts of a distributed checkpoint are.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from moescale.checkpoint.plain_pickle import MOST_BYTES, Name, PlainPickleError, Record, read_plain
from moescale.checkpoint.strided_view import Stored, stored_whole
from moescale.config import ConfigError
from moescale.files.reading import open_regular

MOST_DIMS, MOST_ELEMENTS = 64, 1 << 50
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {  # what the elements of a class of storage are; bytes where the tensor says what they are
    **{f"torch.{name}Storage": dtype for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()},
    "torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8,
}
LOCAL_HEADER = 30  # bytes before the name of an entry


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Read what `torch.save` wrote into a file, or into `length` bytes of it from `start` on; no code runs.

    Returns plain values (`plain_pickle`), with Stored in the place of tensors. Raises ConfigError.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            length = size - start if length is None else length
            if not 0 <= start <= start + length <= size:
                raise PlainPickleError("is too short for what it should hold")
            return _Archive(path, file, start, length).read()
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except PlainPickleError as error:
        raise ConfigError(f"{path} is no checkpoint of torch, or is damaged: it {error}") from None
    except Exception as error:  # bytes that are no archive can fail in any way
        raise ConfigError(f"{path} is no checkpoint of torch, or is damaged ({type(error).__name__})") from None


def shape_of(sizes: Any) -> tuple[int, ...]:
    """Check that these are the sizes of a tensor, or places in one. Raises PlainPickleError."""
    product = 1
    if not isinstance(sizes, (tuple, list)) or len(sizes) > MOST_DIMS:
        raise PlainPickleError("holds a shape that is none")
    for size in sizes:
        if type(size) is not int or size < 0:
            raise PlainPickleError("holds a shape that is none")
        product *= max(size, 1)
        if product > MOST_ELEMENTS:
            raise PlainPickleError("holds a shape that no tensor can have")
    return tuple(sizes)


@dataclass(frozen=True)
class _Storage:
    """Where the elements of tensors lie in the file."""

    dtype: torch.dtype
    offset: int
    size_bytes: int


class _Archive:
    """One archive that lies at `start` of a file."""

    def __init__(self, path: Path, file: BinaryIO, start: int, length: int) -> None:
        self.path, self.file, self.start, self.length = path, file, start, length
        file.seek(start)
        if file.read(2) != b"PK":
            if file.seek(start) == start and file.read(1) == b"\x80":
                raise ConfigError(f"{path} was written by torch before 1.6: load it and save it again")
            raise PlainPickleError("is no archive")
        self.entries: dict[str, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(io.BufferedReader(_Window(file, start, length))) as archive:
            for entry in archive.infolist():
                if entry.filename in self.entries:
                    raise PlainPickleError(f"holds {entry.filename!r:.80} twice")
                self.entries[entry.filename] = entry
        self.top = next(name for name in self.entries if name.endswith("/data.pkl")).removesuffix("data.pkl")

    def read(self) -> Any:
        if self.top + "byteorder" in self.entries and self._content("byteorder") != b"little":
            raise ConfigError(f"{self.path} was written on a machine of the other byte order")
        if self.top + "constants.pkl" in self.entries:
            raise ConfigError(f"{self.path} is a program of TorchScript: save the model's state_dict")
        return read_plain(self._content("data.pkl"), {
            "torch._utils._rebuild_tensor_v2": self._tensor, "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
        }, self._storage)

    def _extent(self, name: str) -> tuple[int, int]:
        """Find an entry. Returns where it begins in the file, and its size in bytes."""
        entry = self.entries[self.top + name]
        self.file.seek(self.start + entry.header_offset)
        header = self.file.read(LOCAL_HEADER)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise PlainPickleError(f"holds {name!r:.80} compressed")
        if len(header) != LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise PlainPickleError(f"holds no {name!r:.80} where its list says")
        names, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        begin = entry.header_offset + LOCAL_HEADER + names + extra
        if begin + entry.file_size > self.length:
            raise PlainPickleError(f"is too short for {name!r:.80}")
        return self.start + begin, entry.file_size

    def _content(self, name: str) -> bytes:
        begin, size = self._extent(name)
        if size > MOST_BYTES:
            raise PlainPickleError(f"holds {name!r:.80} of {size:,} bytes")
        self.file.seek(begin)
        return self.file.read(size)

    def _storage(self, identity: Any) -> _Storage:
        kind, made, key, _, _ = identity
        if kind != "storage" or not isinstance(made, Name) or not isinstance(key, str):
            raise PlainPickleError("holds a storage that is none")
        if made.name not in STORAGES:
            raise PlainPickleError(f"asks for {made.name}, which no checkpoint needs: it was not loaded")
        return _Storage(STORAGES[made.name], *self._extent(f"data/{key}"))

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
        return self._stored(storage, storage.dtype, offset, size, stride)

    def _tensor_of_bytes(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> Stored:
        return self._stored(storage, DTYPES[dtype.name], offset, size, stride)

    def _stored(self, storage: _Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Stored:
        shape, (begin,) = shape_of(size), shape_of((offset,))
        if len(stride) != len(shape):
            raise PlainPickleError("holds a shape that is none")
        elements = 1
        for length, step in zip(reversed(shape), reversed(stride), strict=True):
            if length > 1 and step != elements and 0 not in shape:
                raise ConfigError(f"{self.path} holds a tensor with gaps between its elements: "
                                  "save it with .contiguous()")
            elements *= length
        if (begin + elements) * dtype.itemsize > storage.size_bytes and elements:
            raise PlainPickleError("is too short for its tensors")
        return stored_whole(self.path, storage.offset + begin * dtype.itemsize, dtype, shape)

    def _of_type(self, rebuild: Any, made: Any, args: Any, *_: Any) -> Any:
        """A tensor that has attributes, or another class than torch's own."""
        if made.name not in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"):
            return Record(made.name, (), None, {}, [])
        calls = {"torch._utils._rebuild_tensor_v2": self._tensor,
                 "torch._utils._rebuild_tensor_v3": self._tensor_of_bytes}
        return calls[rebuild.name](*args)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0
        self.left = MOST_BYTES  # that may still be read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        offset += {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if offset < 0:
            raise OSError(0, "a place before the beginning")
        self.at = offset
        return offset

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self.length - self.at))
        self.left -= count
        if self.left < 0:
            raise PlainPickleError("has a list of its contents that is too long")
        self.file.seek(self.start + self.at)
        found = self.file.read(count)
        view[: len(found)] = found
        self.at += len(found)
        return len(found)
