"""Small real data sets for the tests: scikit-learn's handwritten digits as shards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import ray
from sklearn.datasets import load_digits

from eagleray import storage
from eagleray.artifacts.registry import Registry
from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig, WorkspaceConfig
from eagleray.data.shards import Manifest, encode_shard, manifest_uri


def write_digit_shards(
    root: Path, damaged: int | None = None, *, white: int | None = None, num_train: int = 480, class_of: Callable[[int], str] = str
) -> Path:
    """Write 480 digits as `train` and 120 as `val` and `test` below `root`.

    Args:
        damaged: training picture whose bytes are zeros only.
        white: training picture that is nothing but white.
    """
    import cv2

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images * 255 / 16).astype(np.uint8)
    if white is not None:
        images[order[white]] = 255
    classes = list(dict.fromkeys(class_of(digit) for digit in range(10)))
    for split, part in (("train", order[:num_train]), ("val", order[480:600]), ("test", order[600:720])):
        rows = [
            {
                "key": f"{index}.png",
                "image": cv2.imencode(".png", images[index])[1].tobytes(),
                "label": classes.index(class_of(int(digits.target[index]))),
                "width": 8,
                "height": 8,
            }
            for index in part
        ]
        if split == "train" and damaged is not None:
            rows[damaged]["image"] = bytes(len(rows[damaged]["image"]))
        data, info = encode_shard("shard-00000.parquet", rows, 10_000, classes)
        uri = str(root / split)
        storage.write_bytes(storage.join(uri, info.path), data)
        manifest = Manifest(classes=classes, shards=[info], source="digits", split=split)
        storage.write_bytes(manifest_uri(uri), manifest.model_dump_json().encode())
    return root


def log_names() -> set[str]:
    """Return the names that workers of this process's cluster have given to what they write."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    found = (line for path in folder.glob("worker-*.out") for line in path.read_text(errors="replace").splitlines())
    return {line.removeprefix(":actor_name:") for line in found if line.startswith(":actor_name:")}


@cache
def _empty_database() -> bytes:
    """Return MLflow's database before anything was written to it; it takes MLflow seconds to make one."""
    with tempfile.TemporaryDirectory() as folder:
        Registry(WorkspaceConfig(root=folder)).versions()
        return (Path(folder) / "mlflow.db").read_bytes()


def digits_job(shards: Path, root: Path | str, *overrides: str) -> JobConfig:
    """Return a small job on those shards that learns within a few epochs; a local workspace has a database already."""
    if storage.is_local(str(root)):
        Path(root).mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(Path(root) / "mlflow.db", "xb") as database:
            database.write(_empty_database())
    document = {
        "name": "digits",
        "workspace": {"root": str(root)},
        "data": {
            **{split: str(shards / split) for split in ("train", "val", "test")},
            "image_size": 8,
            "augment": {"crop_scale": [0.7, 1.0], "flip": 0.0},
        },
        "model": {"name": "cnn"},
        "train": {
            "epochs": 4,
            "global_batch_size": 32,
            "num_workers": 2,
            "optimizer": {"name": "adamw", "lr": 0.005},
            "schedule": {"warmup_epochs": 0.5},
        },
    }
    return build_job(document, list(overrides))
