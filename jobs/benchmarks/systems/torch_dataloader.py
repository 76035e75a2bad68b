"""torch's DataLoader over a folder of pictures (ImageFolder), or over objects fetched one by one with boto3."""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import BATCH_SIZE, NUM_WORKERS, Batches, Epochs, ReadTask
from jobs.benchmarks.systems.transform import Transform
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder


def read(task: ReadTask) -> Epochs:
    transform = Transform(task.decoder)
    dataset = S3Pictures(task.uri, transform) if task.uri.startswith("s3://") else Pictures(task.uri, transform, loader=_read_file)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=task.shuffle, num_workers=NUM_WORKERS, persistent_workers=True, prefetch_factor=4)
    return protocol.again(partial(_epoch, loader))


def _epoch(loader: DataLoader[Any]) -> Batches:
    return ((images, indices.tolist()) for images, indices in loader)


class Pictures(ImageFolder):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return super().__getitem__(index)[0], index


class S3Pictures(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, uri: str, transform: Transform) -> None:
        place = urlsplit(uri)
        self._bucket, self._transform = place.netloc, transform
        pages = _s3_client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=place.path.lstrip("/") + "/")
        self._keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        self._client: Any = None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._client is None:  # one for each worker process
            self._client = _s3_client()
        data = self._client.get_object(Bucket=self._bucket, Key=self._keys[index])["Body"].read()
        return self._transform(data), index


def _s3_client() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    protocol.main(None, read)
