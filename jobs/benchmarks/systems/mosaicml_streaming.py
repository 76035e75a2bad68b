"""MosaicML Streaming: MDS shards with the JPEGs as they are; from S3 it copies shards to a local folder and keeps them."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import BATCH_SIZE, NUM_WORKERS, Batches, Epochs, ReadTask, WriteTask
from jobs.benchmarks.systems.transform import Transform
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader


def write(task: WriteTask) -> float:
    start = time.perf_counter()
    with MDSWriter(out=task.target, columns={"image": "bytes", "label": "int", "number": "int"}) as sink:
        for path, label in protocol.picture_paths(task):
            sink.write({"image": Path(path).read_bytes(), "label": label, "number": int(Path(path).stem)})
    return time.perf_counter() - start


def read(task: ReadTask) -> Epochs:
    clean_stale_shared_memory()
    is_remote = task.uri.startswith("s3://")
    if is_remote:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    place = {"remote": task.uri, "local": task.cache_dir} if is_remote else {"local": task.uri}
    dataset = Pictures(Transform(task.decoder), batch_size=BATCH_SIZE, shuffle=task.shuffle, **place)
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=NUM_WORKERS, persistent_workers=True, prefetch_factor=4)
    return protocol.again(partial(_epoch, loader))


class Pictures(StreamingDataset):
    def __init__(self, transform: Transform, **options: Any) -> None:
        super().__init__(**options)
        self._transform = transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self._transform(sample["image"]), sample["number"]


def _epoch(loader: DataLoader[Any]) -> Batches:
    return ((images, numbers.tolist()) for images, numbers in loader)


if __name__ == "__main__":
    torch.set_num_threads(1)
    protocol.main(write, read)
