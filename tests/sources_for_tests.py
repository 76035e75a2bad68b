"""Small data sets in the formats that pictures are distributed in, made of scikit-learn's digits."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits

_DIGITS = load_digits()
PIXELS = (_DIGITS.images * 255 / 16).astype(np.uint8)  # uint8 [1797, 8, 8]
LABELS = _DIGITS.target


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(data, format=kind, **options)
    return data.getvalue()


def digit_pixels(key: int) -> np.ndarray:
    """Return a digit as RGB: uint8 [8, 8, 3]."""
    return np.repeat(PIXELS[key][..., None], 3, axis=2)


def tar_of(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_webdataset(folder: Path, count: int = 40, tars: int = 2, label: str = "cls") -> Path:
    """Digit i is in tar i % tars; names of more than 100 bytes need the tar's long form."""
    folder.mkdir(parents=True)
    for number in range(tars):
        members: dict[str, bytes] = {}
        for i in range(number, count, tars):
            name = f"{'long' * 30}/{i:05d}"
            members[f"{name}.png"] = encode(PIXELS[i])
            members[f"{name}.{label}"] = (
                str(LABELS[i]).encode() if label == "cls" else json.dumps({"id": i, "label": f"digit {LABELS[i]}"}).encode()
            )
        (folder / f"part-{number:03d}.tar").write_bytes(tar_of(members))
    return folder


def write_parquet(path: Path, rows: range, *, as_struct: bool = True, label: str = "label", names: list[str] | None = None) -> Path:
    """As the `datasets` library writes it; row groups of seven."""
    pictures = [encode(PIXELS[i]) for i in rows]
    image = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in zip(rows, pictures, strict=True)] if as_struct else pictures)
    table = pa.table({"image": image, label: pa.array(LABELS[list(rows)], pa.int64())})
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def write_csv(folder: Path, count: int = 40, splits: bool = False) -> Path:
    (folder / "pictures").mkdir(parents=True)
    lines = ["uri,label" + (",split" if splits else "")]
    for i in range(count):
        (folder / "pictures" / f"{i}.png").write_bytes(encode(PIXELS[i]))
        lines.append(f"pictures/{i}.png,digit {LABELS[i]}" + ((",test" if i % 4 == 0 else ",train") if splits else ""))
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def write_folder(folder: Path, count: int = 40) -> Path:
    for i in range(count):
        (folder / str(LABELS[i])).mkdir(parents=True, exist_ok=True)
        (folder / str(LABELS[i]) / f"{i}.png").write_bytes(encode(PIXELS[i]))
    return folder


WNIDS = ["n03000000", "n01000000", "n02000000"]
"""Leaf synsets by ILSVRC2012_ID, from 1: not in alphabetical order."""


def write_imagenet(folder: Path) -> Path:
    """The three files of ILSVRC 2012: a tar of tars, a tar, and the devkit with its MATLAB table."""
    folder.mkdir(parents=True)
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": encode(digit_pixels(3 * i + number), "JPEG") for i in range(6)})
        for number, wnid in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encode(digit_pixels(100 + i), "JPEG") for i in range(6)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    synsets = np.zeros((len(WNIDS) + 1, 1), dtype=fields)
    for number, wnid in enumerate([*WNIDS, "n00001740"]):
        is_leaf = number < len(WNIDS)
        children = [] if is_leaf else [1, 2, 3]
        synsets[number, 0] = (number + 1, wnid, f"words {wnid}", "gloss", len(children), children, 0 if is_leaf else 1, 6 if is_leaf else 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    root = "ILSVRC2012_devkit_t12"
    devkit = folder / f"{root}.tar.gz"
    with tarfile.open(devkit, "w:gz") as tar:
        for name, data in (
            (f"{root}/data/meta.mat", meta.getvalue()),
            (f"{root}/data/ILSVRC2012_validation_ground_truth.txt", b"3\n1\n2\n2\n1\n3\n"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def write_cifar(folder: Path, fine: bool = False) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write CIFAR-10's (or with `fine` CIFAR-100's) binary version; returns the folder, pixels uint8 [N, 32, 32, 3] and labels.

    The first 20 pictures are for training (in two files for CIFAR-10), the last 10 for test.
    """
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (30, 32, 32, 3), np.uint8), np.arange(30) % 10
    root = folder / ("cifar-100-binary" if fine else "cifar-10-batches-bin")
    root.mkdir(parents=True)
    records = [
        bytes([7, label] if fine else [label]) + picture.transpose(2, 0, 1).tobytes() for picture, label in zip(pixels, labels, strict=True)
    ]
    files = {"train.bin": records[:20], "test.bin": records[20:]}
    if not fine:
        files = {"data_batch_1.bin": records[:10], "data_batch_2.bin": records[10:20], "test_batch.bin": records[20:]}
    for name, part in files.items():
        (root / name).write_bytes(b"".join(part))
    names = "\n".join(f"class{i}" for i in range(10)) + "\n\n"
    (root / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text(names)
    return root, pixels, labels
