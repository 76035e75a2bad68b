"""Every source finds each picture once, with its class, and reads just its bytes; a wrong one says what is wrong."""

from __future__ import annotations

import gzip
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources_for_tests import (
    LABELS,
    PIXELS,
    WNIDS,
    digit_pixels,
    encode,
    tar_of,
    write_cifar,
    write_csv,
    write_folder,
    write_imagenet,
    write_parquet,
    write_webdataset,
)

from eagleray.config.load import build_section
from eagleray.config.schema import IngestConfig
from eagleray.data.decode import crop_and_resize, decode_raw, decode_rgb, decode_trusted, encode_raw, image_size
from eagleray.data.sources import open_source
from eagleray.data.sources.listing import Listing, build_items
from eagleray.data.sources.patterns import expand_braces
from eagleray.data.sources.reading import FileReader
from eagleray.errors import ConfigError, DataError, EagleRayError


def listed(spec: str, **settings: object) -> Listing:
    return open_source(spec, build_section(IngestConfig, settings, "ingest")).list_items()


def pictures(listing: Listing) -> dict[str, tuple[str, np.ndarray]]:
    """Read everything, in an order that is not that of storage: key → (class, pixels)."""
    order = np.random.default_rng(0).permutation(len(listing.items))
    items = listing.items.take(order)
    found = {}
    for row, data in pickle.loads(pickle.dumps(listing.reader)).read(items):
        assert isinstance(data, bytes)
        found[items["key"][row].as_py()] = (listing.classes[items["label"][row].as_py()], decode_trusted(data))
    assert len(found) == len(items)
    return found


def assert_digits(found: dict[str, tuple[str, np.ndarray]], number: dict[str, int], name: str = "{}") -> None:
    assert found.keys() == number.keys()
    for key, i in number.items():
        assert found[key][0] == name.format(LABELS[i])
        assert (found[key][1] == digit_pixels(i)).all()


def test_webdataset_with_numbers_as_classes(tmp_path: Path) -> None:
    folder = write_webdataset(tmp_path / "wds")
    listing = listed(f"webdataset:{folder}")
    assert listing.classes == [str(i) for i in range(10)]
    number = {f"part-{i % 2:03d}.tar/{'long' * 30}/{i:05d}.png": i for i in range(40)}
    assert_digits(pictures(listing), number)
    assert len(listed(f"webdataset:{folder}/part-001.tar").items) == 20
    assert len(listed(f"webdataset:{folder}/part-{{000..001}}.tar").items) == 40
    with pytest.raises(DataError, match=r"part-002\.tar': no such file"):
        listed(f"webdataset:{folder}/part-{{000..002}}.tar")


def test_webdataset_with_json_and_class_names(tmp_path: Path) -> None:
    listing = listed(f"webdataset:{write_webdataset(tmp_path / 'json', label='json')}")
    assert {name for name, _ in pictures(listing).values()} == {f"digit {i}" for i in range(10)}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {i}" for i in range(10)))
    named = listed(f"webdataset:{write_webdataset(tmp_path / 'cls')}", class_names=str(names))
    assert named.classes == [f"name {i}" for i in range(10)]
    by_id = listed(f"webdataset:{tmp_path / 'json'}", label_column="id")
    assert len(by_id.classes) == 40 and by_id.classes[10] == "10"
    names.write_text("only\ntwo")
    with pytest.raises(DataError, match=r"not a number from 0 to 1.*--class-names"):
        listed(f"webdataset:{tmp_path / 'cls'}", class_names=str(names))


def test_imagenet_as_it_is_distributed(tmp_path: Path) -> None:
    listing = listed(f"imagenet:{write_imagenet(tmp_path / 'ilsvrc')}")
    assert listing.classes == sorted(WNIDS)
    found = pictures(listing)
    assert len(found) == 24
    for number, wnid in enumerate(WNIDS):
        for i in range(6):
            name, pixels = found[f"train/{wnid}/{wnid}_{i}.JPEG"]
            assert name == wnid and (pixels == decode_rgb(encode(digit_pixels(3 * i + number), "JPEG"))).all()
    # Ground truth 3 1 2 2 1 3 counts synsets by ILSVRC2012_ID.
    truth = [found[f"val/ILSVRC2012_val_{i:08d}.JPEG"][0] for i in range(1, 7)]
    assert truth == [WNIDS[i - 1] for i in (3, 1, 2, 2, 1, 3)]
    assert set(listing.items.filter(np.array(listing.items["split"]) == "val")["key"].to_pylist()) == {
        k for k in found if k.startswith("val/")
    }
    (tmp_path / "ilsvrc" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val\.tar not found"):
        listed(f"imagenet:{tmp_path / 'ilsvrc'}")


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet(as_struct: bool, tmp_path: Path) -> None:
    names = [f"digit {i}" for i in range(10)]
    for part in range(2):
        write_parquet(tmp_path / f"part-{part}.parquet", range(20 * part, 20 * part + 20), as_struct=as_struct, names=names)
    listing = listed(f"parquet:{tmp_path}")
    assert listing.classes == names
    assert_digits(pictures(listing), {f"part-{i // 20}.parquet/{i % 20}": i for i in range(40)}, "digit {}")
    assert len(set(listing.items["chunk"].to_pylist())) == 6  # row groups of 7, 7 and 6 rows in each file
    assert len(listed(f"parquet:{tmp_path}/*-1.parquet").items) == 20


def test_parquet_columns_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", range(20), label="digit")
    with pytest.raises(DataError, match=r"no column for the label .* --label-column; columns there: image, digit"):
        listed(f"parquet:{path}")
    assert listed(f"parquet:{path}", label_column="digit").classes == [str(i) for i in range(10)]
    with pytest.raises(DataError, match="holds int64, not encoded pictures"):
        listed(f"parquet:{path}", label_column="digit", image_column="digit")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(suffix: str, tmp_path: Path) -> None:
    for split, rows in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        count = rows.stop - rows.start
        images = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 8, 8)) + PIXELS[rows].tobytes()
        labels = b"".join(number.to_bytes(4, "big") for number in (0x801, count)) + LABELS[rows].astype(np.uint8).tobytes()
        for name, data in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    listing = listed(f"idx:{tmp_path}")
    number = {f"train/{i:06d}": i for i in range(30)} | {f"test/{i - 30:06d}": i for i in range(30, 40)}
    assert_digits(pictures(listing), number)
    assert listing.items["split"].to_pylist() == ["train"] * 30 + ["test"] * 10
    damaged = tmp_path / f"train-images-idx3-ubyte{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"not a whole gzip file|cut off"):
        listed(f"idx:{tmp_path}")


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(fine: bool, packed: bool, tmp_path: Path) -> None:
    root, pixels, labels = write_cifar(tmp_path, fine)
    address = root
    if packed:
        address = tmp_path / "cifar.tar.gz"
        with tarfile.open(address, "w:gz") as tar:
            tar.add(root, arcname=root.name)
    listing = listed(f"cifar:{address}")
    assert listing.classes == [f"class{i}" for i in range(10)]
    found = pictures(listing)
    for i in range(30):
        files = (
            ("train.bin",) * 20 + ("test.bin",) * 10
            if fine
            else ("data_batch_1.bin",) * 10 + ("data_batch_2.bin",) * 10 + ("test_batch.bin",) * 10
        )
        start = files.index(files[i])
        name, picture = found[f"{files[i]}/{i - start:05d}"]
        assert name == f"class{labels[i]}" and (picture == pixels[i]).all()
    assert listing.items["split"].to_pylist().count("test") == 10


def test_csv(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "csv")
    text = table.read_text().replace("pictures/3.png", str(tmp_path / "csv" / "pictures" / "3.png"))
    table.write_text(text)
    number = {f"pictures/{i}.png": i for i in range(40) if i != 3} | {str(tmp_path / "csv" / "pictures" / "3.png"): 3}
    assert_digits(pictures(listed(f"csv:{table}")), number, "digit {}")
    table.write_text(text + "pictures/1.png,digit 1\n")
    with pytest.raises(DataError, match=r"'pictures/1\.png' is listed more than once"):
        listed(f"csv:{table}")
    table.write_text(text + "pictures/99.png,digit 1\n")
    listing = listed(f"csv:{table}")
    reasons = [str(data) for _, data in listing.reader.read(listing.items) if isinstance(data, DataError)]
    assert reasons == ["not found"]


def test_folders_of_splits_are_splits_when_asked_for(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / "data" / split, 20)
    with pytest.raises(DataError, match=r"train, val look like splits, not classes; say --split-by folder"):
        listed(str(tmp_path / "data"))
    listing = listed(str(tmp_path / "data"), split_by="folder")
    assert listing.classes == [str(i) for i in range(10)]
    assert listing.items["split"].to_pylist() == ["train"] * 20 + ["val"] * 20


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "plane", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encode(PIXELS[0]))
    assert listed(str(tmp_path)).classes == ["plane", "test", "train"]


@pytest.mark.parametrize(
    ("spec", "settings", "error", "message"),
    [
        ("imagenett:x", {}, DataError, r"unknown kind 'imagenett' \(did you mean 'imagenet'\?\)"),
        (
            "idx:x",
            {"split_by": "folder"},
            ConfigError,
            "ingest.split_by 'folder' does not apply to a source of kind 'idx', only to imagefolder",
        ),
        ("imagefolder:x", {"label_column": "y"}, ConfigError, "ingest.label_column does not apply to a source of kind 'imagefolder'"),
        ("cifar:x", {}, DataError, "not CIFAR's binary version"),
        ("idx:x", {}, DataError, "train-images-idx3-ubyte"),
        ("webdataset:x", {}, DataError, "no such file; give a .tar file"),
        ("parquet:x/*.parquet", {}, DataError, "no such file; give a .parquet file"),
        ("csv:x.csv", {}, EagleRayError, "not found"),
    ],
)
def test_a_source_that_cannot_be_says_why(
    spec: str, settings: dict[str, str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        listed(spec, **settings)


def test_a_tar_that_is_cut_off_or_compressed_is_refused(tmp_path: Path) -> None:
    data = tar_of({"a.png": encode(PIXELS[0]), "a.cls": b"0", "b.png": encode(PIXELS[1]) * 100, "b.cls": b"1"})
    for name, content in (("cut", data[:3000]), ("packed", gzip.compress(data))):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match="not a whole, uncompressed tar"):
            listed(f"webdataset:{tmp_path / name}.tar")
    (tmp_path / "unlabelled.tar").write_bytes(tar_of({"a.png": encode(PIXELS[0])}))
    with pytest.raises(DataError, match=r"unlabelled\.tar: a': no label"):
        listed(f"webdataset:{tmp_path / 'unlabelled.tar'}")


def test_a_listing_of_a_million_pictures_is_small() -> None:
    keys = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(100_000)]
    items = build_items(keys, np.zeros(len(keys), int), [100_000] * len(keys), files=keys)
    assert items.nbytes < 150 * len(keys)
    assert len(pickle.dumps(FileReader("s3://bucket/x"))) < 1000


def test_braces_as_in_a_shell() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_raw_pixels_come_back_as_they_are(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = encode_raw(pixels)
    rgb = np.broadcast_to(pixels.reshape(5, 7, -1), (5, 7, 3))
    assert image_size(data) == (7, 5)
    assert (decode_raw(data) == rgb).all() and (decode_trusted(data) == rgb).all() and (decode_rgb(data, allow_raw=True) == rgb).all()
    assert (crop_and_resize(data, (7, 5), (2, 1, 4, 4), 4) == rgb[1:5, 2:6]).all()
    whole = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize((10, 10), Image.Resampling.BILINEAR), int)
    assert np.abs(crop_and_resize(data, (7, 5), (0, 0, 7, 5), 10) - whole).max() <= 2
    with pytest.raises(DataError, match="damaged raw pixels"):
        decode_trusted(data[:-1])


def test_raw_pixels_from_a_client_are_refused() -> None:
    """Uploads are decoded by `decode_rgb` as it is by default."""
    with pytest.raises(DataError, match="not a JPEG, PNG or WebP"):
        decode_rgb(encode_raw(PIXELS[0]))
    huge = b"\x93RAW" + (60_000).to_bytes(4, "little") * 2 + (3).to_bytes(4, "little")
    with pytest.raises(DataError, match="more than the limit"):
        decode_rgb(huge, allow_raw=True)
