"""WebDataset: tar shards, read as streams; shards are shuffled, and samples within a buffer."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import torch
import webdataset
from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import BATCH_SIZE, NUM_WORKERS, Batches, Epochs, ReadTask, WriteTask
from jobs.benchmarks.systems.transform import Transform
from webdataset.gopen import gopen_schemes

SHARDS_PER_WORKER = 4
"""Workers take whole shards: a number they can share evenly."""

SHUFFLE_BUFFER = 1000


def write(task: WriteTask) -> float:
    start = time.perf_counter()
    Path(task.target).mkdir(parents=True)
    per_shard = -(-task.count // (SHARDS_PER_WORKER * NUM_WORKERS))
    with webdataset.ShardWriter(f"{task.target}/shard-%05d.tar", maxcount=per_shard, verbose=0) as sink:
        for path, label in protocol.picture_paths(task):
            sink.write({"__key__": Path(path).stem, "jpg": Path(path).read_bytes(), "cls": label})
    return time.perf_counter() - start


def read(task: ReadTask) -> Epochs:
    gopen_schemes["s3"] = _open_s3
    urls = [f"{task.uri}/{name}" for name in _shard_names(task.uri)]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls) if task.shuffle else False)
    if task.shuffle:
        dataset = dataset.shuffle(SHUFFLE_BUFFER)
    dataset = dataset.to_tuple("jpg", "__key__").map_tuple(Transform(task.decoder), _same).batched(BATCH_SIZE)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=NUM_WORKERS, persistent_workers=True, prefetch_factor=4)
    return protocol.again(partial(_epoch, loader))


def _epoch(loader: Any) -> Batches:
    return ((images, list(keys)) for images, keys in loader)


def _same(key: str) -> str:
    return key


def _shard_names(uri: str) -> list[str]:
    if not uri.startswith("s3://"):
        return sorted(os.listdir(uri))
    place = urlsplit(uri)
    found = _s3_client().list_objects_v2(Bucket=place.netloc, Prefix=place.path.lstrip("/") + "/")
    return sorted(os.path.basename(entry["Key"]) for entry in found["Contents"])


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
    """Open an object as a stream: WebDataset's way to add a kind of URL, without a process per shard as `pipe:aws s3 cp` has."""
    place = urlsplit(url)
    return _s3_client().get_object(Bucket=place.netloc, Key=place.path.lstrip("/"))["Body"]


def _s3_client() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    protocol.main(write, read)
