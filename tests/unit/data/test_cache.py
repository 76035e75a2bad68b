"""The cache of row groups: bounded, shared by processes, and never in the way."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagleray.data.cache import RowGroupCache

SCHEMA = pa.schema([pa.field("image", pa.binary())])
SIZE = 10_000


def table(number: int) -> pa.Table:
    return pa.table({"image": [bytes([number % 256]) * SIZE]}, schema=SCHEMA)


def name(number: int) -> str:
    return f"{number:064x}"


def held_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("??/*"))


def test_the_least_recently_used_goes_first_and_the_limit_holds(tmp_path: Path) -> None:
    cache = RowGroupCache(str(tmp_path), 10 * SIZE)
    for number in range(30):
        cache.put(name(number), 0, table(number))
        assert held_bytes(tmp_path) <= cache.limit_bytes
        # Modification times stand for the order of use; kernels update them only every few milliseconds.
        os.utime(next(tmp_path.glob(f"??/{name(number)}-*")), ns=(number * 10**9, number * 10**9))
        assert number == 0 or cache.get(name(0), 0, SCHEMA) == table(0)
    assert cache.get(name(29), 0, SCHEMA) == table(29)
    assert cache.get(name(1), 0, SCHEMA) is None


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    cache = RowGroupCache(str(tmp_path), SIZE)
    cache.put(name(1), 0, table(1))
    assert held_bytes(tmp_path) == 0
    assert cache.get(name(1), 0, SCHEMA) is None


def test_what_is_damaged_is_forgotten(tmp_path: Path) -> None:
    cache = RowGroupCache(str(tmp_path), 10 * SIZE)
    cache.put(name(1), 3, table(1))
    (path,) = tmp_path.glob("??/*")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[: SIZE // 2] + b"?" + whole[SIZE // 2 + 1 :]):
        path.write_bytes(damaged)
        assert cache.get(name(1), 3, SCHEMA) is None
        assert not path.exists()
    cache.put(name(1), 3, table(1))
    assert cache.get(name(1), 3, SCHEMA) == table(1)


def test_a_file_in_use_outlives_its_eviction(tmp_path: Path) -> None:
    cache = RowGroupCache(str(tmp_path), 3 * SIZE)
    cache.put(name(1), 0, table(1))
    (path,) = tmp_path.glob("??/*")
    with open(path, "rb") as file:
        for number in range(2, 9):
            cache.put(name(number), 0, table(number))
        assert not path.exists()
        assert pq.ParquetFile(file).read() == table(1)


def test_a_lost_sum_is_counted_anew(tmp_path: Path) -> None:
    cache = RowGroupCache(str(tmp_path), 5 * SIZE)
    cache.put(name(1), 0, table(1))
    for text in ("", "damaged"):
        (tmp_path / "total").write_text(text)
        for number in range(2, 12):
            cache.put(name(number), 0, table(number))
            assert held_bytes(tmp_path) <= cache.limit_bytes


def is_exceeded(cache: RowGroupCache) -> bool:
    """Count while no other process writes; a listing that others change could count what was never there at once."""
    with open(Path(cache.directory, "total"), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return held_bytes(Path(cache.directory)) > cache.limit_bytes


def work(directory: str, seed: int) -> tuple[int, int]:
    """Put and get many; return how often the limit was exceeded and how often another table came."""
    cache = RowGroupCache(directory, 8 * SIZE)
    exceeded = wrong = 0
    for number in range(60):
        wanted = (number * seed) % 12
        found = cache.get(name(wanted), 0, SCHEMA)
        if found is None:
            cache.put(name(wanted), 0, table(wanted))
        elif found != table(wanted):
            wrong += 1
        exceeded += is_exceeded(cache)
    return exceeded, wrong


@pytest.mark.slow
def test_processes_share_it_without_a_wrong_table_or_a_byte_too_much(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, [str(tmp_path)] * 4, [1, 5, 7, 11]))
    assert results == [(0, 0)] * 4
