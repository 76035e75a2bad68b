"""A training run on Ray Train, as a worker sees it: checkpoints and what else is written, reports, and going back."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from ray.train.v2.api.report_config import CheckpointConsistencyMode, CheckpointUploadMode

from eagleray import storage
from eagleray.artifacts.checkpoint import CHECKPOINT_NAME, SHARDS_NAME, dump_state, load_state
from eagleray.artifacts.runs import (
    BEST_NAME,
    HISTORY_NAME,
    QUARANTINE_NAME,
    Rollback,
    checkpoint_step,
    load_history,
    load_rollbacks,
    save_rollbacks,
)
from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig
from eagleray.errors import TrainingError
from eagleray.training.board import EpochEnd, Message
from eagleray.training.confusion import confusion_files
from eagleray.training.elastic import cluster_beside_serving
from eagleray.training.evaluation import start_evaluation
from eagleray.training.failures import reason_of, users_error
from eagleray.training.guards import Diverged
from eagleray.training.logs import name_log
from eagleray.training.loop import Evaluation, Pause, Worker, train
from eagleray.training.parallel import is_sharded
from eagleray.training.progress import STOPPED, Watch
from eagleray.training.resources import WorkerResources, share_what_is_left


def train_on_worker(config: dict[str, Any]) -> str | None:
    """Train as one worker of a run on Ray Train.

    Args:
        config: what `trainer.run_training` gives all of them.

    Returns:
        `STOPPED` where the run was asked to stop, else None.
    """
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
