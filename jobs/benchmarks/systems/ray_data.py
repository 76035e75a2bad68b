"""Ray Data as its documentation shows it: read_images, map, iter_torch_batches. It decodes with Pillow."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.fs as pafs
import ray
import torch
from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import BATCH_SIZE, NUM_WORKERS, Batches, Epochs, ReadTask
from jobs.benchmarks.systems.transform import Transform
from PIL import Image
from ray.data import DataContext


def read(task: ReadTask) -> Epochs:
    ray.init(address="local", num_cpus=NUM_WORKERS, include_dashboard=False, log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False
    options: dict[str, Any] = {"shuffle": "files"} if task.shuffle else {}
    if task.uri.startswith("s3://"):
        options["filesystem"] = _s3_filesystem()
    dataset = ray.data.read_images(task.uri, mode="RGB", include_paths=True, **options).map(Change(Transform("pil")))
    try:
        while True:
            yield _epoch(dataset)
    finally:
        ray.shutdown()


class Change:
    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        image = self._transform.change(Image.fromarray(row["image"])).numpy()
        return {"image": image, "number": np.int64(PurePosixPath(row["path"]).stem)}


def _epoch(dataset: Any) -> Batches:
    return ((rows["image"], rows["number"].tolist()) for rows in dataset.iter_torch_batches(batch_size=BATCH_SIZE))


def _s3_filesystem() -> pafs.S3FileSystem:
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    return pafs.S3FileSystem(endpoint_override=endpoint.netloc, scheme=endpoint.scheme, region=os.environ["AWS_REGION"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    protocol.main(None, read)
