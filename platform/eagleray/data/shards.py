"""The format at rest: Parquet shards and a manifest.

A data set is a folder of `shard-<plan>-00000.parquet`, … and `manifest.json`. The manifest is written
last and once; a folder without it is not a data set. A shard holds one picture a row; its row
groups (a few MB) are the unit of a range read.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from eagleray import storage
from eagleray.config.schema import DataConfig
from eagleray.data.cache import PARQUET_OPTIONS, RowGroupCache
from eagleray.errors import DataError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # stable name of the picture within its source
        pa.field("image", pa.binary()),  # encoded bytes, as in the source unless re-encoded; see decode.encode_raw for raw pixels
        pa.field("label", pa.int32()),  # index into the manifest's classes
        pa.field("width", pa.int32()),  # pixels, as displayed (EXIF orientation applied)
        pa.field("height", pa.int32()),
    ]
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Record):
    path: str
    """Relative to the data set's URI."""
    rows: int
    size_bytes: int
    sha256: str
    row_group_rows: list[int]
    class_counts: dict[str, int]
    """Class name → rows; classes without a row in this shard are absent."""


class RefusedImage(_Record):
    key: str
    reason: str


class Manifest(_Record):
    """What a data set holds. Two data sets with the same digest hold the same bytes in the same order."""

    schema_version: int = SCHEMA_VERSION
    classes: list[str]
    shards: list[ShardInfo]
    source: str
    """URI and settings it was made from, for people and lineage."""
    split: str = "all"
    refused: list[RefusedImage] = []
    """Pictures that could not be read; capped in number, see `num_refused`."""
    num_refused: int = 0

    @cached_property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def bytes_per_picture(self) -> float:
        return sum(shard.size_bytes for shard in self.shards) / max(1, self.num_rows)

    @cached_property
    def digest(self) -> str:
        """sha256 over everything but the source's address and the shards' names: the identity of the data itself."""
        excluded: Any = {"source": True, "shards": {"__all__": {"path"}}}
        return hashlib.sha256(self.model_dump_json(exclude=excluded).encode()).hexdigest()

    @cached_property
    def class_counts(self) -> dict[str, int]:
        counts = dict.fromkeys(self.classes, 0)
        for shard in self.shards:
            for name, rows in shard.class_counts.items():
                counts[name] += rows
        return counts


def manifest_uri(uri: str) -> str:
    return storage.join(uri, MANIFEST_NAME)


def load_manifest(uri: str) -> Manifest:
    """Read the manifest of the data set at `uri`.

    Raises:
        DataError: there is no data set, or its manifest is damaged or of a newer version.
        StorageError: the store cannot be reached, or has no such bucket.
    """
    if not storage.exists(manifest_uri(uri)):
        storage.check_access(uri)
        raise DataError(f"'{uri}': no data set there (no {MANIFEST_NAME}); make one with `eagleray ingest SOURCE {uri}`")
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(manifest_uri(uri)))
    except ValidationError as error:
        raise DataError(f"'{manifest_uri(uri)}': damaged or of another version ({error.error_count()} problems); ingest again") from None
    if manifest.schema_version > SCHEMA_VERSION:
        raise DataError(
            f"'{manifest_uri(uri)}': written by a newer eagleray (format {manifest.schema_version}, this one reads {SCHEMA_VERSION}); upgrade"
        )
    return manifest


def encode_shard(path: str, rows: list[dict[str, Any]], row_group_bytes: int, classes: list[str]) -> tuple[bytes, ShardInfo]:
    """Return the bytes of a shard and its entry in the manifest.

    Pictures are compressed already, so that pages are stored plain. Each page has a checksum.
    """
    sink = io.BytesIO()
    row_group_rows: list[int] = []
    with pq.ParquetWriter(sink, SHARD_SCHEMA, **PARQUET_OPTIONS) as writer:
        for group in _row_groups(rows, row_group_bytes):
            writer.write_table(pa.Table.from_pylist(group, schema=SHARD_SCHEMA), row_group_size=len(group))
            row_group_rows.append(len(group))
    data = sink.getvalue()
    counts: dict[str, int] = {}
    for row in rows:
        name = classes[row["label"]]
        counts[name] = counts.get(name, 0) + 1
    info = ShardInfo(
        path=path,
        rows=len(rows),
        size_bytes=len(data),
        sha256=storage.sha256_hex(data),
        row_group_rows=row_group_rows,
        class_counts=dict(sorted(counts.items())),
    )
    return data, info


def _row_groups(rows: list[dict[str, Any]], row_group_bytes: int) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = [[]]
    size = 0
    for row in rows:
        if size >= row_group_bytes:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += len(row["image"])
    return [group for group in groups if group]


@dataclass(frozen=True)
class ReadOptions:
    """What is known of the shards and how they are read; by default nothing is known beyond their own checksums.

    Attributes:
        shards: path of a shard → (size in bytes, sha256) by the manifest.
        verify_checksums: compare the sha256 when a process first reads from a shard.
        cache: keeps row groups read from S3; None: none.
    """

    shards: dict[str, tuple[int, str]] = field(default_factory=dict)
    verify_checksums: bool = False
    cache: RowGroupCache | None = None

    @classmethod
    def of(cls, manifest: Manifest, config: DataConfig) -> ReadOptions:
        shards = {shard.path: (shard.size_bytes, shard.sha256) for shard in manifest.shards}
        cache = RowGroupCache(config.cache_dir, config.cache_bytes) if config.cache_dir is not None else None
        return cls(shards, config.verify_checksums, cache)


def read_row_groups(dataset_uri: str, shard_path: str, row_groups: list[int], options: ReadOptions = ReadOptions()) -> list[pa.Table]:
    """Read row groups of one shard (range reads) as tables of `SHARD_SCHEMA`, in the order asked for.

    What does not match its checksum is read once more, since it may have been damaged on the way. Not to be
    called for one shard from several threads at once.

    Raises:
        DataError: the shard is missing, damaged or another one; names it.
        StorageError: the store does not answer, or the credentials have expired; see `storage.retrying`.
    """
    uri = storage.join(dataset_uri, shard_path)
    size_bytes, sha256 = options.shards.get(shard_path, (None, ""))
    cache = options.cache if sha256 and not storage.is_local(uri) else None

    def read(row_group: int) -> pa.Table:
        if cache is not None and (table := cache.get(sha256, row_group, SHARD_SCHEMA)) is not None:
            return table
        table = _read_row_group(uri, row_group, size_bytes, sha256 if options.verify_checksums else "")
        if cache is not None:
            cache.put(sha256, row_group, table)
        return table

    try:
        return [read(row_group) for row_group in row_groups]
    except FileNotFoundError:
        _open_shard.cache_clear()
        raise DataError(f"'{uri}': the shard is missing though the manifest lists it; delete the data set and ingest again") from None
    except _UNREADABLE as error:
        raise DataError(f"'{uri}': cannot be read ({storage.reason(error)[:200]}); run `eagleray data verify {dataset_uri}`") from error


_UNREADABLE = (pa.ArrowException, OSError, ValueError, IndexError)
"""What pyarrow raises on damaged files; hostile bytes meet many of its checks."""


def _read_row_group(uri: str, row_group: int, size_bytes: int | None, sha256: str) -> pa.Table:
    def read() -> pa.Table:
        table = _open_shard(uri, size_bytes, sha256).read_row_group(row_group, use_threads=False)
        if table.schema != SHARD_SCHEMA:
            raise pa.ArrowInvalid("its columns are not those of a shard")
        return table

    def attempt() -> pa.Table:
        # An open file may have old credentials, or be of a shard that was replaced.
        return storage.retrying(uri, "read it", read, before_retry=_open_shard.cache_clear)

    try:
        return attempt()
    except FileNotFoundError:
        raise
    except _UNREADABLE:
        _open_shard.cache_clear()
        return attempt()


@lru_cache(maxsize=64)
def _open_shard(uri: str, size_bytes: int | None, sha256: str) -> pq.ParquetFile:
    """Open a shard and compare it with the manifest, as far as that is given.

    A reader keeps its state between reads and is not thread-safe; see `read_row_groups`.
    """
    filesystem, path = storage.open_uri(uri)
    file = filesystem.open_input_file(path)
    if size_bytes is not None and file.size() != size_bytes:
        raise pa.ArrowInvalid(f"it has {file.size()} bytes, {size_bytes} by the manifest")
    if sha256 and storage.sha256_of_file(filesystem, path) != sha256:
        raise pa.ArrowInvalid("its sha256 is not that of the manifest")
    return pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
