"""Pictures in the rows of Parquet files, as on the Hugging Face Hub."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eagleray import storage
from eagleray.data.sources.listing import (
    LABEL_NAMES,
    Listing,
    build_items,
    checked,
    concat_items,
    number_classes,
    pick_column,
    split_of_path,
)
from eagleray.data.sources.patterns import matching_files
from eagleray.data.sources.reading import ParquetReader
from eagleray.errors import DataError

IMAGE_NAMES = ("image", "img", "picture")
LIST_THREADS = 8


@dataclass(frozen=True)
class _File:
    """What is known of one file without its pictures; sizes are the average of a row group."""

    name: str
    image_column: str
    labels: pa.Array
    class_names: list[str] | None
    sizes: NDArray[np.int64] = field(repr=False)
    row_groups: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Parquet:
    """A file, a folder or a pattern of files with a column of encoded pictures (bytes, or a struct with `bytes`) and one of labels.

    Class names that the `datasets` library has written into the files are used.
    """

    uri: str
    image_column: str | None = None
    label_column: str | None = None
    class_names: str | None = None
    split_by_folder: bool = False

    def list_items(self) -> Listing:
        root, names = matching_files(self.uri, ".parquet")
        with ThreadPoolExecutor(LIST_THREADS) as pool:
            files = list(pool.map(lambda name: self._list_file(root, name), names))
        labels = pa.concat_arrays([file.labels for file in files])
        known = files[0].class_names
        if self.class_names is None and known is not None and pa.types.is_integer(labels.type):
            numbers = labels.to_numpy(zero_copy_only=False)
            if labels.null_count or numbers.min() < 0 or numbers.max() >= len(known):
                raise DataError(f"'{self.uri}': labels are missing, or outside of the {len(known)} classes that the files name")
            classes, labels = known, numbers
        else:
            classes, labels = number_classes(labels, self.uri, self.class_names)
        items, start = [], 0
        for file in files:
            stop = start + len(file.labels)
            items.append(self._items(file, labels[start:stop]))
            start = stop
        return checked(self.uri, Listing(classes, concat_items(items), ParquetReader(root, files[0].image_column)))

    def _list_file(self, root: str, name: str) -> _File:
        uri = storage.join(root, name)
        with storage.open_file(uri) as opened:
            parquet = pq.ParquetFile(opened)
            columns = parquet.schema_arrow.names
            image = pick_column(self.image_column, IMAGE_NAMES, columns, "image", uri)
            label = pick_column(self.label_column, LABEL_NAMES, columns, "label", uri)
            _check_kind(uri, image, parquet.schema_arrow.field(image).type)
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            rows = [group.num_rows for group in groups]
            sizes = [_column_bytes(group, image) // max(1, group.num_rows) for group in groups]
            labels = parquet.read(columns=[label], use_threads=False)[label].combine_chunks()
            return _File(
                name,
                image,
                labels.chunk(0) if isinstance(labels, pa.ChunkedArray) else labels,
                _hub_class_names(parquet.schema_arrow.metadata, label),
                np.repeat(np.array(sizes, np.int64), rows),
                np.repeat(np.arange(len(rows)), rows),
            )

    def _items(self, file: _File, labels: NDArray[Any]) -> pa.Table:
        keys = [f"{file.name}/{row}" for row in range(len(labels))]
        split = split_of_path(file.name, self.uri) if self.split_by_folder else None
        return build_items(keys, labels, file.sizes, files=file.name, offsets=np.arange(len(labels)), split=split, chunks=file.row_groups)


def _check_kind(uri: str, column: str, kind: pa.DataType) -> None:
    encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        raise DataError(
            f"'{uri}': the column '{column}' holds {kind}, not encoded pictures (binary, or a struct with bytes); name another with --image-column"
        )


def _column_bytes(group: Any, column: str) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _hub_class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Return the names of a `ClassLabel` feature that the `datasets` library left in the schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
