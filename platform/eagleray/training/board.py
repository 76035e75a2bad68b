"""Where a run's ranks and its driver meet: an actor on the driver's node.

It imports nothing that takes long, so that the actor is up at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Progress:
    """Where a run stands within an epoch.

    Attributes:
        epoch: from 0.
        step: steps of the epoch that are done.
        images_per_s: of all ranks, since the last report.
        loss, top1: of this epoch's training pictures so far, of rank 0's share of them.
        data_wait_fraction: share of the time since the last report that rank 0 waited for pictures.
        rollbacks: times that the run has gone back to an earlier checkpoint.
        eta_s: seconds until the last epoch has been trained, at this rate and without validation.
    """

    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int
    images_per_s: float
    loss: float
    top1: float
    data_wait_fraction: float
    rollbacks: int
    eta_s: float


@dataclass(frozen=True)
class EpochEnd:
    """The metrics of an epoch, told once its files are safe."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Message:
    """A line for the user."""

    text: str


News = Progress | EpochEnd | Message


@ray.remote(num_cpus=0)
class Board:
    """Keeps news until the driver takes them."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._is_closed = False
        self._has_something = asyncio.Event()
        self._is_stopping = False
        self._saves_asked = 0
        self._num_checkpoints = 0

    def post(self, news: News) -> None:
        self._news.append(news)
        self._has_something.set()

    async def take(self) -> tuple[list[News], bool]:
        """Wait for news; return them, and whether they are the last ones."""
        await self._has_something.wait()
        news, self._news = self._news, []
        if not self._is_closed:
            self._has_something.clear()
        return news, self._is_closed

    def close(self) -> None:
        """Let who waits for news go."""
        self._is_closed = True
        self._has_something.set()

    def stop(self) -> None:
        self._is_stopping = True

    def ask_to_save(self) -> int:
        """Have a checkpoint made at the next look; returns how many are safe by now."""
        self._saves_asked += 1
        return self._num_checkpoints

    def note_checkpoint(self) -> None:
        self._num_checkpoints += 1

    def num_checkpoints(self) -> int:
        return self._num_checkpoints

    def wishes(self) -> tuple[bool, int]:
        """Return whether to stop, and how often a checkpoint was asked for."""
        return self._is_stopping, self._saves_asked
