"""The folder of a training run: what lies there, who works on it, and what can be said of it without a cluster.

job.yaml          the resolved job; it marks the name as taken
status.json       running, finished, stopped or failed; refreshed while the driver lives
history.json      the metrics of each epoch
quarantine.json   pictures that could not be decoded
rollbacks.json    each time that the run went back to an earlier checkpoint
checkpoint-…/     the newest states, to go on from
best/             the weights of the best epoch by validation top-1
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eagleray import storage
from eagleray.config.load import dump_job, load_job
from eagleray.config.schema import JobConfig
from eagleray.errors import EagleRayError, Interrupted, StorageError, TrainingError, near_miss

JOB_NAME = "job.yaml"
STATUS_NAME = "status.json"
HISTORY_NAME = "history.json"
QUARANTINE_NAME = "quarantine.json"
ROLLBACKS_NAME = "rollbacks.json"
BEST_NAME = "best"
CHECKPOINT_LIST_NAME = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that are whole."""

REFRESH_EVERY_S = 5.0
DEAD_AFTER_S = 60.0
"""A running run whose status has not been refreshed for so long has lost its driver."""

_running_here: set[str] = set()
"""Runs of this process, whose last word a full disk may have kept from being written."""


@dataclass(frozen=True)
class Rollback:
    """A time that a run went back to a checkpoint, as its weights were broken.

    Attributes:
        reason: what was seen, and where.
        back_to: steps that were done at the checkpoint; 0: the run began anew.
        first, last: steps of the run, from 0, that are left out from then on.
        undone: names of the checkpoints that came after the one it went back to; nothing goes on from them any more.
    """

    reason: str
    back_to: int
    first: int
    last: int
    undone: list[str]

    @property
    def steps(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run.

    Attributes:
        state: `running`, `finished`, `stopped` (on request), `failed`, or `lost` (its driver died).
        reason: why it failed.
        is_resumable: `--resume` can go on with it.
        started: of its first epoch's driver, seconds since 1970.
        history: the metrics of each epoch so far.
        checkpoints: (name, step, size in bytes) of those that are listed as whole, newest first.
        quarantined: pictures that could not be decoded.
        rollbacks: oldest first.
    """

    name: str
    uri: str
    state: str
    reason: str
    is_resumable: bool
    started: float
    job: JobConfig
    history: list[dict[str, float]]
    checkpoints: list[tuple[str, int, int]]
    quarantined: list[dict[str, str]]
    rollbacks: list[Rollback]

    @property
    def best(self) -> dict[str, float] | None:
        """Metrics of the best epoch."""
        return max(self.history, key=lambda metrics: metrics["val_top1"], default=None)

    @property
    def training_s(self) -> float:
        """Time spent in epochs, validation included."""
        return sum(metrics["epoch_s"] for metrics in self.history)

    @property
    def images_per_s(self) -> float | None:
        """Median over the epochs."""
        rates = sorted(metrics["images_per_s"] for metrics in self.history)
        return rates[len(rates) // 2] if rates else None


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
        hint = near_miss(run_name, run_names(runs_uri))
        raise TrainingError(
            f"'{storage.join(runs_uri, run_name)}': no run there (no {JOB_NAME}){hint}; see `eagleray runs list`, and check workspace.root"
        )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / JOB_NAME
        path.write_bytes(storage.read_bytes(job_uri))
        return load_job(path)


def run_names(runs_uri: str) -> list[str]:
    """Return the names of all runs."""
    relative = (uri.removeprefix(runs_uri).strip("/").split("/") for uri in storage.list_files(runs_uri))
    return [parts[0] for parts in relative if parts[1:] == [JOB_NAME]]


def load_history(run_uri: str) -> list[dict[str, float]]:
    """Return the metrics of each epoch of a run so far."""
    history: list[dict[str, float]] = _load_json(storage.join(run_uri, HISTORY_NAME), [])
    return history


def load_quarantine(run_uri: str) -> list[dict[str, str]]:
    """Return key, shard and reason of each training picture of a run that could not be decoded."""
    pictures: list[dict[str, str]] = _load_json(storage.join(run_uri, QUARANTINE_NAME), [])
    return pictures


def load_rollbacks(run_uri: str) -> list[Rollback]:
    """Return each time that a run went back to an earlier checkpoint, oldest first."""
    return [Rollback(**entry) for entry in _load_json(storage.join(run_uri, ROLLBACKS_NAME), [])]


def save_rollbacks(run_uri: str, rollbacks: list[Rollback]) -> None:
    storage.write_bytes(storage.join(run_uri, ROLLBACKS_NAME), json.dumps([asdict(rollback) for rollback in rollbacks], indent=1).encode())


def load_run(runs_uri: str, run_name: str) -> RunInfo:
    """Return what is known of a run.

    Raises:
        TrainingError: there is no such run.
    """
    job = load_run_job(runs_uri, run_name)
    uri = storage.join(runs_uri, run_name)
    status = _load_json(storage.join(uri, STATUS_NAME), {"state": "lost", "started": 0.0})
    state = "lost" if status["state"] == "running" and not _is_alive(uri, status) else status["state"]
    return RunInfo(
        name=run_name,
        uri=uri,
        state=state,
        reason=status.get("reason", ""),
        is_resumable=state in ("stopped", "failed", "lost"),
        started=status["started"],
        job=job,
        history=load_history(uri),
        checkpoints=_checkpoints(uri),
        quarantined=load_quarantine(uri),
        rollbacks=load_rollbacks(uri),
    )


def checkpoint_step(name: str) -> int:
    """Return the steps that were done at a checkpoint, by its name."""
    return int(re.split(r"\D+", name)[1])


def forget_lost_checkpoints(run_uri: str) -> list[str]:
    """Take checkpoints whose folders are gone off Ray Train's list, which it would refuse as a whole; return their names."""
    uri = storage.join(run_uri, CHECKPOINT_LIST_NAME)
    listed = _load_json(uri, None)
    if listed is None:
        return []
    pairs = list(zip(listed["checkpoint_results"], listed["checkpoint_report_indices"], strict=True))
    kept = [pair for pair in pairs if storage.exists(storage.join(run_uri, pair[0]["checkpoint_dir_name"]))]
    if len(kept) < len(pairs):
        listed["checkpoint_results"], listed["checkpoint_report_indices"] = [pair[0] for pair in kept], [pair[1] for pair in kept]
        listed["latest_checkpoint_result"] = max(kept, key=lambda pair: pair[1])[0] if kept else None
        storage.write_bytes(uri, json.dumps(listed).encode())
    return [pair[0]["checkpoint_dir_name"] for pair in pairs if pair not in kept]


@contextmanager
def running(run_uri: str) -> Iterator[None]:
    """Say in the run's folder that this process works on it, for the block, and afterwards what became of it.

    Raises:
        TrainingError: another process that lives works on it.
    """
    uri = storage.join(run_uri, STATUS_NAME)
    status = _load_json(uri, {"started": time.time()})
    if status.get("state") == "running" and _is_alive(run_uri, status):
        raise TrainingError(
            f"'{run_uri}': process {status['pid']} on {status['host']} works on this run; stop it, or wait {DEAD_AFTER_S:.0f} s if it is dead"
        )
    status = {"state": "running", "started": status["started"], "host": socket.gethostname(), "pid": os.getpid()}
    _write_status(uri, status)
    end = threading.Event()

    def keep_alive() -> None:
        while not end.wait(REFRESH_EVERY_S):
            with suppress(StorageError):  # what the run itself writes tells of a store that is not there
                _write_status(uri, status)

    thread = threading.Thread(target=keep_alive, name="status", daemon=True)
    thread.start()
    outcome = {"state": "stopped"}
    _running_here.add(run_uri)
    try:
        yield
        outcome = {"state": "finished"}
    except Interrupted:
        raise
    except Exception as error:
        outcome = {"state": "failed", "reason": str(error) if isinstance(error, EagleRayError) else repr(error)}
        raise
    finally:
        end.set()
        thread.join()
        _running_here.discard(run_uri)
        with suppress(StorageError):
            _write_status(uri, status | outcome)


def _write_status(uri: str, status: dict[str, Any]) -> None:
    storage.write_bytes(uri, json.dumps(status | {"refreshed": time.time()}).encode())


def _is_alive(run_uri: str, status: dict[str, Any]) -> bool:
    """Return whether the process that wrote a status `running` is at it still."""
    if status["host"] == socket.gethostname():
        if status["pid"] == os.getpid():
            return run_uri in _running_here
        try:
            os.kill(status["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return bool(time.time() - status["refreshed"] < DEAD_AFTER_S)


def _checkpoints(run_uri: str) -> list[tuple[str, int, int]]:
    listed = _load_json(storage.join(run_uri, CHECKPOINT_LIST_NAME), {"checkpoint_results": []})
    names = {entry["checkpoint_dir_name"] for entry in listed["checkpoint_results"]}
    sizes = {uri.split("/")[-2]: size for uri, size in storage.list_files_with_sizes(run_uri)}
    return [(name, checkpoint_step(name), sizes[name]) for name in sorted(names, reverse=True) if name in sizes]


def _load_json(uri: str, default: Any) -> Any:
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else default
