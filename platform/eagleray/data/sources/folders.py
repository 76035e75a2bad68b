"""One file per picture: in folders named after the classes, or listed in a CSV file."""

from __future__ import annotations

import io
import posixpath
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pa_csv

from eagleray import storage
from eagleray.data.sources.listing import (
    IMAGE_SUFFIXES,
    LABEL_NAMES,
    Listing,
    build_items,
    checked,
    number_classes,
    pick_column,
    split_of_path,
)
from eagleray.data.sources.reading import FileReader, resolve
from eagleray.errors import DataError, StorageError

URI_NAMES = ("uri", "path", "file", "filename", "image", "img")
SPLIT_FOLDERS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
SIZE_THREADS = 32


@dataclass(frozen=True)
class ImageFolder:
    """One sub-folder per class; pictures may lie deeper within it. With `split_by_folder`, one folder per split around them."""

    uri: str
    split_by_folder: bool = False

    def list_items(self) -> Listing:
        if not storage.exists(self.uri):
            raise DataError(f"'{self.uri}': no such folder; give a folder with one sub-folder per class")
        root = storage.normalize_uri(self.uri)
        files = ((uri[len(root) :].lstrip("/"), size_bytes) for uri, size_bytes in storage.list_files_with_sizes(root))
        found = sorted((key, size_bytes) for key, size_bytes in files if self._is_picture(key))
        if not found:
            folders = "split folders (train/, val/, …) with sub-folders" if self.split_by_folder else "sub-folders"
            raise DataError(f"'{self.uri}': no pictures there ({', '.join(IMAGE_SUFFIXES)}) in {folders} named after the classes")
        keys = [key for key, _ in found]
        if not self.split_by_folder:
            _refuse_splits_as_classes(self.uri, keys)
        classes, labels = number_classes_of_folders([key.split("/")[int(self.split_by_folder)] for key in keys])
        splits = [split_of_path(key, self.uri) for key in keys] if self.split_by_folder else None
        items = build_items(keys, labels, [size for _, size in found], files=keys, split=splits)
        return checked(self.uri, Listing(classes, items, FileReader(root)))

    def _is_picture(self, key: str) -> bool:
        is_deep_enough = key.count("/") > int(self.split_by_folder)
        return is_deep_enough and key.lower().endswith(IMAGE_SUFFIXES) and not posixpath.basename(key).startswith(".")


def number_classes_of_folders(names: list[str]) -> tuple[list[str], list[int]]:
    """Return the sorted class names, and each picture's index into them."""
    classes = sorted(set(names))
    index = {name: label for label, name in enumerate(classes)}
    return classes, [index[name] for name in names]


def _refuse_splits_as_classes(uri: str, keys: list[str]) -> None:
    """Folders that are all named like splits and hold folders of their own are hardly classes."""
    top = {key.split("/", 1)[0] for key in keys}
    if {name.lower() for name in top} <= SPLIT_FOLDERS and all(key.count("/") > 1 for key in keys):
        raise DataError(
            f"'{uri}': the folders {', '.join(sorted(top))} look like splits, not classes; say --split-by folder, "
            "or give one of them as the source"
        )


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header: the picture's URI (relative to the file, or in full), its label, and a split if it has such a column."""

    uri: str
    image_column: str | None = None
    label_column: str | None = None
    class_names: str | None = None

    def list_items(self) -> Listing:
        table = self._read()
        image = pick_column(self.image_column, URI_NAMES, table.column_names, "image", self.uri)
        label = pick_column(self.label_column, LABEL_NAMES, table.column_names, "label", self.uri)
        root = posixpath.dirname(storage.normalize_uri(self.uri))
        files = table[image].to_pylist()
        classes, labels = number_classes(table[label].combine_chunks(), self.uri, self.class_names)
        splits = table["split"].to_pylist() if "split" in table.column_names else None
        if splits and not all(splits):
            raise DataError(f"'{self.uri}': the row of '{files[[bool(s) for s in splits].index(False)]}' has no split; fill it in")
        items = build_items(files, labels, _sizes([resolve(root, file) for file in files]), files=files, split=splits)
        return checked(self.uri, Listing(classes, items, FileReader(root)))

    def _read(self) -> pa.Table:
        data = storage.read_bytes(self.uri)
        try:
            names = pa_csv.read_csv(io.BytesIO(data), read_options=pa_csv.ReadOptions(block_size=len(data) + 1)).column_names
            kinds = dict.fromkeys(names, pa.string())
            return pa_csv.read_csv(
                io.BytesIO(data), convert_options=pa_csv.ConvertOptions(column_types=kinds, null_values=[""], strings_can_be_null=True)
            )
        except pa.ArrowException as error:
            raise DataError(f"'{self.uri}': not a CSV file with a header ({' '.join(str(error).split())[:200]})") from None


def _sizes(uris: list[str]) -> list[int]:
    """Return the size of each file in bytes; 0 where there is none, which is told when it is read."""
    filesystems = {is_local: storage.open_uri(uri)[0] for is_local, uri in {storage.is_local(uri): uri for uri in uris}.items()}

    def size(uri: str) -> int:
        try:
            info = filesystems[storage.is_local(uri)].get_file_info(storage.normalize_uri(uri).removeprefix("s3://"))
        except OSError as error:
            raise StorageError(f"'{uri}': could not look it up: {' '.join(str(error).split())[:200]}") from error
        return info.size or 0

    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        return list(pool.map(size, uris))
