"""Row groups kept on a node's disk, so that only the first epoch reads them from S3.

A window of the plan takes row groups from nearly every shard; so row groups are kept, not whole shards, and
the first batch costs no more than without a cache. Each is a small Parquet file with checksums, named
by its shard's sha256, and written whole or not at all.
"""

from __future__ import annotations

import fcntl
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
"""Of shards and of what is kept of them."""

KEPT_FRACTION = 0.9
"""When the cache is full it is emptied down to this, so that its files are seldom counted."""


@dataclass(frozen=True)
class RowGroupCache:
    """At most `limit_bytes` of row groups in `directory`, for all processes of a node together.

    The least recently used go first; POSIX lets those that have a file open read on.
    """

    directory: str
    limit_bytes: int

    def get(self, sha256: str, row_group: int, schema: pa.Schema) -> pa.Table | None:
        """Return a row group of the shard with that checksum, or None where it is not kept or damaged."""
        path = self._path(sha256, row_group)
        try:
            with open(path, "rb") as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
            if table.schema != schema:
                raise pa.ArrowInvalid("damaged")
            os.utime(path)
            return table
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError):
            with suppress(OSError):
                path.unlink()
            return None

    def put(self, sha256: str, row_group: int, table: pa.Table) -> None:
        """Keep a row group; where that is not possible, warn once and go on without."""
        sink = io.BytesIO()
        pq.write_table(table, sink, **PARQUET_OPTIONS)
        path = self._path(sha256, row_group)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, sink.getvalue())
        except OSError as error:
            warnings.warn(f"data.cache_dir '{self.directory}': cannot be written ({error.strerror}); reading from S3 instead", stacklevel=2)

    def _path(self, sha256: str, row_group: int) -> Path:
        return Path(self.directory, sha256[:2], f"{sha256}-{row_group:05d}.parquet")

    def _write(self, path: Path, data: bytes) -> None:
        if len(data) > self.limit_bytes * KEPT_FRACTION:
            return
        with self._locked_total() as file:
            text = file.read()
            total = int(text) if text.isdigit() else self.limit_bytes
            if total + len(data) > self.limit_bytes:
                total = self._evict(int(self.limit_bytes * KEPT_FRACTION) - len(data))
            # Noted first: whatever ends this process here, the sum is not too small.
            file.seek(0)
            file.truncate()
            file.write(b"%d" % (total + len(data)))
            file.flush()
            _write_whole(path, data)

    @contextmanager
    def _locked_total(self) -> Iterator[io.BufferedRandom]:
        """Yield the file that holds the sum of all sizes, which it may exceed until the next count."""
        handle = os.open(Path(self.directory, "total"), os.O_RDWR | os.O_CREAT)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed when the file is closed, also by the process's end
            yield file

    def _evict(self, limit: int) -> int:
        """Delete the least recently used files until `limit` bytes are left; return how many are left."""
        files = []
        for path in Path(self.directory).glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
