"""The order of an epoch: a pure function of (seed, epoch, row groups of the manifest).

Row groups are permuted over the whole epoch. The permuted sequence is cut into windows, each window
into `lanes` equal parts, and the samples of each part are permuted. Global batch b takes the b-th
slice of every lane, so it mixes samples from all over the window; a rank takes whole lanes. Hence

- the global batches are the same for every number of workers that divides `lanes`;
- a rank reads (nearly) only the row groups it decodes;
- a position is one number, the count of global batches since the start of the epoch;
- every sample comes once an epoch: the last batch is filled up with samples already seen, which are
  marked as not valid and weigh nothing. Batches keep one shape, and batch norm sees real pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from eagleray.data.shards import Manifest


@dataclass(frozen=True)
class RowGroup:
    """Where a row group is: `index`-th of the shard at `shard_path`; `first_id` is its first sample's id."""

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
        row_groups: in the manifest's order.
        global_batch_size: samples per step over all ranks; a multiple of `lanes`.
        lanes: parts of a global batch.
        window_size: samples mixed at a time; rounded up to whole batches.
        seed: None keeps the manifest's order (evaluation).
    """

    row_groups: tuple[RowGroup, ...]
    global_batch_size: int
    lanes: int
    window_size: int
    seed: int | None

    @classmethod
    def of(cls, manifest: Manifest, global_batch_size: int, lanes: int, window_size: int, seed: int | None) -> EpochPlan:
        assert global_batch_size % lanes == 0
        groups, first_id = [], 0
        for shard in manifest.shards:
            for index, rows in enumerate(shard.row_group_rows):
                groups.append(RowGroup(shard.path, index, first_id, rows))
                first_id += rows
        return cls(tuple(groups), global_batch_size, lanes, window_size, seed)

    @cached_property
    def num_rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    @property
    def steps_per_window(self) -> int:
        """Steps of every window but the last, which takes up to twice as many."""
        return -(-self.window_size // self.global_batch_size)

    @property
    def num_windows(self) -> int:
        return max(1, self.num_rows // (self.steps_per_window * self.global_batch_size))

    def window_of(self, step: int) -> tuple[int, int]:
        """Return the window that holds `step` of an epoch, and the step's place within it."""
        window = min(step // self.steps_per_window, self.num_windows - 1)
        return window, step - window * self.steps_per_window

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
            filler = part if len(part) else ids
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
        size = self.steps_per_window * self.global_batch_size
        start = window * size
        stop = self.num_rows if window == self.num_windows - 1 else start + size
        order = np.arange(len(self.row_groups))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        ends = np.cumsum(self._rows[order])
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
        groups = order[first : last + 1]
        ids = np.concatenate(
            [np.arange(self.row_groups[g].first_id, self.row_groups[g].first_id + self.row_groups[g].rows) for g in groups]
        )
        offset = start - (ends[first] - self._rows[order[first]])
        return ids[offset : offset + stop - start]

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return np.array([group.rows for group in self.row_groups], np.int64)

    @cached_property
    def _first_ids(self) -> NDArray[np.int64]:
        return np.array([group.first_id for group in self.row_groups], np.int64)
