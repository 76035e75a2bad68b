"""What a source holds: its classes, and for each picture where it is. One Arrow table, small for millions of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eagleray import storage
from eagleray.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABEL_NAMES = ("label", "labels", "class", "cls", "target")
"""What columns and fields with the class are called, most usual first."""

ITEM_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # stable name of the picture within its source
        pa.field("label", pa.int32()),  # index into the listing's classes
        pa.field("size_bytes", pa.int64()),  # of the picture; an estimate where the source does not know it
        pa.field("split", pa.string()),  # as the source has it; null: the source has no splits
        pa.field("file", pa.string()),  # the rest is for the listing's reader: relative to its root,
        pa.field("offset", pa.int64()),  # where in the file: bytes, or rows
        pa.field("chunk", pa.int64()),  # pictures of a chunk can only be read together, all at once
    ]
)


class Reader(Protocol):
    """Reads pictures of one source; small, and sent to Ray tasks."""

    def read(self, items: pa.Table) -> Iterator[tuple[int, bytes | DataError]]:
        """Yield (row of `items`, encoded picture), in the order in which the pictures are stored.

        A picture that is not there or has no bytes comes as a DataError with the reason.

        Raises:
            DataError: a file of the source is damaged.
            StorageError: a file of the source cannot be read.
        """


@dataclass(frozen=True)
class Listing:
    """All pictures of a source, in an order that depends on the source alone; `items` has `ITEM_SCHEMA`."""

    classes: list[str]
    items: pa.Table
    reader: Reader


class Source(Protocol):
    def list_items(self) -> Listing:
        """Return classes and items.

        Raises:
            DataError: nothing usable is there.
            StorageError: it cannot be read.
        """


def build_items(
    keys: Sequence[str] | pa.Array,
    labels: Sequence[int] | NDArray[Any],
    sizes: Any,
    *,
    files: Sequence[str] | str,
    offsets: Any = 0,
    split: str | Sequence[str | None] | None = None,
    chunks: Any = None,
) -> pa.Table:
    """Return a table of `ITEM_SCHEMA`; one value for `files`, `sizes`, `offsets` or `split` stands for all rows.

    Args:
        chunks: int64 [N]; None: every picture can be read by itself.
    """
    count = len(keys)

    def column(name: str, values: Any) -> pa.Array:
        kind = ITEM_SCHEMA.field(name).type
        if values is None or isinstance(values, str | int):
            return pa.repeat(pa.scalar(values, kind), count)
        return pa.array(values, kind)

    return pa.table(
        [
            column("key", keys),
            column("label", labels),
            column("size_bytes", sizes),
            column("split", split),
            column("file", files),
            column("offset", offsets),
            column("chunk", np.arange(count) if chunks is None else chunks),
        ],
        schema=ITEM_SCHEMA,
    )


def with_labels(items: pa.Table, labels: NDArray[np.int32]) -> pa.Table:
    """Return the items with other labels, where those are known only when all are listed."""
    return items.set_column(ITEM_SCHEMA.get_field_index("label"), ITEM_SCHEMA.field("label"), pa.array(labels, pa.int32()))


def concat_items(tables: list[pa.Table]) -> pa.Table:
    """Return the items of several tables as one; chunks are numbered anew."""
    parts, first_chunk = [], 0
    for table in tables:
        chunks = table["chunk"].to_numpy() + first_chunk
        parts.append(table.set_column(ITEM_SCHEMA.get_field_index("chunk"), ITEM_SCHEMA.field("chunk"), pa.array(chunks)))
        first_chunk = int(chunks.max()) + 1 if len(chunks) else first_chunk
    return pa.concat_tables(parts).combine_chunks()  # taking rows of many small pieces is slow


def checked(where: str, listing: Listing) -> Listing:
    """Return `listing` if it can be a data set for a classifier.

    Raises:
        DataError: no pictures, one class only, or a key that comes twice; names `where`.
    """
    if not len(listing.items):
        raise DataError(f"'{where}': no pictures there ({', '.join(IMAGE_SUFFIXES)})")
    if len(listing.classes) < 2:
        raise DataError(f"'{where}': only one class ('{listing.classes[0]}'); two or more are needed")
    keys = listing.items["key"]
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise DataError(f"'{where}': the picture '{twice}' is listed more than once; list each picture once")
    return listing


def number_classes(
    values: Sequence[Any] | pa.Array | NDArray[Any], where: str, class_names: str | None = None
) -> tuple[list[str], NDArray[np.int32]]:
    """Turn class names or numbers into classes and labels.

    Numbers (also as text) are ordered by value, names alphabetically.

    Args:
        values: one name or number for each picture.
        class_names: URI of a text file with a class name a line, for numbers that count its lines from 0.

    Returns:
        Class names, and int32 [N] of indices into them.

    Raises:
        DataError: a label is missing, or does not fit `class_names`.
    """
    encoded = (values if isinstance(values, pa.Array) else pa.array(values)).dictionary_encode()
    if encoded.null_count:
        raise DataError(f"'{where}': {encoded.null_count} pictures have no label")
    found = [str(value) for value in encoded.dictionary.to_pylist()]
    are_numbers = all(re.fullmatch(r"-?\d+", value) for value in found)
    if class_names is None:
        classes = sorted(set(found), key=int if are_numbers else None)
        number = {name: label for label, name in enumerate(classes)}
    else:
        classes = read_lines(class_names)
        number = {str(label): label for label in range(len(classes))}
        wrong = [value for value in found if value not in number]
        if wrong:
            raise DataError(
                f"'{where}': the label '{wrong[0]}' is not a number from 0 to {len(classes) - 1}, the lines of '{class_names}' (--class-names)"
            )
    return classes, np.array([number[name] for name in found], np.int32)[encoded.indices.to_numpy()]


def read_lines(uri: str) -> list[str]:
    """Return the lines of a text file without blank ones."""
    return [line.strip() for line in storage.read_bytes(uri).decode("utf-8-sig").splitlines() if line.strip()]


def pick_column(wanted: str | None, candidates: tuple[str, ...], present: Sequence[str], what: str, where: str) -> str:
    """Return the name of the column with the `what` ('image' or 'label').

    Raises:
        DataError: there is none; lists those that are there.
    """
    if wanted is not None and wanted in present:
        return wanted
    found = [name for name in candidates if name in present] if wanted is None else []
    if not found:
        reason = f"no column '{wanted}'" if wanted else f"no column for the {what} ({', '.join(candidates)})"
        raise DataError(f"'{where}': {reason}; name it with --{what}-column; columns there: {', '.join(present)}")
    return found[0]


def split_of_path(path: str, where: str) -> str:
    """Return the first folder of a path relative to the source. Raises DataError if it lies in none."""
    folder, separator, _ = path.partition("/")
    if not separator:
        raise DataError(f"'{where}': '{path}' lies in no folder for its split; --split-by folder needs train/, val/, … there")
    return folder
