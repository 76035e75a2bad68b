"""Batches of what comes together: nobody waits for others but while the model is busy."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Gives `run` what waits, up to `max_size` items at once, one batch after the other.

    An item that finds nothing running is a batch of its own, at once; those that come while a batch runs are the next one, so that
    batches grow with the load by themselves. Items whose callers have gone (cancelled) are not run.
    """

    def __init__(self, run: Callable[[list[Item]], Awaitable[list[Result]]], max_size: int) -> None:
        self.max_size = max_size
        self._run = run
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Return the item's result. Raises what `run` raised for its batch."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run_what_waits())
        return await future

    async def _run_what_waits(self) -> None:
        try:
            while batch := self._next():
                await self._run_batch(batch)
        finally:
            self._runner = None

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
            answered = list(zip(batch, results, strict=True))
        except Exception as error:  # of whatever kind: it is the callers'
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in answered:
            if not future.done():
                future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self.max_size:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
