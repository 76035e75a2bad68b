"""Where pictures come from: what classes there are, and how to get at each picture.

A source is listed once by the driver; its pictures are read by Ray tasks anywhere.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from eagleray.config.schema import IngestConfig
from eagleray.data.sources.folders import Csv, ImageFolder
from eagleray.data.sources.listing import Listing, Source
from eagleray.data.sources.parquet import Parquet
from eagleray.data.sources.pixels import Cifar, Idx
from eagleray.data.sources.tars import ImageNet, WebDataset
from eagleray.errors import ConfigError, DataError, near_miss

SOURCES: dict[str, Any] = {
    "imagefolder": ImageFolder,
    "imagenet": ImageNet,
    "webdataset": WebDataset,
    "parquet": Parquet,
    "idx": Idx,
    "cifar": Cifar,
    "csv": Csv,
}

__all__ = ["SOURCES", "Listing", "Source", "open_source"]


def open_source(spec: str, config: IngestConfig | None = None) -> Source:
    """Return the source that `kind:address` means; an address alone is an image folder.

    Raises:
        DataError: unknown kind.
        ConfigError: a setting that this kind of source does not have.
    """
    kind, separator, address = spec.partition(":")
    if not separator or address.startswith("//"):
        kind, address = "imagefolder", spec
    if kind not in SOURCES:
        raise DataError(f"source '{spec}': unknown kind '{kind}'{near_miss(kind, SOURCES)}; known: {', '.join(SOURCES)}")
    settings = _settings(config or IngestConfig())
    known = {field.name for field in fields(SOURCES[kind])}
    for name in settings:
        if name not in known:
            option = "split_by 'folder'" if name == "split_by_folder" else name
            kinds = ", ".join(other for other, source in SOURCES.items() if name in {field.name for field in fields(source)})
            raise ConfigError(f"ingest.{option} does not apply to a source of kind '{kind}', only to {kinds}; leave it out")
    source: Source = SOURCES[kind](address, **settings)
    return source


def _settings(config: IngestConfig) -> dict[str, Any]:
    given = {name: getattr(config, name) for name in ("image_column", "label_column", "class_names")}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return settings | ({"split_by_folder": True} if config.split_by == "folder" else {})
