"""One trial: a real training run on the shared stream, an epoch per step.

A `Trainable` class rather than a function: Ray Tune can then keep the processes for the next trial, so
that starting Python and torch, the dear part of a short trial, is paid once per slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import ray
import ray.tune
import torch
import torch.distributed as dist
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from eagleray.artifacts.checkpoint import load_state, save_state
from eagleray.config.load import build_job
from eagleray.config.schema import OBJECTIVES, SERVING_OBJECTIVES, JobConfig
from eagleray.data.mixture import load_training_set
from eagleray.errors import SearchError
from eagleray.models.size import network_size
from eagleray.models.zoo import build_model
from eagleray.training.finetune import find_head, freeze_parts
from eagleray.training.logs import name_log
from eagleray.training.loop import Pause, Worker, train
from eagleray.training.recipe import build_optimizer, with_hyperparameters
from eagleray.training.resources import WorkerResources
from eagleray.tuning.latency import measure_where_it_is_served
from eagleray.tuning.search_space import apply_values

GROUP_TIMEOUT = timedelta(minutes=10)
"""How long a worker of a trial waits for another one that neither answers nor has died."""

CAUSE_S = 5.0
"""Seconds within which the worker that failed first is to say so, once another has noticed."""


class TrialWorker:
    """A place among the workers of a slot for trials, which trains one trial after another."""

    def __init__(self, rank: int, world_size: int, resources: WorkerResources) -> None:
        self._worker = Worker(
            rank=rank,
            world_size=world_size,
            device=torch.device("cuda", 0) if resources.gpus else torch.device("cpu"),
            threads=resources.threads,
            train_decode=resources.train_decode,
            eval_decode=resources.eval_decode,
        )
        self._epochs: Generator[Pause, None, None] | None = None

    def join(self, store: TCPStore) -> None:
        """Be in one group with the others, who meet at the first one's `store`."""
        worker = self._worker
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=worker.rank, world_size=worker.world_size, timeout=GROUP_TIMEOUT)

    def start(self, trial: str, job: JobConfig, state: dict[str, Any] | None = None) -> None:
        """Be about to train a job, from its start or after `state`."""
        self.close()
        name_log(f"{trial}, worker {self._worker.rank}")
        self._epochs = train(job, self._worker, state)

    def step(self) -> Pause | None:
        """Train an epoch, with the others; return its end, or None where there was none left."""
        assert self._epochs is not None
        return next((pause for pause in self._epochs if pause.is_epoch_end), None)

    def close(self) -> None:
        if self._epochs is not None:
            self._epochs.close()


@ray.remote
class Peer:
    """A worker besides the first, which alone tells of the trial."""

    def __init__(self, *place: Any) -> None:
        self._worker = TrialWorker(*place)

    def join(self, host: str, port: int) -> None:
        self._worker.join(TCPStore(host, port, timeout=GROUP_TIMEOUT))

    def start(self, trial: str, job: JobConfig, state: dict[str, Any] | None) -> None:
        self._worker.start(trial, job, state)

    def step(self) -> None:
        try:
            self._worker.step()
        except Exception:
            dist.destroy_process_group()  # the others would wait for this one
            raise


class TrainingTrial(ray.tune.Trainable):
    """Trains a job with one point of its search space and reports each epoch; is the first of its workers."""

    _state: Callable[[], dict[str, Any]]
    """Gives what it takes to go on after the last epoch."""
    _metrics: dict[str, float]
    """Of the last epoch, with the network's size."""

    def setup(self, config: dict[str, Any], job: dict[str, Any], resources: WorkerResources, run_name: str) -> None:
        self._search_job = build_job(job)
        self._run_name = run_name
        world_size = self._search_job.train.max_workers
        self._worker = TrialWorker(0, world_size, resources)
        self._peers = [_start_peer(rank, world_size, resources) for rank in range(1, world_size)]
        if self._peers:
            host = ray.util.get_node_ip_address()
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
            joined = [peer.join.remote(host, store.port) for peer in self._peers]
            self._worker.join(store)
            ray.get(joined)
        self._start(config)

    def step(self) -> dict[str, Any]:
        others = [peer.step.remote() for peer in self._peers]
        try:
            end = self._worker.step()
            ray.get(others)
        except Exception:
            ended, _ = ray.wait(others, num_returns=len(others), timeout=CAUSE_S)
            ray.get(ended)  # the first one to fail, of which the others only know that it is gone
            raise
        if end is not None:
            self._state, self._metrics = end.state, end.metrics | self._network_figures
            check_objectives(self._metrics)
        # Else it was at its end already, and whoever it told of that has died since: it is told again.
        is_last_epoch = int(self._metrics["epoch"]) + 1 == self._job.train.epochs
        return {**self._metrics, "is_last_epoch": is_last_epoch, "done": is_last_epoch}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        save_state(checkpoint_dir, {**self._state(), "metrics": self._metrics})

    def load_checkpoint(self, checkpoint: Any) -> None:
        state = load_state(checkpoint)
        assert self._job.tune is not None
        if self._job.tune.is_population:  # it may be another trial's
            state = with_hyperparameters(state, _fresh_optimizer(self._job, self._num_classes))
        self._state, self._metrics = lambda: state, state["metrics"]
        self._start_workers(state)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def cleanup(self) -> None:
        self._worker.close()
        for peer in self._peers:
            ray.kill(peer)

    def _start(self, values: dict[str, Any]) -> None:
        self._job = job = apply_values(self._search_job, values)
        classes = load_training_set(job.data).classes
        self._num_classes = len(classes)
        self._network_figures = asdict(network_size(job.model, len(classes), job.data.image_size))
        assert job.tune is not None
        if job.tune.measures_serving:
            self._network_figures |= measure_where_it_is_served(job, classes)
        self._start_workers(None)

    def _start_workers(self, state: dict[str, Any] | None) -> None:
        trial = f"search {self._run_name}, trial {self.trial_id}"
        others = [peer.start.remote(trial, self._job, state) for peer in self._peers]
        self._worker.start(trial, self._job, state)
        ray.get(others)


def _fresh_optimizer(job: JobConfig, num_classes: int) -> torch.optim.Optimizer:
    model = build_model(job.model, num_classes, job.data.image_size)
    freeze_parts(model, job.train.finetune.freeze)
    return build_optimizer(model, job.train, find_head(job, num_classes))


def _start_peer(rank: int, world_size: int, resources: WorkerResources) -> Any:
    place = PlacementGroupSchedulingStrategy(get_current_placement_group(), placement_group_bundle_index=rank)
    options = Peer.options(num_cpus=resources.cpus, num_gpus=resources.gpus, scheduling_strategy=place)  # type: ignore[attr-defined]
    return options.remote(rank, world_size, resources)


def check_objectives(metrics: dict[str, float]) -> None:
    """Refuse an epoch by which trials cannot be compared.

    Raises:
        SearchError: an objective is not a finite number.
    """
    for name in OBJECTIVES:
        if name in SERVING_OBJECTIVES and name not in metrics:
            continue  # nobody asked for it
        if not math.isfinite(metrics[name]):
            raise SearchError(
                f"{name} is {metrics[name]} after epoch {int(metrics['epoch']) + 1}, by which no trial can be compared; "
                "narrow the range of train.optimizer.lr, or set train.grad_clip_norm"
            )
