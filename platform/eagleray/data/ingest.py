"""Sources become shards and a manifest: one Ray task per shard, published all at once.

What goes into which shard is planned from the listing and the seed alone, so that a second run, or one
that goes on after a kill, makes the same shards. Each finished shard leaves a note under `_parts/`; the
manifest is written last, by conditional write, and the notes are removed. Shards carry the plan's digest
in their names: those of another plan are never overwritten.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from eagleray import storage
from eagleray.config.schema import IngestConfig
from eagleray.data.claim import DEAD_AFTER_S, Claim, check_unclaimed, claimed
from eagleray.data.decode import SMALL_BYTES, decode_rgb, encode_raw, is_png, is_raw, without_equal_channels
from eagleray.data.jpeg import START as JPEG_START
from eagleray.data.shards import Manifest, RefusedImage, ShardInfo, encode_shard, load_manifest, manifest_uri
from eagleray.data.sources import Listing, open_source
from eagleray.errors import ConfigError, DataError, EagleRayError

MAX_REFUSED_NAMED = 1000
TASK_CPUS = 0.5
LAST_TASKS_S = 30.0
"""Where a run ends early, it waits so long for the tasks that it has started."""
NOTE_THREADS = 16
NOTES_FOLDER = "_parts"


@dataclass(frozen=True)
class _Part:
    """The plan of one split: the pictures of each of its shards, as rows of the listing."""

    uri: str
    shards: list[NDArray[np.int64]] = field(repr=False)
    digest: str

    @property
    def num_items(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def shard_path(self, index: int) -> str:
        return f"shard-{self.digest[:8]}-{index:05d}.parquet"

    def note_uri(self, index: int) -> str:
        return storage.join(self.uri, NOTES_FOLDER, self.digest[:16], f"{self.shard_path(index)}.json")


@dataclass(frozen=True)
class _Shard:
    """What a task made: no info where every picture of the shard was refused."""

    info: ShardInfo | None
    refused: list[RefusedImage]


def ingest(
    source: str,
    target: str,
    config: IngestConfig,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dead_after_s: float = DEAD_AFTER_S,
) -> dict[str, Manifest]:
    """Write the pictures of `source` under `target`; Ray must be connected.

    Args:
        source: see `open_source`.
        target: the data set's URI; where there are splits, one data set per split is made below it.
        progress: called with (pictures done, pictures in all), first with those that an earlier run had finished.
        dead_after_s: age in seconds from which another writer's claim counts no more.

    Returns:
        Split name → manifest (`all` without splits). A target that already holds just this is left as it is.

    Raises:
        ConfigError: the settings do not fit the source.
        DataError: nothing usable in the source, too many unreadable pictures, the target holds something else, or
            another ingest is writing there.
        StorageError: the source cannot be read or the target cannot be written.
    """
    check_unclaimed(target, dead_after_s)  # the listing may take minutes
    listing = open_source(source, config).list_items()
    # What only decides whether the result is published does not change the plan.
    settings = config.model_dump(mode="json", exclude={"max_refused_fraction"})
    description = {"source": source, "seed": seed, "settings": settings}
    parts = _plan(listing, target, config, seed, json.dumps(description, sort_keys=True))
    manifests = {split: _existing(part) for split, part in parts.items()}
    missing = {split: parts[split] for split, manifest in manifests.items() if manifest is None}
    if missing:
        with claimed(target, dead_after_s) as claim:
            shards = _write_shards(listing, missing, config, claim, progress)
            # Nothing is published before all splits are written and known to be good enough.
            _check_refused(target, shards, sum(part.num_items for part in missing.values()), config.max_refused_fraction)
            claim.check()
            for split, part in missing.items():
                manifests[split] = _publish(part, split, listing.classes, shards[split], description | {"plan": part.digest})
    return {split: manifest for split, manifest in manifests.items() if manifest is not None}


def _plan(listing: Listing, target: str, config: IngestConfig, seed: int, description: str) -> dict[str, _Part]:
    """Decide which pictures go into which shard of which split, in which order.

    Pictures are shuffled over the whole source, so that each row group mixes the classes. Those that can only be
    read together (a Parquet row group) stay together: the chunks are shuffled, and the pictures within a shard.
    """
    rng = np.random.default_rng(seed)
    chunks = listing.items["chunk"].to_numpy()
    mix = rng.permutation(len(chunks))
    order = np.lexsort((mix, rng.permutation(int(chunks.max()) + 1)[chunks]))
    sizes = listing.items["size_bytes"].to_numpy()
    parts = {}
    for split, members in _split(listing, config, mix).items():
        rows = order[members[order]]
        before = np.cumsum(sizes[rows]) - sizes[rows]
        shards = [shard[np.argsort(mix[shard])] for shard in _cut(rows, before, config.shard_bytes)]
        uri = target if split == "all" else storage.join(target, split)
        parts[split] = _Part(uri, shards, _plan_digest(listing, shards, description))
    return parts


def _cut(rows: NDArray[np.int64], before: NDArray[np.int64], shard_bytes: int) -> list[NDArray[np.int64]]:
    """Cut rows into shards; a shard is closed by the picture that brings it to `shard_bytes`. `before`: bytes before each row."""
    starts, start = [], 0
    while start < len(rows):
        starts.append(start)
        start = max(start + 1, int(np.searchsorted(before, before[start] + shard_bytes)))
    return np.split(rows, starts[1:])


def _split(listing: Listing, config: IngestConfig, mix: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Return which pictures belong to each split: bool [N] by name, `all` where there are none."""
    splits = listing.items["split"]
    if config.split_by is not None and config.split_by != "folder":
        splits = _listed_splits(listing.items["key"], config.split_by)
    names = np.array(["all"] * len(splits) if splits.null_count else splits.to_pylist())
    if config.split:
        names = _split_off(listing, names, config.split, mix)
    parts = {name: names == name for name in np.unique(names).tolist()}
    order = ("train", *config.split)
    return dict(sorted(parts.items(), key=lambda part: order.index(part[0]) if part[0] in order else len(order)))


def _split_off(listing: Listing, names: NDArray[np.str_], fractions: dict[str, float], mix: NDArray[np.int64]) -> NDArray[np.str_]:
    """Split each class of `train` (or of all, without splits) by the fractions, in random order; the rest is `train`."""
    own = set(np.unique(names).tolist()) - {"all"}
    if own and "train" not in own:
        raise ConfigError(
            f"ingest.split: the source has the splits {', '.join(sorted(own))} and no 'train' to take fractions from; leave it out"
        )
    if taken := own & fractions.keys():
        raise ConfigError(
            f"ingest.split: the source has a split '{min(taken)}' of its own ({', '.join(sorted(own))}); "
            "give another name to what is split off from its 'train', or leave it out"
        )
    result = names.astype(object)
    result[names == "all"] = "train"
    pool = np.flatnonzero(result == "train")
    pool = pool[np.argsort(mix[pool])]
    labels = listing.items["label"].to_numpy()[pool]
    for label in np.unique(labels):
        rows = pool[labels == label]
        start = 0
        for name, fraction in fractions.items():
            count = round(fraction * len(rows))
            result[rows[start : start + count]] = name
            start += count
    empty = [name for name in ("train", *fractions) if not (result == name).any()]
    if empty:
        raise DataError(f"split '{empty[0]}' would be empty ({len(pool)} pictures in all); give it a larger fraction or add pictures")
    return result.astype(str)


def _listed_splits(keys: pa.ChunkedArray, uri: str) -> pa.Array:
    """Return the split of each key as a CSV file of `key,split` has it."""
    try:
        rows = [row for row in csv.reader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))) if row]
    except UnicodeDecodeError:
        raise ConfigError(f"ingest.split_by '{uri}': not a text file; give 'folder', or a CSV file of lines key,split") from None
    wrong = [row for row in rows if len(row) != 2 or not row[1].strip()]
    if wrong or not rows:
        raise ConfigError(f"ingest.split_by '{uri}': lines are key,split (cat/001.jpg,val), not '{','.join(wrong[0] if wrong else [])}'")
    listed = {key.strip(): split.strip() for key, split in rows if (key, split) != ("key", "split")}
    unknown = set(listed).difference(keys.to_pylist())
    if unknown:
        raise ConfigError(
            f"ingest.split_by '{uri}': {len(unknown)} keys are not in the source; the first: '{min(unknown)}', which has '{keys[0]}'"
        )
    splits = [listed.get(key) for key in keys.to_pylist()]
    if None in splits:
        raise ConfigError(f"ingest.split_by '{uri}': {splits.count(None)} pictures are not in it; the first: '{keys[splits.index(None)]}'")
    return pa.array(splits)


def _plan_digest(listing: Listing, shards: list[NDArray[np.int64]], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for shard in shards:
        items = listing.items.select(["key", "label", "size_bytes"]).take(shard)
        digest.update("\n".join(items["key"].to_pylist()).encode())
        digest.update(items["label"].to_numpy().tobytes() + items["size_bytes"].to_numpy().tobytes())
    return digest.hexdigest()


def _existing(part: _Part) -> Manifest | None:
    if not storage.exists(manifest_uri(part.uri)):
        return None
    manifest = load_manifest(part.uri)
    if json.loads(manifest.source).get("plan") != part.digest:
        raise DataError(
            f"'{part.uri}' already holds another data set (other source, split or settings); choose another target or delete it"
        )
    return manifest


def _write_shards(
    listing: Listing, parts: dict[str, _Part], config: IngestConfig, claim: Claim, progress: Callable[[int, int], None]
) -> dict[str, list[_Shard]]:
    """Write the shards of all parts that are not there yet, as many at a time as the cluster has CPUs for."""
    places = [(split, index) for split, part in parts.items() for index in range(len(part.shards))]
    with ThreadPoolExecutor(NOTE_THREADS) as pool:
        noted = pool.map(lambda place: _read_note(parts[place[0]].note_uri(place[1])), places)
    written = {place: shard for place, shard in zip(places, noted, strict=True) if shard is not None}
    total = sum(part.num_items for part in parts.values())
    done = sum(len(parts[split].shards[index]) for split, index in written)
    progress(done, total)
    write = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_write_shard)
    shared = ray.put(listing)
    waiting = [place for place in reversed(places) if place not in written]
    running: dict[ray.ObjectRef, tuple[str, int]] = {}
    try:
        while waiting or running:
            for _ in range(min(len(waiting), _most_running() - len(running))):
                split, index = waiting.pop()
                part = parts[split]
                task = write.remote(shared, part.shards[index], part.uri, part.shard_path(index), part.note_uri(index), config)
                running[task] = (split, index)
            ready, _ = ray.wait(list(running), timeout=1.0)
            claim.check()
            for ref in ready:
                written[running[ref]] = _result(ref)
                split, index = running.pop(ref)
                done += len(parts[split].shards[index])
                progress(done, total)
    finally:
        # Nothing is written after this. Not `ray.cancel`: a task that ends in that moment makes Ray abort the process.
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=LAST_TASKS_S)
    return {split: [written[split, index] for index in range(len(part.shards))] for split, part in parts.items()}


def _result(ref: ray.ObjectRef) -> _Shard:
    try:
        shard: _Shard = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EagleRayError):
            raise error.cause from None
        raise
    return shard


def _most_running() -> int:
    """Return how many tasks to have at once: a second set waits, so that no CPU does and an autoscaler sees demand."""
    return max(2, 2 * int(ray.cluster_resources().get("CPU", 1) / TASK_CPUS))


def _publish(part: _Part, split: str, classes: list[str], shards: list[_Shard], source: dict[str, Any]) -> Manifest:
    refused = [image for shard in shards for image in shard.refused]
    manifest = Manifest(
        classes=classes,
        shards=[shard.info for shard in shards if shard.info is not None],
        source=json.dumps(source),
        split=split,
        refused=refused[:MAX_REFUSED_NAMED],
        num_refused=len(refused),
    )
    if not storage.write_bytes_if_absent(manifest_uri(part.uri), manifest.model_dump_json(indent=1).encode()):
        raise DataError(f"'{part.uri}': another ingest published there at the same time; look at it with `eagleray data show {part.uri}`")
    storage.delete_tree(storage.join(part.uri, NOTES_FOLDER))
    return manifest


def _check_refused(target: str, shards: dict[str, list[_Shard]], total: int, limit: float) -> None:
    refused = [image for part in shards.values() for shard in part for image in shard.refused]
    if len(refused) <= limit * total:
        return
    named = "; ".join(f"{image.key}: {image.reason}" for image in refused[:3])
    raise DataError(
        f"{len(refused)} of {total} pictures cannot be read, more than the limit of {limit:.2%} "
        f"(ingest.max_refused_fraction, --max-refused); nothing was published to '{target}'; the first: {named}"
    )


def _read_note(uri: str) -> _Shard | None:
    """Return what an earlier run noted of a shard it finished."""
    if not storage.exists(uri):
        return None
    note: dict[str, Any] = json.loads(storage.read_bytes(uri))
    info = ShardInfo.model_validate(note["info"]) if note["info"] else None
    return _Shard(info, [RefusedImage.model_validate(image) for image in note["refused"]])


def _write_shard(listing: Listing, items_of_shard: NDArray[np.int64], uri: str, path: str, note_uri: str, config: IngestConfig) -> _Shard:
    items = listing.items.take(items_of_shard)
    rows: dict[int, dict[str, Any]] = {}
    reasons: dict[int, str] = {}
    for row, data in listing.reader.read(items):
        try:
            if isinstance(data, DataError):
                raise data
            rows[row] = _row(data, config) | {"key": items["key"][row].as_py(), "label": items["label"][row].as_py()}
        except DataError as error:
            reasons[row] = str(error)
    info = None
    if rows:
        encoded, info = encode_shard(path, [rows[row] for row in sorted(rows)], config.row_group_bytes, listing.classes)
        storage.write_bytes(storage.join(uri, path), encoded)
    refused = [RefusedImage(key=items["key"][row].as_py(), reason=reasons[row]) for row in sorted(reasons)]
    note = {"info": info.model_dump() if info else None, "refused": [image.model_dump() for image in refused]}
    storage.write_bytes(note_uri, json.dumps(note).encode())
    return _Shard(info, refused)


def _row(data: bytes, config: IngestConfig) -> dict[str, Any]:
    """Decode the picture once, in full: what is in a shard can be decoded. Tiling JPEGs and unpacking small PNGs change no pixel."""
    image = decode_rgb(data, config.max_pixels, allow_raw=True)
    height, width = image.shape[:2]
    if config.max_side is not None and min(height, width) > config.max_side:
        scale = config.max_side / min(height, width)
        width, height = round(width * scale), round(height * scale)
        smaller: Any = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        data = encode_raw(smaller) if is_raw(data) else _encode_jpeg(smaller, config.quality)
    if data[:2] == JPEG_START:
        from eagleray.data.tiling import tile  # imports Numba

        data = tile(data)
    elif is_png(data) and len(raw := encode_raw(without_equal_channels(image))) <= SMALL_BYTES:
        data = raw
    return {"image": data, "width": width, "height": height}


def _encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()
