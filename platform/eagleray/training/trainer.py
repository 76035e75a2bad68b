"""A training run on Ray Train: workers, checkpoints, failures, progress."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.report_config import CheckpointUploadMode

from eagleray import storage
from eagleray.artifacts.checkpoint import load_state, save_state
from eagleray.config.load import build_job, dump_job, load_job
from eagleray.config.schema import ElasticWorkers, JobConfig
from eagleray.data.mixture import load_training_set
from eagleray.data.shards import load_manifest
from eagleray.errors import ConfigError, DataError, EagleRayError, TrainingError
from eagleray.models.zoo import build_model
from eagleray.training.loop import Worker, train
from eagleray.training.resources import WorkerResources, share_resources

JOB_NAME = "job.yaml"
QUARANTINE_NAME = "quarantine.json"


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: its best checkpoint by validation top-1, and the metrics of each epoch."""

    run_name: str
    run_uri: str
    checkpoint_uri: str
    metrics: dict[str, float]
    """Of the best epoch."""
    history: list[dict[str, float]] = field(repr=False)


def run_training(job: JobConfig, run_name: str, *, on_epoch: Callable[[dict[str, float]], None] = lambda metrics: None) -> TrainingResult:
    """Train on the connected cluster until the job's last epoch, or go on from the run's newest checkpoint.

    Args:
        job: as `check_inputs` lets it pass.
        run_name: a run that `claim_run` has claimed.
        on_epoch: called in this process with each epoch's metrics.

    Raises:
        TrainingError: the workers failed too often.
        DataError: shards are missing or damaged.
    """
    resources = share_resources(ray.cluster_resources(), job.train.max_workers, job.train.use_gpu)
    run_uri = storage.join(job.workspace.runs_uri, run_name)
    filesystem, runs_path = storage.open_uri(job.workspace.runs_uri)
    with _Progress(on_epoch) as progress:
        trainer = TorchTrainer(
            _train_loop_per_worker,
            train_loop_config={"job": job.model_dump(mode="json"), "resources": resources, "run_uri": run_uri},
            scaling_config=_scaling(job, resources),
            run_config=RunConfig(
                name=run_name,
                storage_path=runs_path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=job.train.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=job.train.checkpoints_to_keep, checkpoint_score_attribute="val_top1", checkpoint_score_order="max"
                ),
                callbacks=[_RunCallback(progress.path)],
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _explain(error, run_name, run_uri) from error
    checkpoints = result.best_checkpoints or []
    if not checkpoints:
        raise TrainingError(f"run '{run_name}': no checkpoint was written to '{run_uri}'; start it again under another name")
    checkpoint, metrics = max(checkpoints, key=lambda pair: pair[1]["val_top1"])
    prefix = "" if storage.is_local(run_uri) else "s3://"
    return TrainingResult(run_name, run_uri, prefix + checkpoint.path, metrics, progress.history)


def check_inputs(job: JobConfig) -> None:
    """Refuse a job that could only fail later: splits that do not fit, a network that cannot be built, missing GPUs.

    Raises:
        DataError, ConfigError, TrainingError: says which.
    """
    share_resources(ray.cluster_resources(), job.train.max_workers, job.train.use_gpu)
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
    with torch.device("meta"):
        model = build_model(job.model, len(training_set.classes), job.data.image_size).eval()
        try:
            model(torch.empty(2, 3, job.data.image_size, job.data.image_size))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model '{job.model.name}' cannot take pictures of data.image_size {job.data.image_size} px ({error}); use a larger size"
            ) from None


def claim_run(job: JobConfig, run_name: str) -> None:
    """Write the resolved job file into the run's folder; the file marks the name as taken.

    Raises:
        TrainingError: another run has that name.
    """
    run_uri = storage.join(job.workspace.runs_uri, run_name)
    if not storage.write_bytes_if_absent(storage.join(run_uri, JOB_NAME), dump_job(job).encode()):
        raise TrainingError(f"'{run_uri}' already holds a run; resume it with --resume {run_name}, or choose another --name")


def load_run_job(runs_uri: str, run_name: str) -> JobConfig:
    """Return the resolved job file of a run.

    Raises:
        TrainingError: there is no such run.
    """
    job_uri = storage.join(runs_uri, run_name, JOB_NAME)
    if not storage.exists(job_uri):
        raise TrainingError(f"'{storage.join(runs_uri, run_name)}': no run there (no {JOB_NAME}); check the name and workspace.root")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / JOB_NAME
        path.write_bytes(storage.read_bytes(job_uri))
        return load_job(path)


def load_quarantine(run_uri: str) -> list[dict[str, str]]:
    """Return key, shard and reason of each training picture of a run that could not be decoded."""
    uri = storage.join(run_uri, QUARANTINE_NAME)
    pictures: list[dict[str, str]] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []
    return pictures


def load_checkpoint(checkpoint_uri: str) -> dict[str, Any]:
    """Return the state saved at `checkpoint_uri`."""
    filesystem, path = storage.open_uri(checkpoint_uri)
    with Checkpoint(path, filesystem).as_directory() as directory:
        return load_state(directory)


def _scaling(job: JobConfig, resources: WorkerResources) -> ScalingConfig:
    workers = job.train.num_workers
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return ScalingConfig(
        num_workers=(workers.min, workers.max) if isinstance(workers, ElasticWorkers) else workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=per_worker,
    )


def _train_loop_per_worker(config: dict[str, Any]) -> None:
    job = build_job(config["job"])
    resources: WorkerResources = config["resources"]
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        threads=resources.threads,
        train_decode=resources.train_decode,
        eval_decode=resources.eval_decode,
    )
    newest = ray.train.get_checkpoint()
    resume = None
    if newest is not None:
        with newest.as_directory() as directory:
            resume = load_state(directory)
    for pause in train(job, worker, resume):
        checkpoint = None
        if worker.rank == 0:
            if pause.is_epoch_end and pause.quarantined:
                storage.write_bytes(storage.join(config["run_uri"], QUARANTINE_NAME), json.dumps(pause.quarantined, indent=1).encode())
            if not pause.is_epoch_end or _is_checkpoint_due(job, pause.epoch):
                directory = tempfile.mkdtemp(prefix="eagleray-checkpoint-")
                save_state(directory, pause.state())
                checkpoint = Checkpoint.from_directory(directory)
        # The upload runs beside the next steps; Ray deletes the local copy after it.
        ray.train.report(pause.metrics or _WITHIN_EPOCH, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


_WITHIN_EPOCH = {"val_top1": -1.0}
"""Metrics of a checkpoint within an epoch: never the best, and deleted once there is a newer one."""


def _is_checkpoint_due(job: JobConfig, epoch: int) -> bool:
    return (epoch + 1) % job.train.checkpoint_every_epochs == 0 or epoch + 1 == job.train.epochs


class _RunCallback(UserCallback):
    """Runs in Ray Train's controller, which is on the driver's node."""

    def __init__(self, progress_path: str) -> None:
        self._progress_path = progress_path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Write one JSON line per epoch, which the driver follows."""
        if metrics[0] == _WITHIN_EPOCH:
            return
        with open(self._progress_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics[0]) + "\n")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the run, by raising, where starting the workers again would only fail in the same way."""
        for exception in worker_exceptions.values():
            error = _users_error(exception)
            if isinstance(error, (ConfigError, DataError, TrainingError)):
                raise error


class _Progress:
    """Follows the controller's metrics from the driver and hands them on as they come."""

    POLL_S = 0.2

    def __init__(self, on_epoch: Callable[[dict[str, float]], None]) -> None:
        self._on_epoch = on_epoch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self.history: list[dict[str, float]] = []

    def __enter__(self) -> _Progress:
        handle, self.path = tempfile.mkstemp(prefix="eagleray-progress-", suffix=".jsonl")
        os.close(handle)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        os.unlink(self.path)

    def _follow(self) -> None:
        with open(self.path, encoding="utf-8") as file:
            stopping = False
            while not stopping:
                stopping = self._stop.wait(self.POLL_S)
                self._read(file)

    def _read(self, file: Any) -> None:
        while True:
            place = file.tell()
            line = file.readline()
            if not line.endswith("\n"):
                file.seek(place)
                return
            metrics = json.loads(line)
            self.history.append(metrics)
            self._on_epoch(metrics)


def _explain(error: TrainingFailedError, run_name: str, run_uri: str) -> EagleRayError:
    """Return the first worker's own error if it was meant for the user, else one that says how to go on."""
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    users_error = _users_error(first)
    if users_error is not None:
        return users_error
    reason = " ".join(str(first).strip().splitlines()[-1:]) or type(first).__name__
    return TrainingError(f"run '{run_name}' failed: {reason}; go on from its newest checkpoint in '{run_uri}' with --resume {run_name}")


def _users_error(error: BaseException | None) -> EagleRayError | None:
    """Return the error meant for the user within what Ray wrapped around it, if there is one."""
    while error is not None and not isinstance(error, EagleRayError):
        wrapped = (getattr(error, name, None) for name in ("_base_exc", "controller_failure", "cause", "__cause__"))
        error = next((inner for inner in wrapped if isinstance(inner, BaseException)), None)
    return error
