"""Looking at a data set: what it holds, what it looks like, whether it is whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from eagleray import storage
from eagleray.data.decode import decode_trusted
from eagleray.data.shards import load_manifest, read_row_groups
from eagleray.data.transforms import Preprocessing, eval_image
from eagleray.errors import DataError, StorageError

TILE = 96
"""Side of a picture on the contact sheet, in pixels."""


def describe(uri: str) -> dict[str, Any]:
    """Return what the manifest at `uri` says: split, pictures, classes with counts, shards, bytes, refused pictures."""
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
        "classes": manifest.class_counts,
    }


def verify(uri: str) -> list[str]:
    """Read every shard and compare it with the manifest; return one line for each that is missing or damaged."""
    problems = []
    for shard in load_manifest(uri).shards:
        shard_uri = storage.join(uri, shard.path)
        try:
            data = storage.read_bytes(shard_uri)
        except StorageError as error:
            problems.append(str(error))
            continue
        if storage.sha256_hex(data) != shard.sha256:
            problems.append(
                f"'{shard_uri}': {len(data)} bytes do not match the manifest's checksum ({shard.size_bytes} bytes); ingest again"
            )
    return problems


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
