"""What the stream and the storage under it do when a real store misbehaves (see s3_proxy)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import S3Store
from integration.s3_proxy import Fault
from PIL import Image
from test_stream import NUM_ROWS, epochs_of, picture, stream_of, write_dataset

from eagleray import storage
from eagleray.cluster.connect import Connection
from eagleray.cluster.local_s3 import LocalS3
from eagleray.config.schema import AugmentConfig, DataConfig
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, ReadOptions, encode_shard, load_manifest, read_row_groups
from eagleray.data.transforms import Preprocessing
from eagleray.data.window import WindowDecoder
from eagleray.errors import DataError, StorageError

SHARD = "shard-00001.parquet"


@pytest.fixture
def dataset(s3_store: S3Store) -> tuple[str, Manifest]:
    uri = storage.join(s3_store.bucket_uri, "data")
    return uri, write_dataset(uri)


def read_all(uri: str, manifest: Manifest, **config: Any) -> list[bytes]:
    """Return all pictures, read as the stream's tasks read them."""
    options = ReadOptions.of(manifest, DataConfig(train=uri, val=uri, **config))
    tables = [
        table for shard in manifest.shards for table in read_row_groups(uri, shard.path, list(range(len(shard.row_group_rows))), options)
    ]
    return list(pa.concat_tables(tables)["image"].to_pylist())


PICTURES = [picture(i) for i in range(NUM_ROWS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("slow_down", "shard", fraction=0.4),
        Fault("internal_error", "shard", fraction=0.4),
        Fault("drop", "shard", fraction=0.4),
        Fault("lose_answer", "shard", fraction=0.4),
        Fault("slow", "shard", bytes_per_s=20_000),
        Fault("truncate", "shard", times=1, after=1),
        Fault("flip", "shard", times=1, after=1),
    ],
    ids=lambda fault: fault.kind,
)
def test_every_picture_arrives_once_whatever_happens_on_the_way(
    ray_cluster: Connection, s3_store: S3Store, dataset: tuple[str, Manifest], fault: Fault
) -> None:
    uri, _ = dataset
    stream = stream_of(uri)
    with s3_store.proxy.fault(fault):
        epochs = epochs_of(stream)
    assert fault.hits > 0
    for epoch in epochs:
        assert sorted(np.concatenate([batch.sample_ids[batch.is_valid.numpy()] for batch in epoch])) == list(range(NUM_ROWS))
        for batch in epoch:
            assert (batch.images[:, 4, 4, 0].numpy() == batch.sample_ids).all()


@pytest.fixture
def second_store(s3_store: S3Store, tmp_path: Path) -> Iterator[LocalS3]:
    """A store of the test's own behind the proxy; it knows the session's keys besides its own."""

    class SecondStore(LocalS3):
        def _identities(self) -> dict[str, Any]:
            identities = super()._identities()
            identities["identities"][0]["credentials"].append(
                {"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
            )
            return identities

    with SecondStore(tmp_path / "s3") as store:
        s3_store.proxy.upstream = store.endpoint
        yield store
    s3_store.proxy.upstream = s3_store.server.endpoint


@pytest.mark.slow
def test_the_stream_outlives_an_outage_of_the_store(ray_cluster: Connection, s3_store: S3Store, second_store: LocalS3) -> None:
    uri = storage.join(second_store.create_bucket("outage"), "data")
    write_dataset(uri)
    stream = stream_of(uri)

    def outage() -> None:
        second_store.kill()
        time.sleep(10)
        second_store.start()

    thread = threading.Thread(target=outage)
    ids = []
    # Slow enough that most is still to be read when the store goes.
    with s3_store.proxy.fault(Fault("slow", "shard", bytes_per_s=15_000)):
        for batches in stream.epochs(0, 3):
            for batch in batches:
                ids.append(batch.sample_ids[batch.is_valid.numpy()])
                if thread.ident is None:
                    thread.start()
    thread.join()
    assert s3_store.proxy.unanswered > 0
    assert sorted(np.concatenate(ids)) == sorted(list(range(NUM_ROWS)) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mute", "stall"])
def test_silence_ends_in_an_error_in_bounded_time(
    s3_store: S3Store, dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    uri, manifest = dataset
    monkeypatch.setattr(storage, "SILENCE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(storage, "RETRY_FOR_S", 2.0)
    start = time.monotonic()
    with (
        s3_store.proxy.fault(Fault(kind, "shard")),
        pytest.raises(StorageError, match=r"shard-00000.parquet.*does not answer as it should"),
    ):
        read_all(uri, manifest)
    # The last try begins within RETRY_FOR_S; curl averages over some seconds before it calls a transfer silent.
    assert time.monotonic() - start < 2 + storage.REQUEST_TRIES * (1 + 7) + 5
    assert read_all(uri, manifest) == PICTURES


def test_a_store_that_stays_unwell_is_named(s3_store: S3Store, dataset: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    uri, manifest = dataset
    monkeypatch.setattr(storage, "RETRY_FOR_S", 1.0)
    with s3_store.proxy.fault(Fault("slow_down", SHARD)), pytest.raises(StorageError, match=rf"{SHARD}.*does not answer as it should"):
        read_all(uri, manifest)


def test_what_does_not_pass_is_not_tried_again(s3_store: S3Store, dataset: tuple[str, Manifest]) -> None:
    uri, manifest = dataset
    with s3_store.proxy.fault(Fault("denied", SHARD)) as fault, pytest.raises(DataError, match=rf"{SHARD}.*access denied"):
        read_all(uri, manifest)
    assert fault.hits <= 2


def test_a_data_set_that_is_not_there_is_told_from_a_bucket_that_is_not(s3_store: S3Store) -> None:
    with pytest.raises(DataError, match=r"no data set there.*eagleray ingest SOURCE"):
        load_manifest(storage.join(s3_store.bucket_uri, "no-such-data"))
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        load_manifest("s3://no-such-bucket/data")


@pytest.mark.parametrize("config", [{}, {"verify_checksums": True}], ids=["pages", "sha256"])
def test_a_damaged_shard_is_named(dataset: tuple[str, Manifest], config: dict[str, Any]) -> None:
    uri, manifest = dataset
    data = storage.read_bytes(storage.join(uri, SHARD))
    middle = len(data) // 2
    rows = [{"key": "x", "image": b"x", "label": 0, "width": 1, "height": 1}]
    for damaged in (
        data[:middle],
        b"",
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        encode_shard(SHARD, rows, 1000, ["a"])[0],
    ):
        storage.write_bytes(storage.join(uri, SHARD), damaged)
        with pytest.raises(DataError, match=rf"{SHARD}.*cannot be read.*eagleray data verify {uri}"):
            read_all(uri, manifest, **config)
    storage.delete_file(storage.join(uri, SHARD))
    with pytest.raises(DataError, match=rf"{SHARD}.*missing though the manifest lists it"):
        read_all(uri, manifest, **config)
    storage.write_bytes(storage.join(uri, SHARD), data)
    assert read_all(uri, manifest, **config) == PICTURES


def test_another_shard_of_the_same_size_needs_its_checksum_compared(dataset: tuple[str, Manifest]) -> None:
    uri, manifest = dataset
    rows = [{"key": f"{i:04d}.png", "image": picture(i), "label": i % 3, "width": 12, "height": 12} for i in range(60, 120)]
    for row in rows:
        row["image"], rows[0]["image"] = rows[0]["image"], row["image"]
        other, info = encode_shard(SHARD, rows, 1500, ["a", "b", "c"])
        # Checksums are stored in as few bytes as they need.
        if row is not rows[0] and info.size_bytes == manifest.shards[1].size_bytes:
            break
    else:
        pytest.fail("no order of the pictures gives the same size")
    storage.write_bytes(storage.join(uri, SHARD), other)
    with pytest.raises(DataError, match=rf"{SHARD}.*sha256"):
        read_all(uri, manifest, verify_checksums=True)


def test_no_flipped_byte_of_a_shard_gives_other_pictures(tmp_path: Path) -> None:
    rows = [{"key": f"{i}", "image": bytes([i]) * 40, "label": i, "width": 9, "height": 9} for i in range(6)]
    data, info = encode_shard("shard", rows, 100, [str(i) for i in range(6)])
    groups = list(range(len(info.row_group_rows)))
    refused = 0
    for place in range(0, len(data), 3):
        (tmp_path / f"{place}").write_bytes(data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :])
        try:
            tables = read_row_groups(str(tmp_path), f"{place}", groups)
            assert pa.concat_tables(tables).to_pylist() == rows
        except DataError:
            refused += 1
    assert refused > len(data) // 3 / 2


@pytest.fixture
def credentials_file(second_store: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A credentials file in use instead of the environment's keys, with the second store's; and the session's keys."""
    path = tmp_path / "credentials"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    session = {name: os.environ[name] for name in names}
    write_credentials(path, second_store.environment())
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    yield path, session


def write_credentials(path: Path, keys: dict[str, str]) -> None:
    path.write_text(
        f"[default]\naws_access_key_id = {keys['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {keys['AWS_SECRET_ACCESS_KEY']}\n"
    )


@pytest.mark.slow
def test_expired_credentials_are_named_and_new_ones_are_picked_up(
    s3_store: S3Store, second_store: LocalS3, credentials_file: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other_keys = credentials_file
    uri = storage.join(second_store.create_bucket("expiry"), "data")
    manifest = write_dataset(uri)
    first, *others = list(range(len(manifest.shards[0].row_group_rows)))
    before = read_row_groups(uri, manifest.shards[0].path, [first])
    expiry = Fault("expired", access_key=second_store.environment()["AWS_ACCESS_KEY_ID"])
    with s3_store.proxy.fault(expiry):
        monkeypatch.setattr(storage, "RENEW_FOR_S", 1.0)
        with pytest.raises(StorageError, match=r"shard-00000.parquet.*credentials as expired; renew them"):
            read_row_groups(uri, manifest.shards[0].path, others)

        monkeypatch.setattr(storage, "RENEW_FOR_S", 30.0)
        timer = threading.Timer(1.0, write_credentials, (path, other_keys))
        timer.start()
        after = read_row_groups(uri, manifest.shards[0].path, others)
        timer.join()
    assert pa.concat_tables([*before, *after])["image"].to_pylist() == PICTURES[: manifest.shards[0].rows]


def test_a_cached_data_set_is_read_once_from_the_store(s3_store: S3Store, dataset: tuple[str, Manifest], tmp_path: Path) -> None:
    uri, manifest = dataset
    cache_dir = tmp_path / "cache"
    assert read_all(uri, manifest, cache_dir=str(cache_dir)) == PICTURES
    requests = s3_store.proxy.requests
    assert read_all(uri, manifest, cache_dir=str(cache_dir)) == PICTURES
    assert s3_store.proxy.requests == requests

    kept = sorted(cache_dir.glob("??/*.parquet"))
    for place, damage in ((kept[0], lambda data: data[:-20]), (kept[1], lambda data: data[:80] + b"?" + data[81:])):
        place.write_bytes(damage(place.read_bytes()))
    assert read_all(uri, manifest, cache_dir=str(cache_dir)) == PICTURES
    assert s3_store.proxy.requests > requests


def test_a_cache_that_cannot_be_written_is_told_once(dataset: tuple[str, Manifest]) -> None:
    uri, manifest = dataset
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert read_all(uri, manifest, cache_dir="/proc/nowhere") == PICTURES
    assert ["reading from S3 instead" in str(warning.message) for warning in caught] == [True]


def test_local_data_sets_need_no_cache(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    manifest = write_dataset(uri)
    assert read_all(uri, manifest, cache_dir=str(tmp_path / "cache")) == PICTURES
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["slow_down", "lose_answer"])
def test_a_write_survives_what_passes(s3_store: S3Store, kind: Any) -> None:
    uri = storage.join(s3_store.bucket_uri, "object")
    with s3_store.proxy.fault(Fault(kind, "object", method="PUT", times=storage.REQUEST_TRIES + 1)) as fault:
        storage.write_bytes(uri, b"one")
    assert fault.hits == storage.REQUEST_TRIES + 1
    assert storage.read_bytes(uri) == b"one"


@pytest.mark.parametrize("kind", ["slow_down", "lose_answer"])
@pytest.mark.parametrize("times", [1, storage.REQUEST_TRIES + 1])
def test_a_conditional_write_whose_answer_was_lost_knows_that_it_won(s3_store: S3Store, kind: Any, times: int) -> None:
    uri = storage.join(s3_store.bucket_uri, "claim")
    with s3_store.proxy.fault(Fault(kind, "claim", method="PUT", times=times)) as fault:
        assert storage.write_bytes_if_absent(uri, b"same")
    assert fault.hits == times
    # The same bytes from another writer are still another's.
    with s3_store.proxy.fault(Fault(kind, "claim", method="PUT", times=times)):
        assert not storage.write_bytes_if_absent(uri, b"same")


def damaged_jpeg() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (12, 12), "red").save(data, format="JPEG")
    return data.getvalue()[:-40]


def bomb() -> bytes:
    """A PNG of 65 million pixels, 195 MB once decoded, in some 200 kB."""
    data = io.BytesIO()
    Image.new("RGB", (65_000, 1_000)).save(data, format="PNG")
    return data.getvalue()


def quarantined(root: Path, image: bytes, augment: bool) -> list[int]:
    """Put `image` into a shard whose columns say 12x12 pixels; return the ids of the pictures found bad."""
    rows = [{"key": f"{i}", "image": image if i == 5 else picture(i), "label": 0, "width": 12, "height": 12} for i in range(16)]
    data, info = encode_shard("shard-00000.parquet", rows, 1500, ["a"])
    storage.write_bytes(storage.join(str(root), info.path), data)
    plan = EpochPlan.of(Manifest(classes=["a"], shards=[info], source="test"), 16, 4, 16, seed=1)
    decoder = WindowDecoder((str(root),), plan, Preprocessing(image_size=8, eval_resize=8), AugmentConfig() if augment else None)
    return [i for block in decoder.blocks(0, 0, 0, 1) for i in block["sample_id"][block["is_bad"]].tolist()]


@pytest.mark.parametrize("augment", [True, False], ids=["train", "eval"])
def test_a_damaged_jpeg_in_a_good_shard_is_quarantined(tmp_path: Path, augment: bool) -> None:
    assert quarantined(tmp_path, damaged_jpeg(), augment) == [5]


@pytest.mark.slow
@pytest.mark.parametrize("augment", [True, False], ids=["train", "eval"])
def test_a_decompression_bomb_in_a_shard_is_quarantined_undecoded(tmp_path: Path, augment: bool) -> None:
    code = """
import resource, sys, test_faults as t
from pathlib import Path

def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

root, augment, image = Path(sys.argv[1]), sys.argv[2] == "1", t.bomb()
t.quarantined(root / "good", t.picture(1), augment)
before = peak_kb()
print(t.quarantined(root / "bomb", image, augment), peak_kb() - before < 100_000)
"""
    run = [sys.executable, "-c", code, str(tmp_path), str(int(augment))]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    out = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    assert out.stdout.strip() == "[5] True"
