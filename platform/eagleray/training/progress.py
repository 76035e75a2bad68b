"""What goes on in a run, from its rank 0 to the driver, and the driver's wish to stop, the other way.

Both meet at the board, an actor on the driver's node. Nobody waits for it: rank 0 posts figures every few seconds, and
looks every few steps whether it shall stop. The ranks then agree on the step, so that all pause at the same one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import PreemptionInfo
from ray.train.collective import broadcast_from_rank_zero
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eagleray.config.schema import JobConfig
from eagleray.training.board import Board, Message, News, Progress

if TYPE_CHECKING:
    from eagleray.training.loop import StepEnd

STOPPED = "stopped"
"""What rank 0 returns where it was asked to stop."""

PROGRESS_EVERY_S = 1.0
AGREE_EVERY_STEPS = 10
"""Steps between looks at whether to stop or to save; each takes a few milliseconds."""

LAST_SAVE_S = 10.0
"""Seconds before a node is taken away by which the last checkpoint with it is begun."""


class DrainSaves:
    """When to save because nodes will be taken away: at the notice, and by the last look that is early enough."""

    def __init__(self) -> None:
        self._looked: float | None = None
        self._is_noticed = False
        self._last_chance: float | None = None

    def is_due(self, now: float, drain: PreemptionInfo | None) -> bool:
        """Return whether to save now. To be asked at about even intervals; `now` in seconds since the epoch."""
        next_look = now if self._looked is None else 2 * now - self._looked
        self._looked = now
        if drain is None:
            self._is_noticed, self._last_chance = False, None
            return False
        is_last_chance = drain.deadline_ms is not None and next_look > drain.deadline_ms / 1000 - LAST_SAVE_S
        # The interval may have been longer than the next one will be (a pause for validation): then one more save follows.
        is_last_chance &= self._last_chance is None or now - self._last_chance > LAST_SAVE_S
        if is_last_chance:
            self._last_chance = now
        is_due, self._is_noticed = is_last_chance or not self._is_noticed, True
        return is_due


class Watch:
    """A rank's end: called after each step, it reports, and says whether to pause here; then see `must_stop`."""

    def __init__(self, board: Any, job: JobConfig, rank: int) -> None:
        self._board = board
        self._job = job
        self._rank = rank
        self._steps = 0
        self._answer: Any = None
        self._saves_done = 0
        self._drain = DrainSaves()
        self._last = (time.perf_counter(), 0, 0.0)
        self.rollbacks = 0
        self.must_stop = False
        self.must_save = False

    def after_step(self, end: StepEnd) -> bool:
        """Return whether to pause after this step, on all ranks alike."""
        if self._rank == 0:
            self._report(end)
        self._steps += 1
        if self._steps % AGREE_EVERY_STEPS:
            return False
        self._agree()
        return self.must_save

    def _agree(self) -> None:
        drain = ray.train.get_preemption_info()  # the same on all ranks
        told = (*self._wishes(), self._drain.is_due(time.time(), drain)) if self._rank == 0 else None
        self.must_stop, is_save_asked, is_drain_save_due = broadcast_from_rank_zero(told)
        self.must_save = self.must_stop or is_save_asked or is_drain_save_due
        if is_drain_save_due and self._rank == 0:
            self._board.post.remote(Message(f"{len(drain.preempted_node_ids)} node(s) are to be taken away: saving a checkpoint"))

    def _wishes(self) -> tuple[bool, bool]:
        """Return whether to stop and whether to save by the board's last answer, and ask it again; that is there by the next call."""
        is_stopping, saves_asked = ray.get(self._answer) if self._answer is not None else (False, self._saves_done)
        self._answer = self._board.wishes.remote()
        is_save_asked, self._saves_done = saves_asked > self._saves_done, saves_asked
        return is_stopping, is_save_asked

    def _report(self, end: StepEnd) -> None:
        now, (then, count, wait_s) = time.perf_counter(), self._last
        if now - then < PROGRESS_EVERY_S:
            return
        if then < end.batches.start:  # a new epoch
            then, count, wait_s = end.batches.start, 0, 0.0
        self._last = (now, end.batches.count, end.batches.wait_s)
        steps_per_s = (end.batches.count - count) / (now - then)
        epochs = self._job.train.epochs
        steps_left = (epochs - end.epoch) * end.steps_per_epoch - end.step - 1
        loss, top1 = end.account.so_far()
        self._board.post.remote(
            Progress(
                epoch=end.epoch,
                epochs=epochs,
                step=end.step + 1,
                steps_per_epoch=end.steps_per_epoch,
                images_per_s=steps_per_s * self._job.train.global_batch_size,
                loss=loss,
                top1=top1,
                data_wait_fraction=(end.batches.wait_s - wait_s) / (now - then),
                rollbacks=self.rollbacks,
                eta_s=steps_left / steps_per_s,
            )
        )


class Follower:
    """The driver's end: hands news on as they come, from a thread of its own."""

    def __init__(self, on_news: Callable[[News], None]) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._on_news = on_news
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.board.close.remote()
        self._thread.join()
        ray.kill(self.board)
        if error is None and self._error is not None:
            raise self._error

    def _follow(self) -> None:
        is_over = False
        while not is_over:
            some, is_over = ray.get(self.board.take.remote())
            for news in some:
                try:
                    self._on_news(news)
                except Exception as error:  # the run goes on; it is raised at its end
                    self._error = self._error or error
