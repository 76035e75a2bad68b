"""Sources become shards and a manifest: one Ray task per shard, published all at once.

What goes into which shard is planned from the listing and the seed alone, so that a second run, or one
that goes on after a kill, makes the same shards. Each finished shard leaves a note under `_parts/`; the
manifest is written last, by conditional write, and the notes are removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import ray

from eagleray import storage
from eagleray.config.schema import IngestConfig
from eagleray.data.decode import decode_rgb
from eagleray.data.shards import Manifest, RefusedImage, ShardInfo, encode_shard, load_manifest, manifest_uri
from eagleray.data.sources import Item, Listing, open_source
from eagleray.errors import DataError, StorageError

MAX_REFUSED_NAMED = 1000
TASK_CPUS = 0.5


@dataclass(frozen=True)
class _ShardPlan:
    path: str
    items: list[Item]


@dataclass(frozen=True)
class _Shard:
    """What a task made: no info where every picture of the shard was refused."""

    info: ShardInfo | None
    refused: list[RefusedImage]
    num_items: int


def ingest(
    source: str, target: str, config: IngestConfig, *, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Manifest]:
    """Write the pictures of `source` under `target`; Ray must be connected.

    Args:
        source: see `open_source`.
        target: the data set's URI; with `config.split`, one data set per split is made below it.
        progress: called with (pictures done, pictures in all).

    Returns:
        Split name → manifest (`all` without a split). A target that already holds just this is left as it is.

    Raises:
        DataError: nothing usable in the source, too many unreadable pictures, or the target holds something else.
        StorageError: the target cannot be written.
    """
    listing = open_source(source).list_items()
    parts = _split(listing, config.split, seed)
    targets = {split: target if split == "all" else storage.join(target, split) for split in parts}
    description = json.dumps({"source": source, "seed": seed, "settings": config.model_dump(mode="json")}, sort_keys=True)
    existing = {split: _existing(uri, _plan_digest(parts[split], description)) for split, uri in targets.items()}
    done = 0
    manifests: dict[str, Manifest] = {}
    for split, items in parts.items():
        manifest = existing[split]
        if manifest is None:
            report = partial(_report, progress, done, len(listing.items))
            manifest = _ingest_split(listing.classes, items, targets[split], split, config, description, report)
        manifests[split] = manifest
        done += len(items)
        progress(done, len(listing.items))
    return manifests


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _split(listing: Listing, fractions: dict[str, float], seed: int) -> dict[str, list[Item]]:
    """Shuffle by seed and split each class by the fractions; without any, all is one part."""
    rng = np.random.default_rng(seed)
    shuffled = [listing.items[i] for i in rng.permutation(len(listing.items))]
    if not fractions:
        return {"all": shuffled}
    parts: dict[str, list[Item]] = {"train": [], **{name: [] for name in fractions}}
    by_class: dict[int, list[Item]] = {}
    for item in shuffled:
        by_class.setdefault(item.label, []).append(item)
    assigned: dict[str, str] = {}
    for items in by_class.values():
        start = 0
        for name, fraction in fractions.items():
            count = round(fraction * len(items))
            assigned.update({item.key: name for item in items[start : start + count]})
            start += count
    for item in shuffled:
        parts[assigned.get(item.key, "train")].append(item)
    empty = [name for name, items in parts.items() if not items]
    if empty:
        raise DataError(
            f"split '{empty[0]}' would be empty ({len(listing.items)} pictures in all); give it a larger fraction or add pictures"
        )
    return parts


def _plan_digest(items: list[Item], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for item in items:
        digest.update(f"{item.key}\0{item.label}\0{item.size_bytes}\n".encode())
    return digest.hexdigest()


def _existing(uri: str, digest: str) -> Manifest | None:
    if not storage.exists(manifest_uri(uri)):
        return None
    manifest = load_manifest(uri)
    if json.loads(manifest.source).get("plan") != digest:
        raise DataError(f"'{uri}' already holds another data set (other source, split or settings); choose another target or delete it")
    return manifest


def _ingest_split(
    classes: list[str], items: list[Item], uri: str, split: str, config: IngestConfig, description: str, progress: Callable[[int], None]
) -> Manifest:
    digest = _plan_digest(items, description)
    notes = storage.join(uri, "_parts", digest[:16])
    write = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_write_shard)
    plans = _plan_shards(items, config.shard_bytes)
    pending = [write.remote(plan, uri, notes, classes, config) for plan in plans]
    order = {ref: i for i, ref in enumerate(pending)}
    shards: list[_Shard | None] = [None] * len(pending)
    done = 0
    while pending:
        ready, pending = ray.wait(pending)
        for ref in ready:
            shard: _Shard = ray.get(ref)
            shards[order[ref]] = shard
            done += shard.num_items
            progress(done)
    finished = [shard for shard in shards if shard is not None]
    refused = [image for shard in finished for image in shard.refused]
    _check_refused(uri, refused, len(items), config.max_refused_fraction)
    manifest = Manifest(
        classes=classes,
        shards=[shard.info for shard in finished if shard.info is not None],
        source=json.dumps(json.loads(description) | {"plan": digest}),
        split=split,
        refused=refused[:MAX_REFUSED_NAMED],
        num_refused=len(refused),
    )
    if not storage.write_bytes_if_absent(manifest_uri(uri), manifest.model_dump_json(indent=1).encode()):
        raise DataError(f"'{uri}': another ingest published there at the same time; look at it with `eagleray data show {uri}`")
    storage.delete_tree(storage.join(uri, "_parts"))
    return manifest


def _check_refused(uri: str, refused: list[RefusedImage], total: int, limit: float) -> None:
    if len(refused) <= limit * total:
        return
    named = "; ".join(f"{image.key}: {image.reason}" for image in refused[:3])
    raise DataError(
        f"{len(refused)} of {total} pictures cannot be read, more than the limit of {limit:.2%} "
        f"(ingest.max_refused_fraction, --max-refused); nothing was published to '{uri}'; the first: {named}"
    )


def _plan_shards(items: list[Item], shard_bytes: int) -> list[_ShardPlan]:
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.size_bytes
    return [_ShardPlan(f"shard-{i:05d}.parquet", group) for i, group in enumerate(groups)]


def _write_shard(plan: _ShardPlan, uri: str, notes: str, classes: list[str], config: IngestConfig) -> _Shard:
    note = storage.join(notes, f"{plan.path}.json")
    if storage.exists(note):
        kept: dict[str, Any] = json.loads(storage.read_bytes(note))
        info = ShardInfo.model_validate(kept["info"]) if kept["info"] else None
        return _Shard(info, [RefusedImage.model_validate(image) for image in kept["refused"]], len(plan.items))
    rows, refused = [], []
    for item in plan.items:
        try:
            rows.append(_row(item, config))
        except (DataError, StorageError) as error:
            refused.append(RefusedImage(key=item.key, reason=str(error)))
    info = None
    if rows:
        data, info = encode_shard(plan.path, rows, config.row_group_bytes, classes)
        storage.write_bytes(storage.join(uri, plan.path), data)
    record = {"info": info.model_dump() if info else None, "refused": [image.model_dump() for image in refused]}
    storage.write_bytes(note, json.dumps(record).encode())
    return _Shard(info, refused, len(plan.items))


def _row(item: Item, config: IngestConfig) -> dict[str, Any]:
    """Decode the picture once, in full: what is in a shard can be decoded."""
    data = item.read()
    image = decode_rgb(data, config.max_pixels)
    height, width = image.shape[:2]
    if config.max_side is not None and min(height, width) > config.max_side:
        scale = config.max_side / min(height, width)
        width, height = round(width * scale), round(height * scale)
        smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", cv2.cvtColor(smaller, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, config.quality])[1]
        data = encoded.tobytes()
    return {"key": item.key, "image": data, "label": item.label, "width": width, "height": height}
