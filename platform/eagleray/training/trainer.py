"""A training run on Ray Train: workers, checkpoints, failures, progress."""

from __future__ import annotations

import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.report_config import CheckpointConsistencyMode, CheckpointUploadMode

from eagleray import storage
from eagleray.artifacts.checkpoint import CHECKPOINT_NAME, SHARDS_NAME, dump_state, load_state
from eagleray.artifacts.filesystem import open_resilient
from eagleray.artifacts.runs import (
    BEST_NAME,
    HISTORY_NAME,
    QUARANTINE_NAME,
    Rollback,
    checkpoint_step,
    forget_lost_checkpoints,
    load_history,
    load_rollbacks,
    save_rollbacks,
)
from eagleray.config.load import build_job
from eagleray.config.schema import ElasticWorkers, JobConfig, TrainingConfig
from eagleray.data.mixture import load_training_set
from eagleray.data.shards import load_manifest
from eagleray.errors import DataError, Interrupted, TrainingError
from eagleray.models.zoo import check_input
from eagleray.placement import cluster_for, on_group, total, work_nodes
from eagleray.training.board import EpochEnd, Message, News
from eagleray.training.confusion import confusion_files
from eagleray.training.elastic import LanesPolicy, cluster_beside_serving
from eagleray.training.evaluation import start_evaluation
from eagleray.training.failures import RunCallback, explain, reason_of, users_error
from eagleray.training.finetune import check_finetune
from eagleray.training.guards import Diverged
from eagleray.training.logs import name_log
from eagleray.training.loop import Evaluation, Pause, Worker, train
from eagleray.training.parallel import is_sharded
from eagleray.training.progress import Follower, Watch
from eagleray.training.resources import WorkerResources, share_resources, share_what_is_left, validates_beside

T = TypeVar("T")

STOPPED = "stopped"
"""What rank 0 returns where it was asked to stop."""

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
    """Ray Train lets nobody choose the policy of elastic runs from outside."""

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
    job = build_job(config["job"])
    board, run_uri = config["board"], config["run_uri"]
    context = ray.train.get_context()
    name_log(f"run {context.get_experiment_name()}, worker {context.get_world_rank()}")
    num_shares = context.get_world_size() + config["is_beside"]
    resources: WorkerResources = share_what_is_left(config["resources"], cluster_beside_serving(), num_shares)
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        threads=resources.threads,
        train_decode=resources.train_decode,
        eval_decode=resources.eval_decode,
    )
    watch = Watch(board, job, worker.rank)

    def validate(weights: dict[str, Any]) -> Any:
        return start_evaluation(job, weights, job.data.val, "val", resources, worker.world_size)

    beside = validate if config["is_beside"] else None
    outcome: str | Diverged | None
    outcome = _go_on(job, worker, run_uri, board, watch, beside)
    while isinstance(outcome, Diverged):
        gc.collect()  # what the device held of the attempt that is over, before the next one takes its place
        if worker.rank == 0:
            _roll_back(job, run_uri, board, outcome)
        outcome = _go_on(job, worker, run_uri, board, watch, beside)
    return outcome


def _go_on(
    job: JobConfig, worker: Worker, run_uri: str, board: Any, watch: Watch, validate: Callable[[dict[str, Any]], Any] | None
) -> str | Diverged | None:
    """Train on after the newest checkpoint.

    Args:
        validate: begins to validate weights elsewhere; None: the workers do so.

    Returns:
        None at the end of the run, `STOPPED` where it was asked to stop, or why it has to go back.
    """
    rollbacks = broadcast_from_rank_zero(load_rollbacks(run_uri) if worker.rank == 0 else None)
    resume = _load_newest_whole(worker.rank, board, rollbacks)
    if worker.rank == 0 and resume is not None:
        board.post.remote(Message(f"going on after step {resume['steps_done']} on {worker.world_size} worker(s)"))
    watch.rollbacks = len(rollbacks)
    history = []
    if worker.rank == 0 and resume is not None:  # it is written before the checkpoint, and may know of epochs that are to be done again
        history = [metrics for metrics in load_history(run_uri) if metrics["epoch"] < resume["epochs_done"]]
    files = _Files(run_uri, board, worker.rank, history, validate)
    try:
        rolled_back = [rollback.steps for rollback in rollbacks]
        for pause in train(job, worker, resume, watch.after_step, rolled_back, validates=validate is None):
            name = written = None
            if worker.rank == 0 or is_sharded(job.train):
                is_due = not pause.is_epoch_end or _is_checkpoint_due(job, pause.epoch) or watch.must_save
                name, written = files.write(pause, is_due)
            watch.must_save = False
            _report(pause, name, written)
            is_end = pause.is_epoch_end and pause.epoch + 1 == job.train.epochs
            if watch.must_stop and not is_end:
                return STOPPED
        files.wait()
    except Diverged as error:
        files.wait()
        return Diverged(str(error), error.what, error.steps)  # without the frames that hold the network
    return None


def _roll_back(job: JobConfig, run_uri: str, board: Any, diverged: Diverged) -> None:
    """Write down from which checkpoint the run is to go on, and which steps it is to leave out; to be called by rank 0.

    It is the newest one from before those steps or, if none is kept, the oldest one.

    Raises:
        TrainingError: it has gone back as often as the job allows.
    """
    rollbacks = load_rollbacks(run_uri)
    number, limit = len(rollbacks) + 1, job.train.max_rollbacks
    if number > limit:
        raise TrainingError(f"{diverged}; the run has gone back {limit} time(s) before, as often as train.max_rollbacks allows")
    names = [PurePosixPath(checkpoint.path).name for checkpoint in _listed_checkpoints(rollbacks)]
    before = [name for name in names if checkpoint_step(name) <= diverged.steps[0]] or names[-1:]
    back_to = checkpoint_step(before[0]) if before else 0
    steps = range(max(back_to, diverged.steps[0]), diverged.steps[-1] + 1)
    undone = [name for name in names if name not in before]
    save_rollbacks(run_uri, [*rollbacks, Rollback(diverged.what, back_to, steps[0], steps[-1], undone)])
    board.post.remote(
        Message(
            f"warning: {diverged.what}: going back to step {back_to} and leaving out the {len(steps)} step(s) of "
            f"{job.train.global_batch_size} pictures up to there; rollback {number} of {limit}"
        )
    )


class _Files:
    """Writes what a run leaves, beside the training: the state is copied in the step, one copy at a time.

    Rank 0 writes all there is, but for the shards of a network that is cut up: each rank has its own.
    """

    def __init__(
        self, run_uri: str, board: Any, rank: int, history: list[dict[str, float]], validate: Callable[[dict[str, Any]], Any] | None
    ) -> None:
        self._run_uri = run_uri
        self._board = board
        self._rank = rank
        self._history = history
        self._validate = validate
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, pause: Pause, is_checkpoint: bool) -> tuple[str | None, Future[None]]:
        """Begin to write the files of a pause, once those of the last are written, and to validate where others do so.

        Returns:
            The name of the checkpoint, if there is one, and the outcome of writing all of them.
        """
        self.wait()
        state = pause.state()
        shards: dict[str, bytes] | None = state.pop("shards", None)
        name = _checkpoint_name(state["steps_done"], is_shared=shards is not None) if is_checkpoint else None
        files = {storage.join(name, SHARDS_NAME, file): data for file, data in (shards or {}).items()} if name is not None else {}
        kept = validation = None
        if self._rank == 0:
            if name is not None:
                files[storage.join(name, CHECKPOINT_NAME)] = dump_state({**state, "epochs_done": pause.epoch + pause.is_epoch_end})
            if pause.is_epoch_end:
                weights = {key: tensor.to("cpu", copy=True) for key, tensor in state["weights"].items()}
                kept = {"epoch": pause.epoch, "steps_done": state["steps_done"], "weights": weights}
                validation = self._validate(weights) if self._validate is not None else None
        self._last = self._thread.submit(self._write, files, pause, kept, validation)
        return name, self._last

    def wait(self) -> None:
        """Wait until all is written; raises what went wrong."""
        if self._last is not None:
            self._last.result()

    def _write(self, files: dict[str, bytes], pause: Pause, kept: dict[str, Any] | None, validation: Any) -> None:
        if kept is not None:
            evaluation = Evaluation({}, pause.confusion) if validation is None else _wait_for(validation)
            metrics = {**pause.metrics, **evaluation.metrics}
            files = self._epoch_files(pause, {**kept, "metrics": metrics}, evaluation) | files  # the checkpoint comes last
        for name, data in files.items():
            storage.write_bytes(storage.join(self._run_uri, name), data)
        if kept is not None:
            ray.get(self._board.post.remote(EpochEnd(metrics)))

    def _epoch_files(self, pause: Pause, kept: dict[str, Any], evaluation: Evaluation) -> dict[str, bytes]:
        metrics = kept["metrics"]
        is_best = metrics["val_top1"] > max((epoch["val_top1"] for epoch in self._history), default=-1.0)
        self._history = [*self._history, metrics]
        files = {HISTORY_NAME: json.dumps(self._history).encode()}
        if is_best:
            files[storage.join(BEST_NAME, CHECKPOINT_NAME)] = dump_state(kept)
            if evaluation.confusion is not None:
                files |= confusion_files(pause.epoch, metrics["val_top1"], pause.classes, evaluation.confusion)
        if pause.quarantined:
            files[QUARANTINE_NAME] = json.dumps(pause.quarantined, indent=1).encode()
        return files


def _wait_for(validation: Any) -> Evaluation:
    try:
        evaluation: Evaluation = ray.get(validation)
    except ray.exceptions.RayError as error:
        remedy = "set train.validation: inline in the run's job.yaml, and resume"
        raise users_error(error) or TrainingError(f"validation beside training failed: {reason_of(error)}; {remedy}") from error
    return evaluation


def _checkpoint_name(steps_done: int, *, is_shared: bool) -> str:
    """Return a name that sorts by step and then by time: a step that is done again after a fault gets another name."""
    name = f"checkpoint-{steps_done:09d}-{time.time_ns() // 1_000_000}"
    return str(broadcast_from_rank_zero(name)) if is_shared else name


def _report(pause: Pause, name: str | None, written: Future[None] | None) -> None:
    """Tell Ray Train of a checkpoint as soon as it is written; this does not wait for it."""
    if name is None or written is None:
        ray.train.report(pause.metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    run = ray.train.get_context().get_storage()
    checkpoint = Checkpoint(run.build_checkpoint_path_from_name(name), run.storage_filesystem)

    def wait(local: Checkpoint, directory_name: str) -> Checkpoint:
        written.result()
        return checkpoint

    ray.train.report(
        pause.metrics,
        checkpoint,
        name,
        CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=wait,
    )


def _load_newest_whole(rank: int, board: Any, rollbacks: list[Rollback]) -> dict[str, Any] | None:
    """Return the newest state that can be read and is not undone, the same on all ranks; None at the start of a run."""
    uri, state = None, None
    if rank == 0:
        listed = _listed_checkpoints(rollbacks)
        for checkpoint in listed:
            uri = _uri_of(checkpoint)
            try:
                state = load_state(uri)
                break
            except TrainingError as error:
                board.post.remote(Message(f"warning: {error}; going back to the one before"))
        if listed and state is None:
            raise TrainingError(
                f"none of the {len(listed)} checkpoints can be read, the oldest being '{uri}'; start again with another --name"
            )
    uri = broadcast_from_rank_zero(uri)
    if uri is None:
        return None
    return {**(state or load_state(uri)), "uri": uri}


def _listed_checkpoints(rollbacks: list[Rollback]) -> list[Checkpoint]:
    """Return the checkpoints that are whole and not undone, newest first."""
    undone = {name for rollback in rollbacks for name in rollback.undone}
    listed = (entry.checkpoint for entry in ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED))
    kept = (checkpoint for checkpoint in listed if PurePosixPath(checkpoint.path).name not in undone)
    return sorted(kept, key=lambda checkpoint: checkpoint.path, reverse=True)


def _uri_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path if checkpoint.path.startswith("/") else f"s3://{checkpoint.path}"


def _is_checkpoint_due(job: JobConfig, epoch: int) -> bool:
    return (epoch + 1) % job.train.checkpoint_every_epochs == 0 or epoch + 1 == job.train.epochs
