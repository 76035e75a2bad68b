"""Ordered batches of one rank, streamed by Ray Data.

A task decodes one window of the plan (see `window`), anywhere in the cluster; Ray Data's back-pressure
bounds what lies ready. All epochs are one stream: the next epoch's first batches are made while this
one is being validated. Where pictures are so small that handing them over would be most of the work, the
worker decodes them itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from eagleray.data.window import WindowDecoder
from eagleray.placement import off_group

WINDOWS_PER_EXECUTION = 500
"""Windows handed to one Ray Data execution; a longer stream is several executions."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: uint8 [B, S, S, 3].
        targets: int64 [B].
        is_valid: bool [B]; False where a row fills up the epoch's last batch or stands in for a bad picture.
        sample_ids: int64 [B], places in the manifest's order.
        is_bad: bool [B]; the picture could not be decoded.
    """

    images: torch.Tensor
    targets: torch.Tensor
    is_valid: torch.Tensor
    sample_ids: NDArray[np.int64]
    is_bad: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: dict[str, NDArray[Any]]) -> Batch:
        """Return rows of a block of the decoder's."""
        return cls(
            images=torch.from_numpy(rows["image"]),
            targets=torch.from_numpy(rows["label"]),
            is_valid=torch.from_numpy(rows["is_valid"]),
            sample_ids=rows["sample_id"],
            is_bad=rows["is_bad"],
        )


@dataclass(frozen=True)
class DecodeResources:
    """What one rank's stream may use: `tasks` at a time, each of `cpus` logical CPUs."""

    tasks: int = 1
    cpus: float = 1.0

    @classmethod
    def on(cls, cores: int) -> DecodeResources:
        """Keep `cores` busy: with one task more than cores none of them waits while a task ends and the next one starts."""
        return cls(cores + 1, math.floor(cores / (cores + 1) * 100) / 100)


class BatchStream:
    """One rank's batches, epoch after epoch, in the plan's order.

    Iterate epochs with `epochs`; each gives an iterator of its batches.

    Args:
        resources: of the tasks that decode; None: this process decodes, when it takes the batches.
    """

    def __init__(self, decoder: WindowDecoder, rank: int, world_size: int, resources: DecodeResources | None) -> None:
        self.decoder = decoder
        self.rank = rank
        self.world_size = world_size
        self.resources = resources

    def epochs(self, first_epoch: int, last_epoch: int, first_step: int = 0) -> Iterator[Iterator[Batch]]:
        """Yield one iterator of batches for each epoch in [first_epoch, last_epoch).

        Args:
            first_step: global batches of the first epoch that were seen already.
        """
        batches = self._batches(first_epoch, last_epoch, first_step)
        for epoch in range(first_epoch, last_epoch):
            steps = self.decoder.plan.steps_per_epoch - (first_step if epoch == first_epoch else 0)
            yield (next(batches) for _ in range(steps))

    def _batches(self, first_epoch: int, last_epoch: int, first_step: int) -> Iterator[Batch]:
        plan = self.decoder.plan
        first_window, skipped = plan.window_of(first_step)
        windows = [(epoch, window) for epoch in range(first_epoch, last_epoch) for window in range(plan.num_windows)][first_window:]
        if self.resources is None:
            yield from self._decode_here(windows, skipped)
            return
        for start in range(0, len(windows), WINDOWS_PER_EXECUTION):
            yield from self._execute(windows[start : start + WINDOWS_PER_EXECUTION], skipped if start == 0 else 0, self.resources)

    def _decode_here(self, windows: list[tuple[int, int]], skipped: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as reader:  # one window ahead: it may be far away
            reads = (
                reader.submit(self.decoder.read, *window, self.rank, self.world_size, skipped if place == 0 else 0, keep=True)
                for place, window in enumerate(windows)
            )
            ahead = next(reads, None)
            while ahead is not None:
                window, ahead = ahead.result(), next(reads, None)
                for block in self.decoder.decode(window):
                    for start in range(0, len(block["label"]), self._batch_size):
                        yield Batch.of({name: values[start : start + self._batch_size] for name, values in block.items()})

    def _execute(self, windows: list[tuple[int, int]], skipped: int, resources: DecodeResources) -> Iterator[Batch]:
        import ray.data

        from eagleray.data.pace import Paced

        decoder, rank, world_size = self.decoder, self.rank, self.world_size

        def decode(rows: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, NDArray[Any]]]:
            for place in rows["place"]:
                epoch, window = windows[place]
                yield from decoder.blocks(epoch, window, rank, world_size, skipped if place == 0 else 0)

        # One block per window, put rather than read: a read stage, and `from_arrow` too, would ask for a whole CPU of their own.
        places = [pa.table({"place": [place]}) for place in range(len(windows))]
        dataset = ray.data.from_blocks(places).map_batches(
            decode,
            batch_size=None,
            num_cpus=resources.cpus,
            compute=ray.data.TaskPoolStrategy(resources.tasks),
            label_selector=off_group("serve"),
        )
        options = dataset.context.execution_options
        options.preserve_order = True
        options.verbose_progress = False
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        dataset.context.raise_original_map_exception = True
        dataset.context.custom_execution_callback_classes = [Paced]
        # Just below what the decoder yields at a time, so that each becomes a block as it is.
        dataset.context.target_max_block_size = decoder.block_bytes(world_size) * 9 // 10
        with warnings.catch_warnings():
            # Blocks are read from shared memory; nothing writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for rows in dataset.iter_batches(batch_size=self._batch_size, batch_format="numpy", prefetch_batches=2):
                yield Batch.of(rows)

    @property
    def _batch_size(self) -> int:
        return self.decoder.plan.global_batch_size // self.world_size
