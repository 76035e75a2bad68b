"""The order of an epoch: a pure function of (seed, epoch, row groups of the manifests).

Row groups are permuted over the whole epoch. The permuted sequence is cut into windows, each window
into `lanes` equal parts, and the samples of each part are permuted. Global batch b takes the b-th
slice of every lane, so it mixes samples from all over the window; a rank takes whole lanes. Hence

- the global batches are the same for every number of workers that divides `lanes`;
- a rank reads (nearly) only the row groups it decodes;
- a position is one number, the count of global batches since the start of the epoch;
- every sample comes once an epoch: the last batch is filled up with samples already seen, which are
  marked as not valid and weigh nothing. Batches keep one shape, and batch norm sees real pictures.

Of several data sets that are mixed by weight, each goes round by itself: its passes, each in an order of its own,
follow one another, and an epoch takes the next `weight` passes' worth of samples from there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from eagleray.data.shards import Manifest


MIN_WINDOW_SIZE = 1024
MIN_WINDOW_STEPS = 8
MIN_WINDOW_ROW_GROUPS = 32


def default_window_size(rows: int, row_groups: int, global_batch_size: int) -> int:
    """Return how many samples to mix at a time.

    A rank reads its part of a window at once, so that a small one needs little memory and gives the first batch soon.
    But it has to hold many row groups, for batches that are well mixed, and enough work for a task for each of many ranks.
    """
    return max(MIN_WINDOW_SIZE, MIN_WINDOW_STEPS * global_batch_size, MIN_WINDOW_ROW_GROUPS * -(-rows // row_groups))


@dataclass(frozen=True)
class RowGroup:
    """Where a row group is: `index`-th of the shard at `shard_path` of data set `part`; `first_id` is its first sample's id."""

    part: int
    shard_path: str
    index: int
    first_id: int
    rows: int


@dataclass(frozen=True)
class Steps:
    """Consecutive global batches, or one rank's part of them.

    `sample_ids` is int64 [steps, batch]: places in the manifest's order; `is_valid` is bool
    [steps, batch]: False where a sample only fills up the epoch's last batch.
    """

    sample_ids: NDArray[np.int64]
    is_valid: NDArray[np.bool_]


@dataclass(frozen=True)
class EpochPlan:
    """The order of all epochs over one data set.

    Attributes:
        row_groups: in the manifests' order.
        global_batch_size: samples per step over all ranks; a multiple of `lanes`.
        lanes: parts of a global batch.
        window_size: samples mixed at a time, about: an epoch is cut into windows of equally many steps.
        seed: None keeps the manifests' order (evaluation).
        weights: how often a sample of each data set comes in an epoch, on average over epochs.
    """

    row_groups: tuple[RowGroup, ...]
    global_batch_size: int
    lanes: int
    window_size: int
    seed: int | None
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(
        cls,
        manifests: Manifest | Sequence[Manifest],
        global_batch_size: int,
        lanes: int,
        window_size: int | None,
        seed: int | None,
        weights: Sequence[float] | None = None,
    ) -> EpochPlan:
        """Plan over one data set, or over several mixed by `weights` (all 1 by default).

        Args:
            window_size: None: see `default_window_size`.
        """
        assert global_batch_size % lanes == 0
        parts = list(manifests) if isinstance(manifests, Sequence) else [manifests]
        groups, first_id = [], 0
        for part, manifest in enumerate(parts):
            for shard in manifest.shards:
                for index, rows in enumerate(shard.row_group_rows):
                    groups.append(RowGroup(part, shard.path, index, first_id, rows))
                    first_id += rows
        size = window_size or default_window_size(first_id, len(groups), global_batch_size)
        return cls(tuple(groups), global_batch_size, lanes, size, seed, tuple(weights or [1.0] * len(parts)))

    @cached_property
    def num_rows(self) -> int:
        """Samples in an epoch."""
        return sum(self._part_samples)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    @property
    def num_windows(self) -> int:
        return len(self._window_starts) - 1

    def window_of(self, step: int) -> tuple[int, int]:
        """Return the window that holds `step` of an epoch, and the step's place within it."""
        window = bisect_right(self._window_starts, step) - 1
        return window, step - self._window_starts[window]

    def num_valid(self, step: int) -> int:
        """Return how many samples of global batch `step` count: all but in the last batch of an epoch."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)

    def window(self, epoch: int, window: int) -> Steps:
        """Return the global batches of one window of an epoch, in order."""
        ids = self._window_ids(epoch, window)
        per_lane = self.global_batch_size // self.lanes
        steps = -(-len(ids) // self.global_batch_size)
        sample_ids = np.empty((steps, self.lanes, per_lane), np.int64)
        is_valid = np.empty((steps, self.lanes, per_lane), np.bool_)
        for lane, stored in enumerate(np.array_split(ids, self.lanes)):
            part = stored if self.seed is None else np.random.default_rng([self.seed, epoch, window, lane]).permutation(stored)
            filler = part[::-1] if len(part) else ids  # the latest, which may still be at hand
            sample_ids[:, lane] = np.concatenate([part, np.resize(filler, steps * per_lane - len(part))]).reshape(steps, per_lane)
            is_valid[:, lane] = (np.arange(steps * per_lane) < len(part)).reshape(steps, per_lane)
        return Steps(sample_ids.reshape(steps, -1), is_valid.reshape(steps, -1))

    def rank_window(self, epoch: int, window: int, rank: int, world_size: int) -> Steps:
        """Return one rank's part of `window(epoch, window)`; the parts of all ranks, side by side, are the global batches."""
        assert self.lanes % world_size == 0
        whole = self.window(epoch, window)
        size = self.global_batch_size // world_size
        part = slice(rank * size, (rank + 1) * size)
        return Steps(whole.sample_ids[:, part], whole.is_valid[:, part])

    def locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each sample id, the place of its row group in `row_groups` and its row there."""
        groups = np.searchsorted(self._first_ids, sample_ids, side="right") - 1
        return groups, sample_ids - self._first_ids[groups]

    def _window_ids(self, epoch: int, window: int) -> NDArray[np.int64]:
        start = self._window_starts[window] * self.global_batch_size
        stop = min(self._window_starts[window + 1] * self.global_batch_size, self.num_rows)
        groups, firsts, lasts = self._epoch_slices(epoch)
        ends = np.cumsum(lasts - firsts)
        begin, end = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left") + 1
        first_ids = self._first_ids[groups]
        ids = np.concatenate([np.arange(first_ids[i] + firsts[i], first_ids[i] + lasts[i]) for i in range(begin, end)])
        offset = start - (ends[begin] - (lasts[begin] - firsts[begin]))
        return ids[offset : offset + stop - start]

    def _epoch_slices(self, epoch: int) -> NDArray[np.int64]:
        """Return int64 [3, N]: the row groups of an epoch in their order, and the first and last + 1 row taken of each."""
        slices = []
        for part, samples in enumerate(self._part_samples):
            in_part = np.flatnonzero(self._parts == part)
            size = int(self._rows[in_part].sum())
            first, last = epoch * samples, (epoch + 1) * samples
            for number in range(first // size, -(-last // size)):
                order = in_part if self.seed is None else np.random.default_rng([self.seed, part, number]).permutation(in_part)
                rows = self._rows[order]
                starts = number * size + np.cumsum(rows) - rows
                taken = np.stack([order, np.maximum(first - starts, 0), np.minimum(last - starts, rows)])
                slices.append(taken[:, taken[1] < taken[2]])
        joined = np.concatenate(slices, axis=1)
        return joined if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(joined, axis=1)

    @cached_property
    def _window_starts(self) -> list[int]:
        """The first step of each window, and the end of the epoch."""
        steps = self.steps_per_epoch
        windows = min(max(1, round(steps * self.global_batch_size / self.window_size)), steps)
        return [window * steps // windows for window in range(windows + 1)]

    @cached_property
    def _part_samples(self) -> tuple[int, ...]:
        """Samples of each data set in an epoch."""
        return tuple(max(1, round(weight * int(self._rows[self._parts == part].sum()))) for part, weight in enumerate(self.weights))

    @cached_property
    def _parts(self) -> NDArray[np.int64]:
        return np.array([group.part for group in self.row_groups], np.int64)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return np.array([group.rows for group in self.row_groups], np.int64)

    @cached_property
    def _first_ids(self) -> NDArray[np.int64]:
        return np.array([group.first_id for group in self.row_groups], np.int64)
