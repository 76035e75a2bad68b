"""The order of an epoch is pure, complete, and the same for any number of workers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from eagleray.data.plan import EpochPlan, RowGroup, default_window_size


def make_plan(
    num_rows: int = 1000, rows_per_group: int = 37, batch: int = 64, lanes: int = 8, window: int = 256, seed: int | None = 7
) -> EpochPlan:
    groups, first = [], 0
    while first < num_rows:
        rows = min(rows_per_group, num_rows - first)
        groups.append(RowGroup(0, f"shard-{len(groups) // 3:05d}.parquet", len(groups) % 3, first, rows))
        first += rows
    return EpochPlan(tuple(groups), batch, lanes, window, seed)


def epoch_hash(plan: EpochPlan, epoch: int, world_size: int) -> str:
    """Hash of the ordered sample ids of each global batch, put together from the ranks' parts."""
    digest = hashlib.sha256()
    for window in range(plan.num_windows):
        parts = [plan.rank_window(epoch, window, rank, world_size) for rank in range(world_size)]
        digest.update(np.concatenate([part.sample_ids for part in parts], axis=1).tobytes())
        digest.update(np.concatenate([part.is_valid for part in parts], axis=1).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("num_rows", [1, 5, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 1024])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_sample_comes_once_an_epoch(num_rows: int, seed: int | None) -> None:
    plan = make_plan(num_rows, seed=seed)
    for epoch in range(2):
        windows = [plan.window(epoch, w) for w in range(plan.num_windows)]
        ids = np.concatenate([w.sample_ids[w.is_valid] for w in windows])
        assert sorted(ids) == list(range(num_rows))
        assert sum(len(w.sample_ids) for w in windows) == plan.steps_per_epoch
        valid = np.concatenate([w.is_valid for w in windows]).sum(axis=1)
        assert list(valid) == [plan.num_valid(step) for step in range(plan.steps_per_epoch)]
        assert all((w.sample_ids >= 0).all() and (w.sample_ids < num_rows).all() for w in windows)


def test_the_global_batches_do_not_depend_on_the_number_of_workers() -> None:
    plan = make_plan()
    assert len({epoch_hash(plan, 0, world_size) for world_size in (1, 2, 4, 8)}) == 1


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else() -> None:
    plan = make_plan()
    hashes = [epoch_hash(plan, 0, 1), epoch_hash(plan, 1, 1), epoch_hash(make_plan(seed=8), 0, 1)]
    assert len(set(hashes)) == 3
    assert epoch_hash(make_plan(), 0, 1) == hashes[0]


def test_without_a_seed_the_epoch_walks_through_the_manifest() -> None:
    plan = make_plan(seed=None)
    first = plan.window(0, 0)
    assert (first.sample_ids == plan.window(5, 0).sample_ids).all()
    assert (np.sort(first.sample_ids[first.is_valid]) == np.arange(256)).all()


def test_a_position_within_an_epoch_is_found_again() -> None:
    plan = make_plan()
    batches = [row for window in range(plan.num_windows) for row in plan.window(3, window).sample_ids]
    for step in range(plan.steps_per_epoch):
        window, place = plan.window_of(step)
        assert (plan.window(3, window).sample_ids[place] == batches[step]).all()


@pytest.mark.parametrize(("rows", "row_groups", "batch", "size"), [(2_000, 80, 64, 1024), (2_000, 80, 256, 2048), (60_000, 24, 64, 80_000)])
def test_a_window_holds_a_thousand_samples_eight_batches_or_many_row_groups(rows: int, row_groups: int, batch: int, size: int) -> None:
    assert default_window_size(rows, row_groups, batch) == size


@pytest.mark.parametrize(("num_rows", "lengths"), [(600, [10]), (1600, [12, 13]), (2000, [16, 16]), (2500, [20, 20]), (2700, [14, 14, 15])])
def test_windows_are_equally_long(num_rows: int, lengths: list[int]) -> None:
    """As near to the size asked for as whole steps allow, so that no task needs twice the memory of another."""
    plan = make_plan(num_rows, window=1024)
    assert [len(plan.window(0, window).sample_ids) for window in range(plan.num_windows)] == lengths


def test_locate_finds_the_row_of_each_sample() -> None:
    plan = make_plan()
    ids = np.array([0, 36, 37, 999])
    groups, rows = plan.locate(ids)
    assert list(groups) == [0, 0, 1, 27]
    assert [plan.row_groups[g].first_id + r for g, r in zip(groups, rows, strict=True)] == list(ids)


def test_shuffling_separates_neighbours_in_storage() -> None:
    """Samples stored side by side end up far apart: half the distance of a full shuffle, or more, within a window."""
    plan = make_plan(num_rows=20_000, rows_per_group=40, batch=64, window=4096)
    ids = np.concatenate([plan.window(0, w).sample_ids.ravel()[plan.window(0, w).is_valid.ravel()] for w in range(plan.num_windows)])
    place = np.empty(len(ids), np.int64)
    place[ids] = np.arange(len(ids))
    gap = np.abs(np.diff(place))
    assert np.median(gap) > 100
    assert (gap == 1).mean() < 0.01


def test_a_rank_reads_little_more_than_its_share() -> None:
    plan = make_plan(num_rows=8192, rows_per_group=16, batch=64, window=1024)
    groups_read = 0
    for window in range(plan.num_windows):
        ids = plan.rank_window(0, window, rank=1, world_size=4).sample_ids
        groups_read += len(np.unique(plan.locate(ids.ravel())[0]))
    assert groups_read <= 1.2 * len(plan.row_groups) / 4


def make_mixture(weights: tuple[float, ...], sizes: tuple[int, ...] = (300, 100), seed: int = 7) -> EpochPlan:
    groups, first = [], 0
    for part, size in enumerate(sizes):
        for index in range(size // 10):
            groups.append(RowGroup(part, "shard-00000.parquet", index, first, 10))
            first += 10
    return EpochPlan(tuple(groups), 32, 4, 128, seed, weights)


def ids_of(plan: EpochPlan, epoch: int) -> np.ndarray:
    windows = [plan.window(epoch, window) for window in range(plan.num_windows)]
    return np.concatenate([window.sample_ids[window.is_valid] for window in windows])


def test_data_sets_are_mixed_by_weight_and_each_goes_round_evenly() -> None:
    """0.255 of the first a epoch and 2.5 passes of the second: over 200 epochs no picture comes more than once more than another."""
    plan = make_mixture((0.255, 2.5))
    counts = np.zeros(400, int)
    for epoch in range(200):
        ids = ids_of(plan, epoch)
        assert len(ids) == plan.num_rows == 76 + 250
        assert (ids < 300).sum() == 76
        counts += np.bincount(ids, minlength=400)
        assert np.ptp(counts[:300]) <= 1 and np.ptp(counts[300:]) <= 1


def test_mixed_batches_hold_both_data_sets_and_are_the_same_for_any_number_of_workers() -> None:
    plan = make_mixture((1.0, 1.0), sizes=(400, 400))
    shares = np.concatenate([(plan.window(0, window).sample_ids < 400).mean(axis=1) for window in range(plan.num_windows)])
    assert shares.min() > 0 and shares.max() < 1
    assert epoch_hash(plan, 3, 1) == epoch_hash(plan, 3, 4)
