"""The stream on a real cluster: complete, in the planned order for any number of workers, and robust."""

from __future__ import annotations

import hashlib
import io
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import S3Store
from PIL import Image

from eagleray import storage
from eagleray.cluster.connect import Connection
from eagleray.config.schema import AugmentConfig
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, encode_shard, load_manifest, manifest_uri
from eagleray.data.stream import Batch, BatchStream, DecodeResources
from eagleray.data.transforms import Preprocessing
from eagleray.data.window import WindowDecoder
from eagleray.errors import DataError

RESOURCES = DecodeResources(tasks=1, cpus=0.25)
NUM_ROWS = 150


def picture(index: int) -> bytes:
    """A plain picture whose colour is its number."""
    data = io.BytesIO()
    Image.new("RGB", (12, 12), (index, 255 - index, 7)).save(data, format="PNG")
    return data.getvalue()


def write_dataset(uri: str, damaged: int | None = None) -> Manifest:
    rows = [{"key": f"{i:04d}.png", "image": picture(i), "label": i % 3, "width": 12, "height": 12} for i in range(NUM_ROWS)]
    if damaged is not None:
        rows[damaged]["image"] = bytes(len(rows[damaged]["image"]))  # of the same size, so that the shards are cut alike
    shards = []
    for number, start in enumerate(range(0, NUM_ROWS, 60)):
        data, info = encode_shard(f"shard-{number:05d}.parquet", rows[start : start + 60], 1500, ["a", "b", "c"])
        storage.write_bytes(storage.join(uri, info.path), data)
        shards.append(info)
    manifest = Manifest(classes=["a", "b", "c"], shards=shards, source="test")
    storage.write_bytes(manifest_uri(uri), manifest.model_dump_json().encode())
    return manifest


def stream_of(
    uri: str, rank: int = 0, world_size: int = 1, seed: int | None = 1, resources: DecodeResources | None = RESOURCES
) -> BatchStream:
    plan = EpochPlan.of(load_manifest(uri), global_batch_size=16, lanes=4, window_size=48, seed=seed)
    augment = None if seed is None else AugmentConfig(crop_scale=(0.5, 1.0))
    return BatchStream(WindowDecoder((uri,), plan, Preprocessing(image_size=8, eval_resize=8), augment), rank, world_size, resources)


def epochs_of(stream: BatchStream, last_epoch: int = 2, first_step: int = 0) -> list[list[Batch]]:
    return [list(batches) for batches in stream.epochs(0, last_epoch, first_step)]


def digest(ranks: list[list[list[Batch]]]) -> str:
    """Hash over the ordered sample ids of each global batch, put together from the ranks' batches."""
    result = hashlib.sha256()
    for epoch in zip(*ranks, strict=True):
        for step in zip(*epoch, strict=True):
            result.update(np.concatenate([batch.sample_ids for batch in step]).tobytes())
    return result.hexdigest()


@pytest.fixture(params=["local", "s3"])
def dataset_uri(request: pytest.FixtureRequest, ray_cluster: Connection, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "data")
    store: S3Store = request.getfixturevalue("s3_store")
    return storage.join(store.bucket_uri, "data")


def test_every_picture_comes_once_an_epoch_with_its_own_label(dataset_uri: str) -> None:
    write_dataset(dataset_uri)
    for epoch in epochs_of(stream_of(dataset_uri)):
        ids = np.concatenate([batch.sample_ids[batch.is_valid.numpy()] for batch in epoch])
        assert sorted(ids) == list(range(NUM_ROWS))
        assert {len(batch.sample_ids) for batch in epoch} == {16}
        for batch in epoch:
            assert (batch.targets.numpy() == batch.sample_ids % 3).all()
            assert (batch.images[:, 4, 4, 0].numpy() == batch.sample_ids).all()


def test_the_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(ray_cluster: Connection, tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    write_dataset(uri)
    whole = epochs_of(stream_of(uri))
    two, four = ([epochs_of(stream_of(uri, rank, size)) for rank in range(size)] for size in (2, 4))
    assert digest([whole]) == digest(two) == digest(four)
    for epoch, parts in zip(whole, zip(*two, strict=True), strict=True):
        for batch, left, right in zip(epoch, *parts, strict=True):
            assert (batch.images.numpy() == np.concatenate([left.images.numpy(), right.images.numpy()])).all()

    resumed = [epochs_of(stream_of(uri, rank, 2), first_step=5) for rank in range(2)]
    assert digest(resumed) == digest([[whole[0][5:], whole[1]]])


def test_a_worker_that_decodes_by_itself_sees_the_same_batches(dataset_uri: str) -> None:
    write_dataset(dataset_uri)
    for first_step in (0, 5):
        by_tasks, by_worker = (
            epochs_of(stream_of(dataset_uri, 1, 2, resources=resources), first_step=first_step) for resources in (RESOURCES, None)
        )
        assert [len(epoch) for epoch in by_worker] == [10 - first_step, 10]
        for one, other in zip(chain.from_iterable(by_tasks), chain.from_iterable(by_worker), strict=True):
            for name in ("images", "targets", "is_valid", "sample_ids", "is_bad"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_evaluation_goes_through_the_whole_split_in_order(ray_cluster: Connection, tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    write_dataset(uri)
    first, second = epochs_of(stream_of(uri, seed=None))
    assert (np.concatenate([batch.images.numpy() for batch in first]) == np.concatenate([batch.images.numpy() for batch in second])).all()
    assert sum(int(batch.is_valid.sum()) for batch in first) == NUM_ROWS


def test_a_damaged_picture_loses_its_vote_but_moves_nobody(ray_cluster: Connection, tmp_path: Path) -> None:
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    write_dataset(good)
    write_dataset(bad, damaged=77)
    healthy, damaged = epochs_of(stream_of(good), 1), epochs_of(stream_of(bad), 1)
    assert digest([healthy]) == digest([damaged])
    quarantined = np.concatenate([batch.sample_ids[batch.is_bad] for batch in damaged[0]])
    assert list(quarantined) == [77]
    assert sum(int(batch.is_valid.sum()) for batch in damaged[0]) == NUM_ROWS - 1


@pytest.mark.parametrize("resources", [RESOURCES, None])
def test_a_missing_shard_is_named(ray_cluster: Connection, tmp_path: Path, resources: DecodeResources | None) -> None:
    uri = str(tmp_path / "data")
    write_dataset(uri)
    (tmp_path / "data" / "shard-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00001.parquet.*missing though the manifest lists it"):
        epochs_of(stream_of(uri, resources=resources), 1)
