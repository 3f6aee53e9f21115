"""What pyarrow reads: the rows of Parquet files, and streams that zstd packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

ROWS = 256  # read at a time


class ZstdStream:
    """The stream that a zstd file unpacks to; `read` raises ValueError where the file is damaged."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.stream = raw, pyarrow.CompressedInputStream(raw, "zstd")

    def read(self, size: int) -> bytes:
        try:
            return bytes(self.stream.read(size))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(_reason(error)) from None


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[float, list[bytes | None]]]:
    """Yield the rows of a Parquet file, a few at a time, with the share of them that has been read.

    columns: names; the first must be there, of strings, and the others are None where they are not. Values are UTF-8.
    Raises KeyError with the names of the columns of strings, and ValueError for a file that is damaged.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            strings = [field.name for field in file.schema_arrow if _is_string(field.type)]
            if columns[0] not in strings:
                raise KeyError(", ".join(strings[:10]) or "it has none of strings")
            found = [name for name in columns if name in strings]
            done = 0
            for batch in file.iter_batches(ROWS, columns=found, use_threads=False):
                arrays = {name: _decoded(batch.column(name)) for name in found}
                for row in range(batch.num_rows):
                    yield done / file.metadata.num_rows, [_value(arrays.get(name), row) for name in columns]
                    done += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(_reason(error)) from None


def _is_string(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _decoded(array: Any) -> Any:
    return array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array


def _value(array: Any, row: int) -> bytes | None:
    if array is None:
        return None
    buffer = array[row].as_buffer()
    return None if buffer is None else bytes(buffer)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
