"""LitData: optimised chunks of 16 MB with the JPEGs as they are; it decodes them itself (torchvision).

Its documentation's 64 MB would be unfair to it here: it reads a chunk that two workers share anew for each picture
(0.2.76, from remote stores), and of so few chunks that is a large part.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch
from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import BATCH_SIZE, NUM_WORKERS, Batches, Epochs, ReadTask, WriteTask
from jobs.benchmarks.systems.transform import Transform
from litdata.streaming import downloader


def write(task: WriteTask) -> float:
    inputs = [(path, label) for path, label in protocol.picture_paths(task)]
    start = time.perf_counter()
    litdata.optimize(_sample, inputs, task.target, chunk_bytes="16MB", num_workers=NUM_WORKERS, verbose=False)
    return time.perf_counter() - start


def _sample(item: tuple[str, int]) -> dict[str, Any]:
    path, label = item
    return {"image": litdata.Jpeg(path=path), "label": label, "number": int(Path(path).stem)}


def read(task: ReadTask) -> Epochs:
    options = {}
    if task.uri.startswith("s3://"):
        options["endpoint_url"] = os.environ["AWS_ENDPOINT_URL"]
        # The client that fetches chunks refuses stores without TLS, and no setting of LitData's reaches it.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = litdata.StreamingDataset(
        task.uri, cache_dir=task.cache_dir, shuffle=task.shuffle, storage_options=options, transform=Change(Transform("torchvision"))
    )
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS, persistent_workers=True, prefetch_factor=4
    )
    return protocol.again(partial(_epoch, loader))


class Change:
    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return self._transform.change(sample["image"]), sample["number"]


def _epoch(loader: Any) -> Batches:
    return ((images, numbers.tolist()) for images, numbers in loader)


if __name__ == "__main__":
    torch.set_num_threads(1)
    protocol.main(write, read)
