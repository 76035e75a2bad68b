"""Small pictures kept as bare pixels: IDX files (MNIST, Fashion-MNIST, …) and CIFAR's binary version."""

from __future__ import annotations

import io
import re
import struct
import tarfile
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eagleray import storage
from eagleray.data.sources.listing import Listing, build_items, checked, concat_items, number_classes, with_labels
from eagleray.data.sources.reading import PixelReader, gunzip
from eagleray.errors import DataError

_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_IDX_IMAGES, _IDX_LABELS = 0x00000803, 0x00000801  # unsigned bytes in three dimensions, and in one


@dataclass(frozen=True)
class Idx:
    """A folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and `t10k-…`, each plain or `.gz`; splits `train` and `test`."""

    uri: str
    class_names: str | None = None

    def list_items(self) -> Listing:
        root = storage.normalize_uri(self.uri)
        files: dict[str, dict[str, str]] = {}
        for uri in storage.list_files(root):
            name = uri[len(root) :].lstrip("/")
            match = _IDX_NAME.fullmatch(name)
            if match:
                files.setdefault("train" if match[1] == "train" else "test", {}).setdefault(match[2], name)
        incomplete = [split for split, names in files.items() if len(names) < 2]
        if not files or incomplete:
            missing = f"the images or labels of '{incomplete[0]}'" if incomplete else "train-images-idx3-ubyte[.gz] and so on"
            raise DataError(
                f"'{self.uri}': {missing} not found; give the folder with the images and labels of MNIST, Fashion-MNIST or the like"
            )
        parts = {split: self._list_split(root, split, names) for split, names in sorted(files.items(), reverse=True)}
        shapes = {shape for _, _, shape in parts.values()}
        if len(shapes) > 1:
            raise DataError(f"'{self.uri}': the pictures of train and test differ in size: {', '.join(map(str, sorted(shapes)))}")
        classes, labels = number_classes(np.concatenate([found for _, found, _ in parts.values()]), self.uri, self.class_names)
        items = with_labels(concat_items([table for table, _, _ in parts.values()]), labels)
        return checked(self.uri, Listing(classes, items, PixelReader(root, (1, *shapes.pop()))))

    def _list_split(self, root: str, split: str, names: dict[str, str]) -> tuple[pa.Table, NDArray[np.uint8], tuple[int, int]]:
        images, labels = (_contents(storage.join(root, names[kind])) for kind in ("images", "labels"))
        if len(images) < 16 or len(labels) < 8:
            raise DataError(f"'{storage.join(root, names['images'])}': not an IDX file; fetch it again")
        magic, count, height, width = struct.unpack_from(">4I", images)
        label_magic, label_count = struct.unpack_from(">2I", labels)
        if (magic, label_magic) != (_IDX_IMAGES, _IDX_LABELS):
            raise DataError(f"'{storage.join(root, names['images'])}': not an IDX file of 8-bit pictures with its labels")
        if count != label_count or len(images) != 16 + count * height * width or len(labels) != 8 + count:
            raise DataError(
                f"'{storage.join(root, names['images'])}': {count} pictures and {label_count} labels, or cut off; fetch both again"
            )
        keys = [f"{split}/{index:06d}" for index in range(count)]
        offsets = 16 + height * width * np.arange(count)
        items = build_items(keys, np.zeros(count, np.int32), height * width, files=names["images"], offsets=offsets, split=split)
        return items, np.frombuffer(labels, np.uint8, offset=8), (height, width)


def _contents(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    return gunzip(uri, data) if uri.endswith(".gz") else data


_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_TRAIN = re.compile(r"data_batch_\d\.bin|train\.bin")
_CIFAR_TEST = re.compile(r"test_batch\.bin|test\.bin")
_CIFAR_NAMES = {"batches.meta.txt": 1, "fine_label_names.txt": 2}
"""File with the class names → bytes of labels before each picture (CIFAR-100: coarse, then fine)."""


@dataclass(frozen=True)
class _Part:
    """One binary file, by itself or within the archive."""

    name: str
    file: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100, binary version: the `.tar.gz` or the unpacked folder; splits `train` and `test`."""

    uri: str

    def list_items(self) -> Listing:
        root, parts = _cifar_parts(storage.normalize_uri(self.uri))
        names = next((part for part in parts if part.name in _CIFAR_NAMES), None)
        binary = [part for part in parts if _cifar_split(part.name) is not None]
        if names is None or not binary:
            raise DataError(
                f"'{self.uri}': not CIFAR's binary version (data_batch_1.bin and batches.meta.txt, or train.bin and fine_label_names.txt); "
                "download cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"
            )
        classes = [line.strip() for line in names.data.decode().splitlines() if line.strip()]
        label_bytes = _CIFAR_NAMES[names.name]
        items = concat_items([_cifar_items(part, label_bytes, len(classes)) for part in binary])
        return checked(self.uri, Listing(classes, items, PixelReader(root, _CIFAR_SHAPE)))


def _cifar_split(name: str) -> str | None:
    return "train" if _CIFAR_TRAIN.fullmatch(name) else "test" if _CIFAR_TEST.fullmatch(name) else None


def _cifar_parts(uri: str) -> tuple[str, list[_Part]]:
    """Return the source's root, and its files sorted by name."""
    if uri.endswith(".tar.gz"):
        root, _, archive = uri.rpartition("/")
        data = gunzip(uri, storage.read_bytes(uri))
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = [member for member in tar if member.isfile()]
        except tarfile.TarError as error:
            raise DataError(f"'{uri}': not a whole tar ({error}); fetch it again") from None
        parts = [_Part(m.name.rpartition("/")[2], archive, m.offset_data, data[m.offset_data : m.offset_data + m.size]) for m in members]
    else:
        root = uri
        files = [file for file in storage.list_files(uri) if _cifar_split(file.rpartition("/")[2]) or file.endswith(tuple(_CIFAR_NAMES))]
        parts = [_Part(file.rpartition("/")[2], file[len(uri) :].lstrip("/"), 0, storage.read_bytes(file)) for file in files]
    return root, sorted(parts, key=lambda part: part.name)


def _cifar_items(part: _Part, label_bytes: int, num_classes: int) -> pa.Table:
    record = label_bytes + _CIFAR_PIXELS
    if len(part.data) % record or not part.data:
        raise DataError(f"'{part.file}': {part.name} is cut off ({len(part.data)} bytes, no multiple of {record}); fetch it again")
    labels = np.frombuffer(part.data, np.uint8).reshape(-1, record)[:, label_bytes - 1].astype(np.int32)
    if labels.max() >= num_classes:
        raise DataError(f"'{part.file}': {part.name} has the label {labels.max()}, but there are {num_classes} class names")
    keys = [f"{part.name}/{index:05d}" for index in range(len(labels))]
    offsets = part.offset + label_bytes + record * np.arange(len(labels))
    return build_items(keys, labels, _CIFAR_PIXELS, files=part.file, offsets=offsets, split=_cifar_split(part.name))
