"""A training run on Ray Train, as the driver sees it: what it needs, what it starts, and how it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray._private.state import available_resources_per_node
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from eagleray import storage
from eagleray.artifacts.checkpoint import load_state
from eagleray.artifacts.filesystem import open_resilient
from eagleray.artifacts.runs import BEST_NAME, forget_lost_checkpoints, load_history
from eagleray.config.schema import ElasticWorkers, JobConfig, TrainingConfig
from eagleray.data.mixture import load_training_set
from eagleray.data.shards import load_manifest
from eagleray.errors import DataError, Interrupted
from eagleray.models.zoo import check_input
from eagleray.placement import cluster_for, on_group, total, work_nodes
from eagleray.training.board import Message, News
from eagleray.training.elastic import LanesPolicy
from eagleray.training.failures import RunCallback, explain
from eagleray.training.finetune import check_finetune
from eagleray.training.progress import STOPPED, Follower
from eagleray.training.resources import WorkerResources, share_resources, validates_beside

T = TypeVar("T")

ELASTIC_CHECK_S = 20.0
"""Seconds between looks for room for more workers in an elastic run."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: its best epoch by validation top-1, and the metrics of each epoch, those before a resume too."""

    run_name: str
    run_uri: str
    checkpoint_uri: str
    """Holds the weights of the best epoch."""
    metrics: dict[str, float]
    """Of the best epoch."""
    history: list[dict[str, float]] = field(repr=False)


def run_training(job: JobConfig, run_name: str, *, on_news: Callable[[News], None] = lambda news: None) -> TrainingResult:
    """Train on the connected cluster until the job's last epoch, or go on from the run's newest checkpoint.

    In the main thread, Ctrl-C and SIGTERM end the run with a checkpoint; a second one ends it at once.

    Args:
        job: as `check_inputs` lets it pass.
        run_name: a run that `claim_run` has claimed.
        on_news: called in this process, from a thread, with what the run tells of itself.

    Raises:
        TrainingError: the workers failed too often.
        DataError: shards are missing or damaged.
        StorageError: checkpoints cannot be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been saved.
    """
    is_beside = validates_beside(job.train, _free_resources(job.train))
    num_shares = job.train.max_workers + is_beside
    resources = share_resources(cluster_for(num_shares, job.train.use_gpu), num_shares, job.train.use_gpu)
    run_uri = storage.join(job.workspace.runs_uri, run_name)
    filesystem, runs_path = open_resilient(job.workspace.runs_uri)
    for name in forget_lost_checkpoints(run_uri):
        on_news(Message(f"warning: checkpoint '{name}' is missing; going back to the one before"))
    with Follower(on_news) as follower, _stop_on_signals(follower.board) as signals:
        trainer = _Trainer(
            _train_loop_per_worker,
            train_loop_config={
                "job": job.model_dump(mode="json"),
                "resources": resources,
                "is_beside": is_beside,
                "run_uri": run_uri,
                "board": follower.board,
            },
            scaling_config=_scaling(job, resources),
            run_config=RunConfig(
                name=run_name,
                storage_path=runs_path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=job.train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=job.train.checkpoints_to_keep),
                callbacks=[RunCallback(follower.board)],
            ),
        )
        try:
            result = _in_a_thread(trainer.fit)
        except TrainingFailedError as error:
            raise explain(error, run_name, run_uri) from error
    if result.return_value == STOPPED:
        raise Interrupted(
            f"run '{run_name}' was stopped and has saved where it is; go on with --resume {run_name}",
            signals[0] if signals else signal.SIGTERM,
        )
    return load_result(job.workspace.runs_uri, run_name)


def load_result(runs_uri: str, run_name: str) -> TrainingResult:
    """Return what a finished run left.

    Raises:
        TrainingError: it has no weights yet, or they are damaged.
    """
    run_uri = storage.join(runs_uri, run_name)
    best_uri = storage.join(run_uri, BEST_NAME)
    return TrainingResult(run_name, run_uri, best_uri, load_state(best_uri)["metrics"], load_history(run_uri))


def check_inputs(job: JobConfig) -> str:
    """Refuse a job that could only fail later: splits that do not fit, a network that cannot be built, missing GPUs.

    Returns:
        What the job will work on, and with, in a line.

    Raises:
        DataError, ConfigError, TrainingError: says which.
    """
    workers, use_gpu = job.train.max_workers, job.train.use_gpu
    resources = share_resources(cluster_for(workers, use_gpu), workers, use_gpu)
    training_set = load_training_set(job.data)
    for key, uri in (("data.val", job.data.val), ("data.test", job.data.test)):
        if uri is not None and (classes := load_manifest(uri).classes) != training_set.classes:
            raise DataError(
                f"{key} '{uri}' has {len(classes)} classes, data.train {training_set} has {len(training_set.classes)}, or in another "
                "order; ingest both from one source with --split, or give folders with the same class names"
            )
    empty = [name for name, count in training_set.class_counts.items() if not count]
    if empty:
        raise DataError(
            f"data.train {training_set}: no picture of class '{empty[0]}' ({len(empty)} empty classes); add some or remove the class"
        )
    sizes = {"data.image_size": job.data.image_size}
    if job.data.train_size is not None:
        sizes |= {"data.train_size.start": job.data.train_size.start, "data.train_size.end": job.data.train_size.end}
    for key, size in sizes.items():
        check_input(job.model, len(training_set.classes), job.data.image_size, key, size)
    check_finetune(job, len(training_set.classes))
    device = f"{resources.gpus:g} GPU" if resources.gpus else f"{resources.threads} CPU thread(s)"
    pictures = sum(training_set.class_counts.values())
    return f"{pictures:,} pictures in {len(training_set.classes)} classes, {workers} worker(s) with {device} each"


def _scaling(job: JobConfig, resources: WorkerResources) -> ScalingConfig:
    workers = job.train.num_workers
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return ScalingConfig(
        num_workers=(workers.min, workers.max) if isinstance(workers, ElasticWorkers) else workers,
        elastic_resize_monitor_interval_s=ELASTIC_CHECK_S,
        use_gpu=resources.gpus > 0,
        resources_per_worker=per_worker,
        label_selector=on_group("train"),
    )


def _free_resources(train: TrainingConfig) -> dict[str, float]:
    """Return what nobody holds now, and what may be added for one share more than there are workers."""
    available = available_resources_per_node()
    free = total({node_id: available.get(node_id, {}) for node_id in work_nodes()})
    now, then = cluster_for(0, train.use_gpu), cluster_for(train.max_workers + 1, train.use_gpu)
    return {key: free.get(key, 0) + amount - now.get(key, 0) for key, amount in then.items()}


class _Trainer(TorchTrainer):
    """Ray Train lets nobody choose the policy of elastic runs from outside, nor leave out what a run has no use for."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # Its actor waits for data sets that are given to the trainer; the workers' streams are their own.
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            config = self.train_loop_config
            options["scaling_policy"] = LanesPolicy(self.scaling_config, config["job"]["data"]["lanes"], config["board"])
        return super()._initialize_and_run_controller(**options)


def _in_a_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns, run in a thread so that signals reach this one (and not Ray Train's own handler of Ctrl-C)."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    return outcome.result()


@contextmanager
def _stop_on_signals(board: Any) -> Iterator[list[int]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop, a later one into KeyboardInterrupt; gives those that came."""
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        board.stop.remote()
        board.post.remote(Message("stopping: saving a checkpoint; once more to stop at once"))

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_loop_per_worker(config: dict[str, Any]) -> str | None:
    from eagleray.training.worker import train_on_worker  # and with it what only workers need

    return train_on_worker(config)
