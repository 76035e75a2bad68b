"""Looking at a data set: what it holds, what it looks like, whether it is whole."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eagleray import storage
from eagleray.data.decode import decode_trusted
from eagleray.data.shards import Manifest, ShardInfo, load_manifest, read_row_groups
from eagleray.data.transforms import Preprocessing, eval_image
from eagleray.errors import DataError, StorageError

TILE = 96
"""Side of a picture on the contact sheet, in pixels."""

VERIFY_THREADS = 4
"""Shards read and hashed at a time; each is held in memory."""

SAMPLED_SHARDS = 32
"""Shards whose pictures' sizes are looked at; pictures are shuffled over the shards, so that a few stand for all."""

QUANTILES = {"smallest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "largest": 1.0}


def describe(uri: str) -> dict[str, Any]:
    """Return what the data set at `uri` holds: split, pictures, classes with counts, shards, bytes, refused pictures, sizes in pixels."""
    manifest = load_manifest(uri)
    return {
        "uri": storage.normalize_uri(uri),
        "split": manifest.split,
        "pictures": manifest.num_rows,
        "shards": len(manifest.shards),
        "row groups": sum(len(shard.row_group_rows) for shard in manifest.shards),
        "size in MB": round(sum(shard.size_bytes for shard in manifest.shards) / 1e6, 3),
        "refused": manifest.num_refused,
        "digest": manifest.digest,
        "source": manifest.source,
        "pixels (width × height)": _size_quantiles(uri, manifest),
        "classes": manifest.class_counts,
    }


def _size_quantiles(uri: str, manifest: Manifest) -> dict[str, str]:
    """Return quantiles of width and of height, each by itself, of the pictures in a few shards."""
    step = -(-len(manifest.shards) // SAMPLED_SHARDS)
    tables = []
    for shard in manifest.shards[::step] if step else []:
        shard_uri = storage.join(uri, shard.path)
        with storage.open_file(shard_uri) as file:
            tables.append(pq.read_table(file, columns=["width", "height"]))
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    levels = list(QUANTILES.values())
    widths, heights = (np.quantile(table[name].to_numpy(), levels, method="nearest") for name in ("width", "height"))
    return {name: f"{width} × {height}" for name, width, height in zip(QUANTILES, widths, heights, strict=True)}


def verify(uri: str) -> list[str]:
    """Read every shard and compare it with the manifest; return one line for each that is missing or damaged.

    Those that are missing or of another size are told without being read.
    """
    sizes = dict(storage.list_files_with_sizes(uri))
    root = storage.normalize_uri(uri)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = pool.map(lambda shard: _problem(storage.join(root, shard.path), shard, sizes), load_manifest(uri).shards)
        return [problem for problem in found if problem is not None]


def _problem(shard_uri: str, shard: ShardInfo, sizes: dict[str, int]) -> str | None:
    remedy = "delete the data set and ingest again"
    if shard_uri not in sizes:
        return f"'{shard_uri}': missing; {remedy}"
    if sizes[shard_uri] != shard.size_bytes:
        return f"'{shard_uri}': {sizes[shard_uri]} bytes instead of {shard.size_bytes}; {remedy}"
    try:
        data = storage.read_bytes(shard_uri)
    except StorageError as error:
        return str(error)
    return None if storage.sha256_hex(data) == shard.sha256 else f"'{shard_uri}': its checksum is not the manifest's; {remedy}"


def example_pictures(uri: str, preprocessing: Preprocessing, count: int) -> NDArray[np.uint8]:
    """Return the first pictures of the data set at `uri` as they are brought to a model: uint8 [N, S, S, 3], N at most `count`.

    Pictures are shuffled over the shards, so that they are a random sample. Those that cannot be decoded are left out.
    """
    found: list[NDArray[np.uint8]] = []
    manifest = load_manifest(uri)
    groups = ((shard, group) for shard in manifest.shards for group in range(len(shard.row_group_rows)))
    while len(found) < count and (here := next(groups, None)) is not None:
        shard, group = here
        table = read_row_groups(uri, shard.path, [group])[0]
        for data in table["image"].to_pylist()[: count - len(found)]:
            with suppress(DataError):
                found.append(eval_image(decode_trusted(data), preprocessing))
    size = preprocessing.image_size
    return np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)


def contact_sheet(uri: str, path: str | Path, columns: int = 10, max_classes: int = 40) -> None:
    """Write a PNG with one row per class (the first `max_classes`) of the first `columns` pictures found of it."""
    from PIL import Image, ImageDraw

    manifest = load_manifest(uri)
    classes = manifest.classes[:max_classes]
    wanted = {label: min(columns, manifest.class_counts[name]) for label, name in enumerate(classes)}
    tiles: dict[int, list[Any]] = {label: [] for label in wanted}
    tile = Preprocessing(image_size=TILE, eval_resize=TILE)
    for shard in manifest.shards:
        for group in range(len(shard.row_group_rows)):
            if all(len(tiles[label]) == count for label, count in wanted.items()):
                break
            table = read_row_groups(uri, shard.path, [group])[0]
            for label, data in zip(table["label"].to_pylist(), table["image"].to_pylist(), strict=True):
                if len(tiles.get(label, ())) < wanted.get(label, 0):
                    tiles[label].append(_tile(data, tile))
    margin = 8 + 7 * max(len(name) for name in classes)
    sheet = Image.new("RGB", (margin + columns * TILE, len(classes) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(classes):
        draw.text((4, row * TILE + TILE // 2), name, fill="black")
        for column, pixels in enumerate(tiles[row]):
            sheet.paste(Image.fromarray(pixels), (margin + column * TILE, row * TILE))
    encoded = io.BytesIO()
    sheet.save(encoded, format="PNG")
    storage.write_bytes(str(path), encoded.getvalue())


def _tile(data: bytes, tile: Preprocessing) -> Any:
    try:
        return eval_image(decode_trusted(data), tile)
    except DataError:
        return np.full((TILE, TILE, 3), (255, 0, 255), np.uint8)
