"""Pictures become shards: complete, once, whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import S3Store, require_debian_file
from PIL import Image
from shards_for_tests import write_digit_shards
from sources_for_tests import (
    LABELS,
    encode,
    write_cifar,
    write_csv,
    write_folder,
    write_imagenet,
    write_parquet,
    write_webdataset,
)

from eagleray import api, storage
from eagleray.cluster.connect import Connection
from eagleray.config.load import build_section
from eagleray.config.schema import IngestConfig
from eagleray.data.claim import CLAIM_NAME, claimed
from eagleray.data.decode import decode_rgb, decode_trusted
from eagleray.data.ingest import ingest as run_ingest
from eagleray.data.inspection import example_pictures
from eagleray.data.shards import Manifest, load_manifest, read_row_groups
from eagleray.data.transforms import Preprocessing, eval_image
from eagleray.errors import ConfigError, DataError, StorageError

SMALL_SHARDS = {"shard_bytes": 2_000, "row_group_bytes": 1_000}


def write_pictures(folder: Path, per_class: int = 20) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            color = (100 * label, index, 50)
            Image.new("RGB", (20 + index, 16), color).save(folder / name / f"{index:03d}.{'png' if index % 2 else 'jpg'}")
    return folder


def keys_of(uri: str, manifest: Manifest) -> list[str]:
    tables = [table for shard in manifest.shards for table in read_row_groups(uri, shard.path, list(range(len(shard.row_group_rows))))]
    return [key for table in tables for key in table["key"].to_pylist()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.fixture(params=["local", "s3"])
def target(request: pytest.FixtureRequest, ray_cluster: Connection, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "shards")
    store: S3Store = request.getfixturevalue("s3_store")
    return storage.join(store.bucket_uri, "shards")


def test_every_picture_arrives_once_with_its_label_and_size(pictures: Path, target: str) -> None:
    done: list[tuple[int, int]] = []
    manifest = api.ingest(str(pictures), target, IngestConfig(**SMALL_SHARDS), on_progress=lambda n, total: done.append((n, total)))["all"]
    assert manifest == load_manifest(target)
    assert manifest.classes == ["cat", "dog"] and manifest.class_counts == {"cat": 20, "dog": 20}
    assert len(manifest.shards) > 1
    assert done[-1] == (40, 40)
    assert len(keys_of(target, manifest)) == len(set(keys_of(target, manifest))) == 40
    row = read_row_groups(target, manifest.shards[0].path, [0])[0].to_pylist()[0]
    assert row["image"] == (pictures / row["key"]).read_bytes()
    assert manifest.classes[row["label"]] == row["key"].split("/")[0]
    assert (row["height"], row["width"]) == decode_rgb(row["image"]).shape[:2]
    assert api.verify_data(target) == []
    assert not [name for name in storage.list_files(target) if "_parts" in name]


def test_a_second_ingest_of_the_same_does_nothing_and_of_another_is_refused(
    pictures: Path, ray_cluster: Connection, tmp_path: Path
) -> None:
    target = str(tmp_path / "shards")
    first = api.ingest(str(pictures), target)["all"]
    shard = tmp_path / "shards" / first.shards[0].path
    written = shard.stat().st_mtime_ns
    assert api.ingest(str(pictures), target)["all"] == first
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="already holds another data set"):
        api.ingest(str(pictures), target, seed=1)


def test_a_split_is_stratified_and_depends_on_the_seed_alone(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    config = IngestConfig(split={"val": 0.25, "test": 0.1})
    first = api.ingest(str(pictures), str(tmp_path / "a"), config)
    second = api.ingest(str(pictures), str(tmp_path / "b"), config)
    assert {split: manifest.class_counts for split, manifest in first.items()} == {
        "train": {"cat": 13, "dog": 13},
        "val": {"cat": 5, "dog": 5},
        "test": {"cat": 2, "dog": 2},
    }
    assert [m.digest for m in first.values()] == [m.digest for m in second.values()]
    keys = [key for split, manifest in first.items() for key in keys_of(str(tmp_path / "a" / split), manifest)]
    assert len(keys) == len(set(keys)) == 40


def test_unreadable_pictures_are_counted_named_and_skipped(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    (pictures / "cat" / "broken.jpg").write_bytes((pictures / "cat" / "000.jpg").read_bytes()[:200])
    (pictures / "dog" / "text.png").write_text("no picture")
    target = str(tmp_path / "shards")
    with pytest.raises(DataError, match=r"2 of 42 pictures cannot be read, more than the limit of 1.00%"):
        api.ingest(str(pictures), target)
    assert not storage.exists(storage.join(target, "manifest.json"))
    manifest = api.ingest(str(pictures), target, IngestConfig(max_refused_fraction=0.1))["all"]
    assert manifest.num_rows == 40 and manifest.num_refused == 2
    assert {image.key for image in manifest.refused} == {"cat/broken.jpg", "dog/text.png"}
    assert all(image.reason for image in manifest.refused)


def test_finished_shards_are_not_made_again_after_a_kill(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    """What a killed ingest leaves: shards with their notes, and no manifest."""
    target, config = tmp_path / "shards", IngestConfig(**SMALL_SHARDS)
    whole = api.ingest(str(pictures), str(target), config)["all"]
    notes = target / "_parts" / json.loads(whole.source)["plan"][:16]
    notes.mkdir(parents=True)
    for shard in whole.shards[:-1]:
        (notes / f"{shard.path}.json").write_text(json.dumps({"info": shard.model_dump(), "refused": []}))
    (target / whole.shards[-1].path).unlink()
    (target / "manifest.json").unlink()
    kept = (target / whole.shards[0].path).stat().st_mtime_ns
    assert api.ingest(str(pictures), str(target), config)["all"] == whole
    assert (target / whole.shards[0].path).stat().st_mtime_ns == kept
    assert api.verify_data(str(target)) == []


def test_pictures_larger_than_wanted_are_made_smaller(ray_cluster: Connection, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "big" / name).mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "big" / name / "1.png")
    manifest = api.ingest(str(tmp_path / "big"), str(tmp_path / "out"), IngestConfig(max_side=60))["all"]
    row = read_row_groups(str(tmp_path / "out"), manifest.shards[0].path, [0])[0].to_pylist()[0]
    assert (row["width"], row["height"]) == (80, 60)
    assert Image.open(io.BytesIO(row["image"])).size == (80, 60)


def test_damage_is_found_and_named(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    manifest = api.ingest(str(pictures), str(tmp_path / "shards"), IngestConfig(**SMALL_SHARDS))["all"]
    damaged, missing = (tmp_path / "shards" / shard.path for shard in manifest.shards[:2])
    data = bytearray(damaged.read_bytes())
    data[100] ^= 255
    damaged.write_bytes(bytes(data))
    missing.unlink()
    problems = api.verify_data(str(tmp_path / "shards"))
    assert len(problems) == 2 and damaged.name in problems[0] and missing.name in problems[1]
    damaged.write_bytes(bytes(data[:-1]))
    assert f"{len(data) - 1} bytes instead of {len(data)}" in api.verify_data(str(tmp_path / "shards"))[0]


def test_example_pictures_are_the_first_that_can_be_decoded(tmp_path: Path) -> None:
    shards = write_digit_shards(tmp_path, damaged=1)
    size = Preprocessing(image_size=12, eval_resize=12)
    found = example_pictures(str(shards / "train"), size, 5)
    assert found.shape == (5, 12, 12, 3) and found.dtype == np.uint8
    rows = [row for group in read_row_groups(str(shards / "train"), "shard-00000.parquet", [0]) for row in group.to_pylist()]
    assert np.array_equal(found[1], eval_image(decode_rgb(rows[2]["image"]), size))
    assert len(example_pictures(str(shards / "val"), size, 1000)) == 120
    assert example_pictures(str(shards / "val"), size, 0).shape == (0, 12, 12, 3)


def test_the_contact_sheet_is_a_picture(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    api.ingest(str(pictures), str(tmp_path / "shards"))
    description = api.show_data(str(tmp_path / "shards"), tmp_path / "sheet.png")
    assert description["pictures"] == 40 and description["classes"] == {"cat": 20, "dog": 20}
    sizes = description["pixels (width × height)"]
    assert (sizes["smallest"], sizes["largest"]) == ("20 × 16", "39 × 16")
    assert Image.open(tmp_path / "sheet.png").height == 2 * 96


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "'nowhere': no such folder"),
        ("empty", "no pictures there"),
        ("one", r"only one class \('a'\)"),
        ("imagefoldr:x", r"unknown kind 'imagefoldr' \(did you mean 'imagefolder'\?\)"),
    ],
)
def test_a_source_without_pictures_is_refused(
    source: str, message: str, ray_cluster: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "one" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "a" / "1.png")
    with pytest.raises(DataError, match=message):
        api.ingest(source, "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet", "csv", "imagenet", "cifar"])
def test_sources_on_a_disk_and_on_s3_give_the_same(kind: str, ray_cluster: Connection, s3_store: S3Store, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    address = {
        "imagefolder": lambda: write_folder(folder),
        "webdataset": lambda: write_webdataset(folder),
        "parquet": lambda: write_parquet(folder / "digits.parquet", range(40)),
        "csv": lambda: write_csv(folder, splits=True),
        "imagenet": lambda: write_imagenet(folder),
        "cifar": lambda: write_cifar(folder)[0],
    }[kind]()
    storage.copy_tree(str(folder), storage.join(s3_store.bucket_uri, "source"))
    remote = storage.join(s3_store.bucket_uri, "source", str(address.relative_to(folder))).removesuffix("/.")
    target = storage.join(s3_store.bucket_uri, "shards")
    here = api.ingest(f"{kind}:{address}", str(tmp_path / "shards"))
    there = api.ingest(f"{kind}:{remote}", target)
    assert {split: manifest.digest for split, manifest in there.items()} == {split: manifest.digest for split, manifest in here.items()}
    assert list(here) == {"csv": ["train", "test"], "imagenet": ["train", "val"], "cifar": ["train", "test"]}.get(kind, ["all"])
    assert sum(manifest.num_rows for manifest in here.values()) == {"imagenet": 24, "cifar": 30}.get(kind, 40)
    for split in there:
        assert api.verify_data(target if split == "all" else storage.join(target, split)) == []


def test_fashion_mnist_keeps_its_pixels_and_its_splits(ray_cluster: Connection, tmp_path: Path) -> None:
    source = require_debian_file(Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist")
    target = str(tmp_path / "fashion")
    manifests = api.ingest(f"idx:{source}", target, IngestConfig(split={"val": 0.1}))
    assert {split: manifest.num_rows for split, manifest in manifests.items()} == {"train": 54_000, "val": 6_000, "test": 10_000}
    assert set(manifests["val"].class_counts.values()) == {600} and set(manifests["test"].class_counts.values()) == {1000}
    row = read_row_groups(f"{target}/train", manifests["train"].shards[0].path, [0])[0].to_pylist()[0]
    pixels = decode_trusted(row["image"])
    assert pixels.shape == (28, 28, 3) and (row["width"], row["height"]) == (28, 28)
    assert len(row["image"]) == 16 + 28 * 28  # no JPEG, no PNG
    with pytest.raises(ConfigError, match="has a split 'test' of its own"):
        api.ingest(f"idx:{source}", str(tmp_path / "other"), IngestConfig(split={"test": 0.1}))


def test_raw_pixels_made_smaller_stay_raw(ray_cluster: Connection, tmp_path: Path) -> None:
    root, pixels, _ = write_cifar(tmp_path / "cifar")
    manifest = api.ingest(f"cifar:{root}", str(tmp_path / "out"), IngestConfig(max_side=16))["test"]
    row = pq.read_table(tmp_path / "out" / "test" / manifest.shards[0].path).to_pylist()[0]
    expected = pixels[20 + int(row["key"][-5:])].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert (row["width"], row["height"], len(row["image"])) == (16, 16, 16 + 16 * 16 * 3)
    assert np.abs(decode_trusted(row["image"]) - expected).max() <= 1


def test_row_groups_of_a_parquet_file_stay_together_and_each_is_read_about_once(ray_cluster: Connection, tmp_path: Path) -> None:
    """Row groups sorted by class, as files made from folders are; a shard mixes those it takes."""
    path = write_parquet(tmp_path / "digits.parquet", range(210))
    size = int(sum(len(encode_row) for encode_row in pq.read_table(path)["image"].combine_chunks().field("bytes").to_pylist()) / 210)
    manifest = api.ingest(f"parquet:{path}", str(tmp_path / "shards"), IngestConfig(shard_bytes=max(1000, 30 * size)))["all"]
    groups_of_shards = []
    for shard in manifest.shards:
        rows = [int(key.rpartition("/")[2]) for key in pq.read_table(tmp_path / "shards" / shard.path)["key"].to_pylist()]
        groups_of_shards.append({row // 7 for row in rows})
        assert rows != sorted(rows)
    assert manifest.num_rows == 210 and len(manifest.shards) > 3
    assert sum(map(len, groups_of_shards)) <= 30 + len(manifest.shards)


def test_splits_by_folder_with_a_fraction_of_train(ray_cluster: Connection, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / "source" / split, 60)
    config = IngestConfig(split_by="folder", split={"val": 0.2})
    manifests = api.ingest(str(tmp_path / "source"), str(tmp_path / "out"), config)
    assert list(manifests) == ["train", "val", "test"] and manifests["test"].num_rows == 60
    assert manifests["train"].num_rows + manifests["val"].num_rows == 60
    assert all(key.startswith("train/") for key in keys_of(str(tmp_path / "out" / "val"), manifests["val"]))


def test_splits_by_a_file(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    keys = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.*"))
    wanted = {key: "val" if index % 5 == 0 else "train" for index, key in enumerate(keys)}
    table = tmp_path / "splits.csv"
    table.write_text("key,split\n" + "".join(f"{key},{split}\n" for key, split in wanted.items()))
    config = IngestConfig(split_by=str(table))
    manifests = api.ingest(str(pictures), str(tmp_path / "out"), config)
    assert {key: split for split, m in manifests.items() for key in keys_of(str(tmp_path / "out" / split), m)} == wanted
    for lines, message in (
        ("cat/000.jpg,train\n", "39 pictures are not in it; the first: 'cat/001.png'"),
        ("cat/nothing.jpg,train\n", "1 keys are not in the source; the first: 'cat/nothing.jpg'"),
        ("cat/000.jpg\n", "lines are key,split"),
    ):
        table.write_text(lines)
        with pytest.raises(ConfigError, match=message):
            api.ingest(str(pictures), str(tmp_path / "wrong"), config)
    with pytest.raises(ConfigError, match="no 'train' to take fractions from"):
        table.write_text("".join(f"{key},a\n" for key in keys))
        api.ingest(
            str(pictures), str(tmp_path / "wrong"), build_section(IngestConfig, {"split_by": str(table), "split": {"val": 0.5}}, "ingest")
        )


def test_every_kind_of_picture_is_kept_as_it_is_displayed(ray_cluster: Connection, tmp_path: Path) -> None:
    """CMYK, grey, palette, 16-bit and turned pictures, as they are and made smaller."""
    rgb = np.zeros((40, 80, 3), np.uint8)
    rgb[:, :40], rgb[:, 40:] = (200, 40, 40), (40, 40, 200)
    photo, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    deep = np.repeat(np.repeat(np.array([[10_000, 50_000]], np.uint16), 40, 0), 40, 1)
    kinds = {
        "cmyk.jpg": (encode(photo.convert("CMYK"), "JPEG", quality=95), rgb),
        "grey.jpg": (encode(photo.convert("L"), "JPEG", quality=95), np.asarray(photo.convert("L").convert("RGB"))),
        "palette.png": (encode(photo.convert("P"), "PNG"), rgb),
        "deep.png": (encode(Image.fromarray(deep), "PNG"), np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)),
        "turned.jpg": (encode(photo, "JPEG", quality=95, exif=exif), np.rot90(rgb, -1)),
        "photo.webp": (encode(photo, "WEBP", quality=95), rgb),
    }
    for name, (data, _) in kinds.items():
        for folder in ("a", "b"):
            (tmp_path / "source" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / folder / name).write_bytes(data)
    for max_side in (None, 20):
        target = tmp_path / f"side-{max_side}"
        manifest = api.ingest(str(tmp_path / "source"), str(target), IngestConfig(max_side=max_side, quality=95))["all"]
        rows = pq.read_table(target / manifest.shards[0].path).to_pylist()
        assert len(rows) == 2 * len(kinds) and not manifest.num_refused
        for row in rows:
            data, expected = kinds[row["key"].split("/")[1]]
            pixels = decode_trusted(row["image"])
            assert pixels.shape == (row["height"], row["width"], 3), row["key"]
            if max_side is None and row["key"].endswith("deep.png"):  # small enough for raw pixels, once it is known to be grey
                assert len(row["image"]) == 16 + 40 * 80 and (pixels == expected).all()
            elif max_side is None:
                assert row["image"] == data
            else:
                assert min(pixels.shape[:2]) == 20 and Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"])
                expected = np.asarray(
                    Image.fromarray(np.ascontiguousarray(expected)).resize((row["width"], row["height"]), Image.Resampling.BOX)
                )
            # Away from the edge between the halves, where JPEG mixes the colours.
            for place in ((2, 2), (-3, -3)):
                assert np.abs(pixels[place].astype(int) - expected[place]).max() <= 14, row["key"]


def test_quality_is_that_of_the_jpegs_made(ray_cluster: Connection, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "1.png").write_bytes(encode(noise))
    sizes = []
    for quality in (30, 90):
        config = IngestConfig(max_side=32, quality=quality)
        manifest = api.ingest(str(tmp_path / "source"), str(tmp_path / str(quality)), config)["all"]
        sizes.append(len(pq.read_table(tmp_path / str(quality) / manifest.shards[0].path)["image"][0].as_py()))
    assert sizes[0] < 0.6 * sizes[1]


def test_another_plan_never_overwrites_shards(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    first = api.ingest(str(pictures), str(target), IngestConfig(**SMALL_SHARDS))["all"]
    (target / "manifest.json").rename(tmp_path / "manifest.json")
    second = api.ingest(str(pictures), str(target), IngestConfig(**SMALL_SHARDS), seed=1)["all"]
    assert not {shard.path for shard in first.shards} & {shard.path for shard in second.shards}
    assert api.verify_data(str(target)) == []
    (tmp_path / "manifest.json").replace(target / "manifest.json")
    assert api.verify_data(str(target)) == []


def other_claim(age_s: float, host: str = "elsewhere", pid: int = 1) -> bytes:
    now = time.time()
    return json.dumps({"host": host, "pid": pid, "started": now - 1000, "refreshed": now - age_s, "token": "other"}).encode()


def test_a_claim_counts_as_long_as_it_is_refreshed(pictures: Path, target: str) -> None:
    uri = storage.join(target, CLAIM_NAME)
    storage.write_bytes(uri, other_claim(age_s=30))
    with pytest.raises(DataError, match=r"another ingest writes there \(process 1 on elsewhere, since .*\); wait for it to end"):
        api.ingest(str(pictures), target)
    assert not storage.exists(storage.join(target, "manifest.json"))
    manifests = run_ingest(str(pictures), target, IngestConfig(), dead_after_s=20)
    assert manifests["all"].num_rows == 40 and not storage.exists(uri)


def test_a_claim_of_a_process_that_has_ended_on_this_machine_counts_no_more(
    pictures: Path, ray_cluster: Connection, tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    storage.write_bytes(str(tmp_path / "shards" / CLAIM_NAME), other_claim(0, socket.gethostname(), ended.pid))
    assert api.ingest(str(pictures), str(tmp_path / "shards"))["all"].num_rows == 40


def test_a_claim_is_refreshed_and_released_and_its_loss_is_noticed(target: str) -> None:
    uri = storage.join(target, CLAIM_NAME)
    with claimed(target, dead_after_s=2.4) as claim:
        first = json.loads(storage.read_bytes(uri))
        wait_for(lambda: json.loads(storage.read_bytes(uri))["refreshed"] > first["refreshed"])
        claim.check()
        storage.write_bytes(uri, other_claim(0))

        def is_lost() -> bool:
            try:
                claim.check()
            except DataError as error:
                return "took over" in str(error)
            return False

        wait_for(is_lost)
    assert json.loads(storage.read_bytes(uri))["token"] == "other"
    storage.delete_file(uri)
    with pytest.raises(RuntimeError), claimed(target):
        raise RuntimeError
    assert not storage.exists(uri)


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0, pause_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        if pause_s:
            time.sleep(pause_s)


@contextmanager
def ingest_process(source: Path, target: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command line with a Ray of its own; whatever it has started is killed at the end of the block."""
    command = [sys.executable, "-m", "eagleray", "ingest", str(source), str(target), "--shard-bytes", "20000", "--split", "val=0.25"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that it started."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:], timeout=30)
    process.wait(30)


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise: 160 PNG files of 3 kB, some 25 shards."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for index in range(160):
        (folder / str(index % 2)).mkdir(exist_ok=True)
        (folder / str(index % 2) / f"{index:03d}.png").write_bytes(encode(rng.integers(0, 255, (32, 32, 3), np.uint8)))
    return folder


RUN_CONFIG = IngestConfig(split={"val": 0.25}, shard_bytes=20_000)
"""What `ingest_process` asks for."""


def shards_of(target: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in target.rglob("shard-*.parquet")}


def notes_of(target: Path) -> set[str]:
    return {path.name.removesuffix(".json") for path in target.rglob("_parts/*/shard-*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the first shard", "after some shards", "before the manifest"])
def test_a_run_killed_at_any_moment_is_finished_by_the_next(
    moment: str, many_pictures: Path, ray_cluster: Connection, tmp_path: Path
) -> None:
    undisturbed = api.ingest(str(many_pictures), str(tmp_path / "whole"), RUN_CONFIG)
    total = sum(len(manifest.shards) for manifest in undisturbed.values())
    reached = {
        "before the first shard": lambda target: (target / CLAIM_NAME).exists(),
        "after some shards": lambda target: len(notes_of(target)) >= 3,
        "before the manifest": lambda target: len(shards_of(target)) == total,
    }[moment]
    for attempt in range(5):
        target = tmp_path / f"killed-{attempt}"
        with ingest_process(many_pictures, target, tmp_path / "log") as process:
            wait_for(lambda target=target, process=process: process.poll() is not None or reached(target), pause_s=0)
            process.send_signal(signal.SIGSTOP)  # tasks that run go on and end; it may have ended itself
            if moment == "before the manifest":
                wait_for(lambda target=target: len(notes_of(target)) == total or bool(list(target.rglob("manifest.json"))))
        if not list(target.rglob("manifest.json")):
            break
    else:
        pytest.fail(f"five runs had published before they were killed: {(tmp_path / 'log').read_text()}")
    done, finished = shards_of(target), notes_of(target)
    assert (len(finished) >= 3) == (moment != "before the first shard")
    assert (len(finished) == total) == (moment == "before the manifest")
    for path in done:
        pq.read_metadata(path)  # nothing has a final name and is not whole
    resumed = api.ingest(str(many_pictures), str(target), RUN_CONFIG)
    assert {split: manifest.digest for split, manifest in resumed.items()} == {split: m.digest for split, m in undisturbed.items()}
    for path, written in done.items():
        if path.name in finished:
            assert path.stat().st_mtime_ns == written
    for split in resumed:
        assert api.verify_data(str(target / split)) == []


@pytest.mark.slow
def test_a_second_writer_is_refused_while_the_first_lives(many_pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    with ingest_process(many_pictures, target, tmp_path / "log") as process:
        wait_for((target / CLAIM_NAME).exists)
        os.kill(process.pid, signal.SIGSTOP)
        for seed in (0, 1):  # the same plan, and another
            with pytest.raises(DataError, match=f"another ingest writes there \\(process {process.pid} on {socket.gethostname()}"):
                api.ingest(str(many_pictures), str(target), RUN_CONFIG, seed=seed)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    manifests = api.ingest(str(many_pictures), str(target), RUN_CONFIG)
    assert sum(manifest.num_rows for manifest in manifests.values()) == 160
    assert not (target / CLAIM_NAME).exists()
    log = (tmp_path / "log").read_text()
    assert "160/160 pictures" in log and "images/s" in log and "s left" in log


@contextmanager
def small_disk(path: Path) -> Iterator[Callable[[str], None]]:
    """Mount a file system of 200 kB; yields a function that changes its size."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        message = f"mounting a small file system needs root: {mounted.stderr.strip()}"
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(message)
        pytest.skip(message)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True) and None
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(many_pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as resize:
        target = tmp_path / "disk" / "shards"
        with pytest.raises(StorageError) as caught:
            api.ingest(str(many_pictures), str(target), RUN_CONFIG)
        assert "the disk is full; free some space" in str(caught.value) and str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
        files = [path for path in target.rglob("*") if path.is_file()]
        assert not [path for path in files if path.name in ("manifest.json", CLAIM_NAME) or path.name.startswith(".writing")]
        done, finished = shards_of(target), notes_of(target)
        for path in done:
            pq.read_metadata(path)
        resize("10m")
        manifests = api.ingest(str(many_pictures), str(target), RUN_CONFIG)
        assert sum(manifest.num_rows for manifest in manifests.values()) == 160
        assert finished and all(path.stat().st_mtime_ns == written for path, written in done.items() if path.name in finished)


def test_labels_are_those_of_the_source(ray_cluster: Connection, tmp_path: Path) -> None:
    manifest = api.ingest(f"webdataset:{write_webdataset(tmp_path / 'wds')}", str(tmp_path / "out"))["all"]
    rows = pq.read_table(tmp_path / "out" / manifest.shards[0].path).to_pylist()
    assert len(rows) == 40
    assert all(manifest.classes[row["label"]] == str(LABELS[int(row["key"][-9:-4])]) for row in rows)
