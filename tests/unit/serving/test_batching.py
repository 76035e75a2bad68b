from __future__ import annotations

import asyncio

import pytest

from eagleray.serving.batching import Batcher

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Doubler:
    """Doubles numbers; a batch with a negative one fails. While `free` is clear, no batch ends."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.free.wait()
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]


async def test_one_that_finds_nothing_running_is_run_at_once() -> None:
    run = Doubler()
    batcher = Batcher(run, max_size=8)
    assert [await batcher(1), await batcher(2)] == [2, 4]
    assert run.batches == [[1], [2]]


async def test_those_that_come_together_are_one_batch() -> None:
    run = Doubler()
    batcher = Batcher(run, max_size=8)
    assert await asyncio.gather(*(batcher(i) for i in range(4))) == [0, 2, 4, 6]
    assert run.batches == [[0, 1, 2, 3]]


async def test_those_that_come_while_a_batch_runs_are_the_next_ones() -> None:
    run = Doubler()
    batcher = Batcher(run, max_size=2)
    run.free.clear()
    callers = [asyncio.create_task(batcher(0))]
    await asyncio.sleep(0.01)
    callers += [asyncio.create_task(batcher(i)) for i in range(1, 6)]
    await asyncio.sleep(0.01)
    run.free.set()
    assert await asyncio.gather(*callers) == [0, 2, 4, 6, 8, 10]
    assert run.batches == [[0], [1, 2], [3, 4], [5]]


async def test_one_whose_caller_has_gone_is_not_run() -> None:
    run = Doubler()
    batcher = Batcher(run, max_size=2)
    run.free.clear()
    callers = [asyncio.create_task(batcher(i)) for i in range(5)]
    await asyncio.sleep(0.01)
    callers[1].cancel()  # it is being run already
    callers[2].cancel()
    await asyncio.sleep(0.01)
    run.free.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert run.batches == [[0, 1], [3, 4]]
    assert results[0] == 0 and results[3:] == [6, 8]
    assert all(isinstance(result, asyncio.CancelledError) for result in results[1:3])


async def test_a_batch_that_fails_fails_its_callers_alone() -> None:
    run = Doubler()
    batcher = Batcher(run, max_size=2)
    results = await asyncio.gather(*(batcher(i) for i in (1, -1, 2)), return_exceptions=True)
    assert [isinstance(result, ValueError) for result in results] == [True, True, False] and results[2] == 4
    assert await batcher(3) == 6


async def test_a_batch_with_too_few_results_fails_its_callers_and_the_next_one_is_run() -> None:
    async def run(items: list[int]) -> list[int]:
        return items[:1]

    batcher = Batcher(run, max_size=2)
    results = await asyncio.gather(*(batcher(i) for i in range(2)), return_exceptions=True)
    assert [isinstance(result, ValueError) for result in results] == [True, True]
    assert await batcher(3) == 3
