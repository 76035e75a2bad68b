"""What every measured system is asked, and the line of JSON it answers with.

A system's module ends with `protocol.main(write, read)`. The benchmark runs it as a process,
`python -m jobs.benchmarks.systems.NAME write|read JSON`, and reads the last line that starts with `RESULT`.
Nothing but the standard library is imported here: it runs in every environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BATCH_SIZE = 64
IMAGE_SIZE = 224
CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
NUM_WORKERS = os.cpu_count() or 1
"""Decoding processes of every system: one per core. The consumer only counts."""

MARK = "RESULT "
END_TIMEOUT_S = 15.0

Batches = Iterator[tuple[Any, Sequence[Hashable]]]
"""Of one epoch: (pictures, uint8 [B, 3, S, S] or [B, S, S, 3]; something that tells each picture from the others)."""

Epochs = Generator[Batches, None, None]


@dataclass(frozen=True)
class WriteTask:
    """Turn a folder of pictures (one sub-folder per class) into the system's own form."""

    pictures: str
    target: str
    count: int


@dataclass(frozen=True)
class ReadTask:
    """Go through the data for one untimed epoch and `timed_epochs` timed ones.

    A system may make a part of an epoch during the one before. So its rate is that over all timed epochs
    together, their number is a multiple of the worker processes, and a stream that works ahead goes on beyond the last:
    what the first timed epoch found ready, the last one leaves behind.

    Attributes:
        uri: folder or s3:// URI of the data in the form that the system reads; S3's address is in the environment.
        count: pictures there are.
        decoder: `pil` or `torchvision`, for systems that leave the choice to the user.
        cache_dir: an empty local folder, for systems that copy what they read.
    """

    uri: str
    count: int
    timed_epochs: int
    cache_dir: str
    decoder: str = "torchvision"
    shuffle: bool = True


@dataclass(frozen=True)
class Epoch:
    """What one epoch took and gave; `seconds` and `first_batch_s` count from when its first batch was asked for."""

    seconds: float
    first_batch_s: float
    delivered: int
    distinct: int


def main(write: Callable[[WriteTask], float] | None, read: Callable[[ReadTask], Epochs]) -> None:
    """Do what the command line says.

    Args:
        write: does the task and returns the seconds it took, without imports and the start of a cluster.
        read: yields an iterator of batches for each epoch, without end.
    """
    verb, task = sys.argv[1], json.loads(sys.argv[2])
    if verb == "write" and write is not None:
        answer({"seconds": write(WriteTask(**task))})
    elif verb == "read":
        read_task = ReadTask(**task)
        epochs = read(read_task)
        answer(_measure(epochs, read_task.timed_epochs))
        _end_within(END_TIMEOUT_S)
        epochs.close()
    else:
        sys.exit(f"cannot '{verb}'")


def answer(result: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def _end_within(seconds: float) -> None:
    """A stream that is broken off while it works ahead need not end of itself; all it had to say is said."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _measure(epochs: Epochs, timed_epochs: int) -> dict[str, Any]:
    first = _consume(epochs)
    first_epoch_ended = time.time()  # the benchmark knows when it started this process
    timed = [_consume(epochs) for _ in range(timed_epochs)]
    return {"first_epoch_ended": first_epoch_ended, "epochs": [asdict(epoch) for epoch in [first, *timed]]}


def _consume(epochs: Epochs) -> Epoch:
    start = time.perf_counter()
    first_batch_s = 0.0
    seen: list[Hashable] = []
    for images, names in next(epochs):
        first_batch_s = first_batch_s or time.perf_counter() - start
        _check(images, len(names))
        seen.extend(names)
    seconds = time.perf_counter() - start
    return Epoch(seconds, first_batch_s, len(seen), len(set(seen)))


def _check(images: Any, count: int) -> None:
    shapes = ((count, 3, IMAGE_SIZE, IMAGE_SIZE), (count, IMAGE_SIZE, IMAGE_SIZE, 3))
    if tuple(images.shape) not in shapes or not str(images.dtype).endswith("uint8"):
        raise ValueError(f"expected {count} pictures as uint8, got {images.dtype} {tuple(images.shape)}")


def again(epoch: Callable[[], Batches]) -> Epochs:
    """Yield `epoch()` without end: for systems whose epochs are iterated one after another."""
    while True:
        yield epoch()


def picture_paths(task: WriteTask) -> list[tuple[str, int]]:
    """Return (path, label) of all pictures, in the order of their numbers, so that classes are mixed."""
    classes = sorted(entry.name for entry in os.scandir(task.pictures) if entry.is_dir())
    found = [(entry.path, label) for label, name in enumerate(classes) for entry in os.scandir(os.path.join(task.pictures, name))]
    return sorted(found, key=lambda item: os.path.basename(item[0]))


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """Return the items beginning with another one each round, so that none always follows the same neighbour."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]
