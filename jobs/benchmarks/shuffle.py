"""How well an epoch is mixed: computed from the plan alone, beside a full shuffle, on a data set of ImageNet's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eagleray.config.schema import DataConfig
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, ShardInfo

NUM_PICTURES, NUM_CLASSES = 1_281_167, 1_000
GLOBAL_BATCH_SIZE = 1_024
ROWS_PER_GROUP = 20
"""A row group of 2 MB with pictures of 100 KB."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Mixing:
    """How one order mixes what is stored.

    Attributes:
        neighbour_distance: median distance, in an epoch's order, of two samples that are stored side by side.
        class_distance: mean over batches of the total variation distance of their classes from those of all; 0 is
            the same mix, 1 nothing in common. A batch drawn at random is not at 0 either.
    """

    neighbour_distance: float
    class_distance: float


def measure_orders(num_pictures: int = NUM_PICTURES) -> dict[str, Mixing]:
    """Return the mixing of each order by its name; the last two of a data set whose storage order was not shuffled at ingest."""
    rng = np.random.default_rng(0)
    in_order = np.arange(num_pictures)
    by_class = in_order * NUM_CLASSES // num_pictures
    planned = planned_order(num_pictures)
    return {
        "full shuffle": mixing(rng.permutation(num_pictures), by_class),
        "eagleray": mixing(planned, rng.permutation(by_class)),
        "eagleray, stored by class": mixing(planned, by_class),
        "unshuffled, stored by class": mixing(in_order, by_class),
    }


def planned_order(num_pictures: int) -> Ids:
    """Return the order in which the plan with default settings shows the samples of a first epoch."""
    data = DataConfig(train="-", val="-")
    groups = [min(ROWS_PER_GROUP, num_pictures - start) for start in range(0, num_pictures, ROWS_PER_GROUP)]
    shard = ShardInfo(path="-", rows=num_pictures, size_bytes=0, sha256="", row_group_rows=groups, class_counts={})
    manifest = Manifest(classes=[], shards=[shard], source="-")
    plan = EpochPlan.of(manifest, GLOBAL_BATCH_SIZE, data.lanes, data.shuffle_window, seed=0)
    windows = [plan.window(0, window) for window in range(plan.num_windows)]
    return np.concatenate([steps.sample_ids[steps.is_valid] for steps in windows])


def mixing(order: Ids, labels: Ids) -> Mixing:
    """Measure an order of the ids 0..N-1 whose classes are `labels`."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    num_batches = len(order) // GLOBAL_BATCH_SIZE
    overall = np.bincount(labels, minlength=NUM_CLASSES) / len(labels)
    batches = labels[order[: num_batches * GLOBAL_BATCH_SIZE]].reshape(num_batches, GLOBAL_BATCH_SIZE)
    distances = [np.abs(np.bincount(batch, minlength=NUM_CLASSES) / GLOBAL_BATCH_SIZE - overall).sum() / 2 for batch in batches]
    return Mixing(float(np.median(np.abs(np.diff(places)))), float(np.mean(distances)))
