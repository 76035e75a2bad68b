"""One trial: a real training run on the shared stream, an epoch per step.

A `Trainable` class rather than a function: Ray Tune can then keep the process for the next trial, so
that starting Python and torch, the dear part of a short trial, is paid once per slot.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import ray.tune
import torch

from eagleray.artifacts.checkpoint import load_state, save_state
from eagleray.config.load import build_job
from eagleray.training.loop import Pause, Worker, train
from eagleray.training.resources import WorkerResources
from eagleray.tuning.search_space import apply_values


class TrainingTrial(ray.tune.Trainable):
    """Trains a job with one point of its search space, on one worker; reports each epoch."""

    _epochs: Generator[Pause, None, None]

    def setup(self, config: dict[str, Any], job: dict[str, Any], resources: WorkerResources) -> None:
        self._search_job = build_job(job)
        self._resources = resources
        self._start(config)

    def step(self) -> dict[str, Any]:
        self._end = next(pause for pause in self._epochs if pause.is_epoch_end)
        is_last_epoch = self._end.epoch + 1 == self._job.train.epochs
        return {**self._end.metrics, "is_last_epoch": is_last_epoch, "done": is_last_epoch}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        save_state(checkpoint_dir, self._end.state())

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._epochs.close()
        self._epochs = train(self._job, self._worker, resume=load_state(checkpoint))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._epochs.close()
        self._start(new_config)
        return True

    def cleanup(self) -> None:
        self._epochs.close()

    def _start(self, values: dict[str, Any]) -> None:
        self._job = apply_values(self._search_job, values)
        self._worker = Worker(
            rank=0,
            world_size=1,
            device=torch.device("cuda" if self._resources.gpus else "cpu"),
            threads=self._resources.threads,
            train_decode=self._resources.train_decode,
            eval_decode=self._resources.eval_decode,
        )
        self._epochs = train(self._job, self._worker)
