"""Reading and decoding one window of the plan: the work of a Ray Data task, or of a worker itself where the pictures are small.

Reading, decoding and cropping are one generator that goes through the window in the order in which its
pictures will be used, so nothing but small uint8 blocks of finished batches leaves it. Torch is not
imported here: these tasks start in worker processes that need none.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eagleray import storage
from eagleray.config.schema import AugmentConfig, TrainSize
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import ReadOptions, read_row_groups
from eagleray.data.transforms import Preprocessing, decode_eval, decode_train
from eagleray.errors import DataError

BLOCK_BYTES = 32_000_000
"""Pixels per block: large enough to hide Ray's cost per block, small enough for a quick first batch."""

KEPT_BYTES = 64_000_000
"""Pictures as read that a worker which decodes by itself keeps for the next epochs: reading small ones costs not much less than decoding."""

READ_THREADS = 8
"""Shards read at a time by a task; they wait for the network, not for the CPU."""

_GREY = 118
"""Stands in for a picture that cannot be decoded: near zero once normalised."""


@dataclass(frozen=True)
class WindowDecoder:
    """Reads and decodes one rank's part of a window.

    `augment` None means evaluation: resize and centre crop.
    """

    uris: tuple[str, ...]
    """Of the plan's data sets."""
    plan: EpochPlan
    preprocessing: Preprocessing
    augment: AugmentConfig | None
    read_options: tuple[ReadOptions, ...] = ()
    """Of the plan's data sets; empty: the defaults."""
    train_size: TrainSize | None = None
    """None: the preprocessing's size in all epochs."""
    _kept: dict[int, _Pictures] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Row groups of earlier epochs, by their place in the plan."""

    def blocks(self, epoch: int, window: int, rank: int, world_size: int, first_step: int = 0) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield blocks of whole batches, in order, from `first_step` of the window on.

        Raises:
            DataError: a shard is missing or damaged; names it.
        """
        yield from self.decode(self.read(epoch, window, rank, world_size, first_step))

    def read(self, epoch: int, window: int, rank: int, world_size: int, first_step: int = 0, *, keep: bool = False) -> ReadWindow:
        """Read what `decode` makes the blocks of; with `keep`, hold on to up to `KEPT_BYTES` of it. Raises DataError."""
        steps = self.plan.rank_window(epoch, window, rank, world_size)
        sample_ids, is_valid = steps.sample_ids[first_step:], steps.is_valid[first_step:]
        pictures = self._read_groups(np.unique(self.plan.locate(sample_ids.ravel())[0]).tolist(), keep)
        return ReadWindow(epoch, sample_ids, is_valid, pictures, self._steps_per_block(world_size, self._image_size(epoch)))

    def decode(self, read: ReadWindow) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the blocks of what was read."""
        cv2.setNumThreads(1)  # tasks run side by side instead
        for start in range(0, len(read.sample_ids), read.steps_per_block):
            part = slice(start, start + read.steps_per_block)
            yield self._decode(read.sample_ids[part].ravel(), read.is_valid[part].ravel(), read.epoch, read.pictures)

    def explain(self, sample_id: int) -> dict[str, str]:
        """Return the `key`, `shard` and `reason` of a picture that could not be decoded."""
        place, row = (int(found[0]) for found in self.plan.locate(np.array([sample_id])))
        group = self.plan.row_groups[place]
        table = self._read_shard(group.part, group.shard_path, [group.index])[0]
        size = self._image_size(0)
        reason = "cannot be decoded"
        try:
            self._image(_Pictures(table), row, SampleRandom(0, 0).of(sample_id), np.empty((size, size, 3), np.uint8))
        except DataError as error:
            reason = str(error)
        return {"key": table["key"][row].as_py(), "shard": storage.join(self.uris[group.part], group.shard_path), "reason": reason}

    def block_bytes(self, world_size: int) -> int:
        """Return the size of the smallest full block, over all epochs, of one of `world_size` ranks."""
        sizes = {self._image_size(epoch) for epoch in range(1 + (self.train_size.ramp_epochs[1] if self.train_size else 0))}
        return min(self._steps_per_block(world_size, size) * self._step_bytes(world_size, size) for size in sizes)

    def _steps_per_block(self, world_size: int, image_size: int) -> int:
        return max(1, BLOCK_BYTES // self._step_bytes(world_size, image_size))

    def _step_bytes(self, world_size: int, image_size: int) -> int:
        return self.plan.global_batch_size // world_size * image_size**2 * 3

    def _image_size(self, epoch: int) -> int:
        return self.preprocessing.image_size if self.train_size is None else self.train_size.of_epoch(epoch)

    def _read_shard(self, part: int, path: str, row_groups: list[int]) -> list[pa.Table]:
        return read_row_groups(self.uris[part], path, row_groups, self.read_options[part] if self.read_options else ReadOptions())

    def _read_groups(self, groups: list[int], keep: bool) -> dict[int, _Pictures]:
        by_shard: dict[tuple[int, str], list[int]] = {}
        for group in groups:
            row_group = self.plan.row_groups[group]
            if group not in self._kept:
                by_shard.setdefault((row_group.part, row_group.shard_path), []).append(group)

        def read(shard: tuple[int, str]) -> list[pa.Table]:
            return self._read_shard(*shard, [self.plan.row_groups[group].index for group in by_shard[shard]])

        pictures = {group: self._kept[group] for group in groups if group in self._kept}
        if not by_shard:
            return pictures
        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = pool.map(read, by_shard)
            for part, read_part in zip(by_shard.values(), tables, strict=True):
                for group, table in zip(part, read_part, strict=True):
                    pictures[group] = _Pictures(table)
                    if keep and sum(kept.num_bytes for kept in (*self._kept.values(), pictures[group])) <= KEPT_BYTES:
                        self._kept[group] = pictures[group]
        return pictures

    def _decode(
        self,
        sample_ids: NDArray[np.int64],
        is_valid: NDArray[np.bool_],
        epoch: int,
        pictures: dict[int, _Pictures],
    ) -> dict[str, NDArray[Any]]:
        size = self._image_size(epoch)
        images = np.empty((len(sample_ids), size, size, 3), np.uint8)
        labels = np.empty(len(sample_ids), np.int64)
        is_bad = np.zeros(len(sample_ids), np.bool_)
        groups, rows = self.plan.locate(sample_ids)
        random = SampleRandom(self.plan.seed or 0, epoch)
        done: dict[int, int] = {}
        for i, (sample_id, group, row) in enumerate(zip(sample_ids.tolist(), groups.tolist(), rows.tolist(), strict=True)):
            labels[i] = pictures[group].labels[row]
            twin = done.setdefault(sample_id, i)
            if twin != i:  # it fills up the last batch, or its data set goes round more than once
                images[i], is_bad[i] = images[twin], is_bad[twin]
                continue
            try:
                self._image(pictures[group], row, random.of(sample_id), images[i])
            except DataError:
                images[i], is_bad[i] = _GREY, True
        return {"image": images, "label": labels, "sample_id": sample_ids, "is_valid": is_valid & ~is_bad, "is_bad": is_bad & is_valid}

    def _image(self, pictures: _Pictures, row: int, rng: np.random.Generator, out: NDArray[np.uint8]) -> None:
        data, size = pictures.data(row), pictures.sizes[row]
        if self.augment is None:
            out[:] = decode_eval(data, size, self.preprocessing)
            return
        decode_train(data, size, self.augment, len(out), rng, out)


@dataclass(frozen=True)
class ReadWindow:
    """One rank's part of a window, not decoded yet.

    Attributes:
        sample_ids: int64 [steps, B].
        is_valid: bool [steps, B].
        pictures: by their row group's place in the plan.
    """

    epoch: int
    sample_ids: NDArray[np.int64]
    is_valid: NDArray[np.bool_]
    pictures: dict[int, _Pictures]
    steps_per_block: int


class SampleRandom:
    """The random numbers of each sample in an epoch: a pure function of (seed, epoch, sample id).

    Philox counts (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so that a sample's numbers
    are had by setting its counter, at a fraction of the cost of a new generator.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self._philox = np.random.Philox(np.random.SeedSequence([seed, epoch]))
        self._generator = np.random.Generator(self._philox)
        self._start: Any = self._philox.state

    def of(self, sample_id: int) -> np.random.Generator:
        """Return a sample's generator, to be used before the next one is asked for."""
        self._start["state"]["counter"][:] = (0, 0, sample_id, 0)
        self._philox.state = self._start
        return self._generator


class _Pictures:
    """A row group; the pictures' bytes are not copied."""

    def __init__(self, table: pa.Table) -> None:
        column = table["image"]
        images = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        _, offsets, data = images.buffers()
        self._offsets = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1].tolist()
        self._data = memoryview(data).cast("B")
        self.labels: list[int] = table["label"].to_pylist()
        self.sizes: list[tuple[int, int]] = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    def data(self, row: int) -> memoryview:
        return self._data[self._offsets[row] : self._offsets[row + 1]]
