"""How pictures are read by tasks: whole files, ranges of files, or rows of Parquet files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eagleray import storage
from eagleray.data.decode import encode_raw
from eagleray.errors import DataError, StorageError

READ_THREADS = 8
"""Reads at a time in a task; they wait for the network, not for the CPU."""


def resolve(root: str, file: str) -> str:
    """Return the URI of a file named relative to `root`, or in full."""
    return file if "://" in file or file.startswith("/") else storage.join(root, file)


@dataclass(frozen=True)
class FileReader:
    """One picture a file."""

    root: str

    def read(self, items: pa.Table) -> Iterator[tuple[int, bytes | DataError]]:
        uris = [resolve(self.root, file) for file in items["file"].to_pylist()]
        filesystems = {is_local: storage.open_uri(uri)[0] for is_local, uri in {storage.is_local(uri): uri for uri in uris}.items()}

        def read(row: int) -> tuple[int, bytes | DataError]:
            try:
                with storage.open_file(uris[row], filesystems[storage.is_local(uris[row])]) as file:
                    return row, bytes(file.read())
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return row, DataError("not found")
                raise

        with ThreadPoolExecutor(READ_THREADS) as pool:
            yield from pool.map(read, range(len(uris)))


@dataclass(frozen=True)
class RangeReader:
    """Ranges of larger files, such as the members of a tar; every file is opened once."""

    root: str

    def read(self, items: pa.Table) -> Iterator[tuple[int, bytes | DataError]]:
        offsets, sizes = items["offset"].to_pylist(), items["size_bytes"].to_pylist()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for file, rows in _by_file(items):
                with open_ranges(resolve(self.root, file)) as read_at:
                    data = pool.map(lambda row, read_at=read_at: read_at(sizes[row], offsets[row]), rows)
                    yield from zip(rows, data, strict=True)


@dataclass(frozen=True)
class PixelReader:
    """Bare pixels at known places, channel after channel; they become raw pictures.

    `shape` is (channels, height, width).
    """

    root: str
    shape: tuple[int, int, int]

    def read(self, items: pa.Table) -> Iterator[tuple[int, bytes | DataError]]:
        for row, data in RangeReader(self.root).read(items):
            assert isinstance(data, bytes)
            pixels = np.frombuffer(data, np.uint8).reshape(self.shape)
            yield row, encode_raw(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@dataclass(frozen=True)
class ParquetReader:
    """Rows of Parquet files; each row group that holds a wanted one is read once."""

    root: str
    image_column: str

    def read(self, items: pa.Table) -> Iterator[tuple[int, bytes | DataError]]:
        places = items["offset"].to_numpy()
        for file, rows in _by_file(items):
            uri = resolve(self.root, file)
            with storage.open_file(uri) as opened:
                parquet = pq.ParquetFile(opened, pre_buffer=True)
                counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                starts = np.concatenate([[0], np.cumsum(counts)])
                groups = np.searchsorted(starts, places[rows], side="right") - 1
                for group in np.unique(groups).tolist():
                    column = parquet.read_row_group(group, columns=[self.image_column], use_threads=False)[self.image_column]
                    for row in np.array(rows)[groups == group].tolist():
                        yield row, _picture(column[int(places[row] - starts[group])].as_py())


def _picture(value: Any) -> bytes | DataError:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if data else DataError("no picture in this row")


def _by_file(items: pa.Table) -> Iterator[tuple[str, list[int]]]:
    """Yield each file with the rows of `items` in it, in the order in which they are stored."""
    order = items.select(["file", "offset"]).append_column("row", pa.array(range(len(items)), pa.int64()))
    order = order.sort_by([("file", "ascending"), ("offset", "ascending")])
    rows: dict[str, list[int]] = {}
    for file, row in zip(order["file"].to_pylist(), order["row"].to_pylist(), strict=True):
        rows.setdefault(file, []).append(row)
    yield from rows.items()


@contextmanager
def open_ranges(uri: str) -> Iterator[Callable[[int, int], bytes]]:
    """Open a file for `read_at(size, offset)` from several threads; of a `.gz` file, places are those of its contents.

    Raises:
        DataError: the file is shorter than it should be, or damaged.
    """
    with storage.open_file(uri) as file:
        contents = gunzip(uri, file.read()) if uri.endswith(".gz") else None

        def read_at(size: int, offset: int) -> bytes:
            data = contents[offset : offset + size] if contents is not None else bytes(file.read_at(size, offset))
            if len(data) < size:
                raise DataError(f"'{uri}': ends before its contents do; it is incomplete, fetch it again")
            return data

        yield read_at


def gunzip(uri: str, data: bytes) -> bytes:
    """Return the contents of a gzip file. Raises DataError, naming `uri`, if it is damaged."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{uri}': not a whole gzip file ({error}); fetch it again") from None
