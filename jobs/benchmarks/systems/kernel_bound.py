"""What the cores could do if nothing but decoding were to be done: `decode_train` in one process per core, all at once.

The pictures are those of eagleray's shards, in memory before the clock starts.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import Any

import cv2
import numpy as np
from jobs.benchmarks.systems.protocol import IMAGE_SIZE, NUM_WORKERS, answer

from eagleray.config.schema import AugmentConfig
from eagleray.data.shards import load_manifest, read_row_groups
from eagleray.data.transforms import decode_train

Picture = tuple[bytes, tuple[int, int]]


def main(uri: str, passes: int) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(NUM_WORKERS)
    with context.Pool(NUM_WORKERS, initializer=_keep, initargs=(barrier,)) as pool:
        rates = pool.map(_decode, [(uri, part, passes) for part in range(NUM_WORKERS)], chunksize=1)
    answer({"images_per_s": sum(rates)})


_kept: list[Any] = []


def _keep(barrier: Any) -> None:
    _kept.append(barrier)


def _decode(work: tuple[str, int, int]) -> float:
    """Return the images per second of one process while all are at it."""
    uri, part, passes = work
    pictures = _load(uri)[part::NUM_WORKERS]
    augment, rng, out = AugmentConfig(), np.random.default_rng(part), np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    cv2.setNumThreads(1)

    def once() -> None:
        for data, size in pictures:
            decode_train(data, size, augment, IMAGE_SIZE, rng, out)

    once()
    _kept[0].wait()
    start = time.perf_counter()
    for _ in range(passes):
        once()
    return passes * len(pictures) / (time.perf_counter() - start)


def _load(uri: str) -> list[Picture]:
    tables = [
        table for shard in load_manifest(uri).shards for table in read_row_groups(uri, shard.path, list(range(len(shard.row_group_rows))))
    ]
    return [
        (data, (width, height))
        for table in tables
        for data, width, height in zip(*(table[name].to_pylist() for name in ("image", "width", "height")), strict=True)
    ]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
