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
NOTES_FOLDER = "_parts"


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
    manifests: dict[str, Manifest | None] = {
        split: _existing(uri, _plan_digest(parts[split], description)) for split, uri in targets.items()
    }
    missing = [split for split, manifest in manifests.items() if manifest is None]
    shards = _write_shards(listing.classes, {s: parts[s] for s in missing}, targets, config, description, progress)
    # Nothing is published before all splits are written and known to be good enough.
    _check_refused(target, shards, len(listing.items), config.max_refused_fraction)
    for split in missing:
        digest = _plan_digest(parts[split], description)
        manifests[split] = _publish(targets[split], split, listing.classes, shards[split], json.loads(description) | {"plan": digest})
    return {split: manifest for split, manifest in manifests.items() if manifest is not None}


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


def _write_shards(
    classes: list[str],
    parts: dict[str, list[Item]],
    targets: dict[str, str],
    config: IngestConfig,
    description: str,
    progress: Callable[[int, int], None],
) -> dict[str, list[_Shard]]:
    """Write all shards of all parts, as many at a time as the cluster has CPUs for; return them in their order."""
    write = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_write_shard)
    places: dict[ray.ObjectRef, tuple[str, int]] = {}
    written: dict[str, dict[int, _Shard]] = {split: {} for split in parts}
    for split, items in parts.items():
        notes = _notes_uri(targets[split], _plan_digest(items, description))
        for index, plan in enumerate(_plan_shards(items, config.shard_bytes)):
            places[write.remote(plan, targets[split], notes, classes, config)] = (split, index)
    total = sum(len(items) for items in parts.values())
    done, pending = 0, list(places)
    while pending:
        ready, pending = ray.wait(pending)
        for ref in ready:
            split, index = places[ref]
            shard = written[split][index] = ray.get(ref)
            done += shard.num_items
            progress(done, total)
    return {split: [shards[index] for index in sorted(shards)] for split, shards in written.items()}


def _publish(uri: str, split: str, classes: list[str], shards: list[_Shard], source: dict[str, Any]) -> Manifest:
    refused = [image for shard in shards for image in shard.refused]
    manifest = Manifest(
        classes=classes,
        shards=[shard.info for shard in shards if shard.info is not None],
        source=json.dumps(source),
        split=split,
        refused=refused[:MAX_REFUSED_NAMED],
        num_refused=len(refused),
    )
    if not storage.write_bytes_if_absent(manifest_uri(uri), manifest.model_dump_json(indent=1).encode()):
        raise DataError(f"'{uri}': another ingest published there at the same time; look at it with `eagleray data show {uri}`")
    storage.delete_tree(storage.join(uri, NOTES_FOLDER))
    return manifest


def _notes_uri(uri: str, plan_digest: str) -> str:
    return storage.join(uri, NOTES_FOLDER, plan_digest[:16])


def _check_refused(target: str, shards: dict[str, list[_Shard]], total: int, limit: float) -> None:
    refused = [image for part in shards.values() for shard in part for image in shard.refused]
    if len(refused) <= limit * total:
        return
    named = "; ".join(f"{image.key}: {image.reason}" for image in refused[:3])
    raise DataError(
        f"{len(refused)} of {total} pictures cannot be read, more than the limit of {limit:.2%} "
        f"(ingest.max_refused_fraction, --max-refused); nothing was published to '{target}'; the first: {named}"
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
