"""Pictures become shards: complete, once, whatever happens on the way."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import S3Store
from PIL import Image

from eagleray import api, storage
from eagleray.cluster.connect import Connection
from eagleray.config.schema import IngestConfig
from eagleray.data.decode import decode_rgb
from eagleray.data.shards import Manifest, load_manifest, read_row_groups
from eagleray.errors import DataError

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


def test_the_contact_sheet_is_a_picture(pictures: Path, ray_cluster: Connection, tmp_path: Path) -> None:
    api.ingest(str(pictures), str(tmp_path / "shards"))
    description = api.show_data(str(tmp_path / "shards"), tmp_path / "sheet.png")
    assert description["pictures"] == 40 and description["classes"] == {"cat": 20, "dog": 20}
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
