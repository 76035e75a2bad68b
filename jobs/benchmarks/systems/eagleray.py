"""eagleray's own stream, as a training run uses it: one rank, default settings, both cores for decoding.

A run on two cores gives its stream a fraction of them, as the model needs the rest. Here the consumer only counts, so
that the stream gets both for decoding, as every peer gets one worker process per core.
"""

from __future__ import annotations

import time
from contextlib import closing

from jobs.benchmarks.systems import protocol
from jobs.benchmarks.systems.protocol import (
    BATCH_SIZE,
    CROP_RATIO,
    CROP_SCALE,
    IMAGE_SIZE,
    NUM_WORKERS,
    Epochs,
    ReadTask,
    WriteTask,
)

from eagleray import api
from eagleray.cluster.connect import connected
from eagleray.config.schema import DataConfig
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import ReadOptions, load_manifest
from eagleray.data.stream import Batch, BatchStream, DecodeResources
from eagleray.data.transforms import Preprocessing
from eagleray.data.window import WindowDecoder


def write(task: WriteTask) -> float:
    with connected():
        start = time.perf_counter()
        api.ingest(f"imagefolder:{task.pictures}", task.target)
        return time.perf_counter() - start


def read(task: ReadTask) -> Epochs:
    data = DataConfig(train=task.uri, val=task.uri, image_size=IMAGE_SIZE, cache_dir=task.cache_dir)
    assert (data.augment.crop_scale, data.augment.crop_ratio, data.augment.flip) == (CROP_SCALE, CROP_RATIO, 0.5)
    manifest = load_manifest(task.uri)
    plan = EpochPlan.of(manifest, BATCH_SIZE, data.lanes, data.shuffle_window, seed=0 if task.shuffle else None)
    options = (ReadOptions.of(manifest, data),)
    decoder = WindowDecoder((task.uri,), plan, Preprocessing.of(data), data.augment, read_options=options)
    stream = BatchStream(decoder, rank=0, world_size=1, resources=DecodeResources.on(NUM_WORKERS))
    # The stream goes on beyond the last timed epoch: a task may be decoding an epoch ahead then, as it was before the first.
    with connected(), closing(stream.epochs(0, 1 + task.timed_epochs + NUM_WORKERS)) as epochs:
        for batches in epochs:
            yield (_counted(batch) for batch in batches)


def _counted(batch: Batch) -> tuple[object, list[int]]:
    """A row that only fills up the last batch counts as none, a picture that could not be decoded as missing."""
    return batch.images[batch.is_valid] if not batch.is_valid.all() else batch.images, batch.sample_ids[batch.is_valid.numpy()].tolist()


if __name__ == "__main__":
    protocol.main(write, read)
