"""Where pictures come from: what classes there are, and how to get at each picture.

A source is listed once by the driver; its items are small and read by Ray tasks anywhere.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Protocol

from eagleray import storage
from eagleray.errors import DataError, near_miss

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Item:
    """One picture of a source: a stable `key`, its class, its size in bytes, and where it is."""

    key: str
    label: int
    size_bytes: int
    uri: str

    def read(self) -> bytes:
        """Return the encoded picture. Raises StorageError."""
        return storage.read_bytes(self.uri)


@dataclass(frozen=True)
class Listing:
    classes: list[str]
    items: list[Item]


class Source(Protocol):
    def list_items(self) -> Listing:
        """Return classes and items, in an order that depends on the source alone.

        Raises:
            DataError: nothing usable is there.
        """


@dataclass(frozen=True)
class ImageFolder:
    """One sub-folder per class; pictures may lie deeper within it."""

    uri: str

    def list_items(self) -> Listing:
        if not storage.exists(self.uri):
            raise DataError(f"'{self.uri}': no such folder; give a folder with one sub-folder per class")
        root = storage.normalize_uri(self.uri)
        found: list[tuple[str, int]] = []
        for uri, size_bytes in storage.list_files_with_sizes(root):
            key = uri[len(root) :].lstrip("/")
            if key.lower().endswith(IMAGE_SUFFIXES) and "/" in key and not posixpath.basename(key).startswith("."):
                found.append((key, size_bytes))
        if not found:
            raise DataError(f"'{self.uri}': no pictures there ({', '.join(IMAGE_SUFFIXES)}) in sub-folders named after the classes")
        classes = sorted({key.split("/", 1)[0] for key, _ in found})
        if len(classes) < 2:
            raise DataError(f"'{self.uri}': only one class ('{classes[0]}'); give a folder with one sub-folder per class, two or more")
        index = {name: label for label, name in enumerate(classes)}
        items = [Item(key, index[key.split("/", 1)[0]], size_bytes, storage.join(root, key)) for key, size_bytes in sorted(found)]
        return Listing(classes, items)


SOURCES = {"imagefolder": ImageFolder}


def open_source(spec: str) -> Source:
    """Return the source that `kind:address` means; an address alone is an image folder.

    Raises:
        DataError: unknown kind.
    """
    kind, separator, address = spec.partition(":")
    if not separator or address.startswith("//"):
        return ImageFolder(spec)
    if kind not in SOURCES:
        raise DataError(f"source '{spec}': unknown kind '{kind}'{near_miss(kind, SOURCES)}; known: {', '.join(SOURCES)}")
    return SOURCES[kind](address)
