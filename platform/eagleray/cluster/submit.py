"""Run a job file on a cluster through Ray's job server, and look after it."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from eagleray import storage
from eagleray.cluster.connect import CONNECT_TIMEOUT_S, has_token, package_directory, prepare_environment, quiet
from eagleray.config.load import dump_job, with_values
from eagleray.config.schema import JobConfig
from eagleray.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

VERBS = ("train", "tune")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 0.5
AGENT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class JobInfo:
    submission_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    message: str
    started: datetime | None


def submit_job(job: JobConfig, address: str, *, verb: str | None = None, name: str | None = None) -> str:
    """Start `eagleray train` or `tune` with `job` on the cluster whose job server is at `address`; return the job's id.

    The package and the resolved job file travel; data, results and secrets do not.

    Args:
        address: `http://host:8265`.
        verb: by default `tune` where the job has a `tune` section, else `train`.
        name: name of the run.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
        ConfigError: the job uses local paths that the cluster cannot see.
    """
    verb = verb or ("tune" if job.tune is not None else "train")
    if verb not in VERBS:
        raise ConfigError(f"--verb '{verb}': expected one of {', '.join(VERBS)}")
    portable = _with_portable_paths(job, address)
    with _client(address) as client, tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "job.yaml").write_text(dump_job(portable), encoding="utf-8")
        arguments = f" --name {name}" if name else ""
        return _submit_when_ready(
            client,
            entrypoint=f"python -m eagleray {verb} job.yaml{arguments}",
            runtime_env={"working_dir": directory, "py_modules": [str(package_directory())]},
            metadata={"job": job.name, "verb": verb},
        )


def list_jobs(address: str) -> list[JobInfo]:
    """Return the submitted jobs of a cluster, newest first."""
    with _client(address) as client:
        found = [_info(details) for details in client.list_jobs() if details.submission_id]
    return sorted(found, key=lambda job: job.started or datetime.max.replace(tzinfo=UTC), reverse=True)


def job_status(submission_id: str, address: str) -> JobInfo:
    """Return what became of a job. Raises ClusterError if there is none of that id."""
    with _client(address) as client:
        return _info(_details(client, submission_id))


def job_logs(submission_id: str, address: str, *, follow: bool = False) -> Iterator[str]:
    """Yield the log of a job in pieces; with `follow`, until the job ends."""
    with _client(address) as client:
        seen = 0
        while True:
            ended = _details(client, submission_id).status.is_terminal()
            text = client.get_job_logs(submission_id)
            if len(text) > seen:
                yield text[seen:]
                seen = len(text)
            if ended or not follow:
                return
            time.sleep(POLL_S)


def stop_job(submission_id: str, address: str) -> bool:
    """Stop a job; return False where it had ended before."""
    with _client(address) as client:
        if _details(client, submission_id).status.is_terminal():
            return False
        client.stop_job(submission_id)
        return True


@contextmanager
def _client(address: str) -> Iterator[JobSubmissionClient]:
    prepare_environment()
    _check_job_server(address)
    quiet()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    quiet()  # again: importing Ray has set up its loggers
    try:
        yield JobSubmissionClient(address)
    except AuthenticationError:
        given = "the token was refused" if has_token() else "the cluster asks for a token and none is set"
        raise ClusterError(f"'{address}': {given}; set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token") from None
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"'{address}': {' '.join(str(error).split())[:400]}") from error


def _submit_when_ready(client: JobSubmissionClient, **job: Any) -> str:
    """Submit; the job server of a cluster that has just started answers some seconds before a node can take a job."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no node of the cluster took the job within {AGENT_TIMEOUT_S:.0f} s: its job agent is not up; if two clusters share "
                    "a machine, start the second one with another --dashboard-agent-listen-port (default 52365)"
                ) from None
        time.sleep(POLL_S)


def _check_job_server(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"--address '{address}': expected the job server's URL, such as http://head:8265")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"--address '{address}': nobody listens there ({getattr(error, 'strerror', None) or error}); "
            "the job server is the dashboard's address, port 8265 of the head; a tunnel may be needed"
        ) from None


def _details(client: JobSubmissionClient, submission_id: str) -> Any:
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            raise ClusterError(f"no job '{submission_id}' on this cluster; see `eagleray jobs list`") from None
        raise


def _info(details: Any) -> JobInfo:
    started = datetime.fromtimestamp(details.start_time / 1000, UTC) if details.start_time else None
    return JobInfo(details.submission_id, str(details.status.value), details.entrypoint, details.message or "", started)


def _with_portable_paths(job: JobConfig, address: str) -> JobConfig:
    """Make local paths absolute for a cluster on this machine; refuse them for any other."""
    paths = {"workspace.root": job.workspace.root, "data.val": job.data.val, "data.test": job.data.test}
    paths |= {f"data.train.{i}": part.uri for i, part in enumerate(job.data.train_parts)}
    local = {key: uri for key, uri in paths.items() if uri is not None and storage.is_local(uri)}
    if local and urlsplit(address).hostname not in LOOPBACK:
        key, uri = next(iter(local.items()))
        raise ConfigError(f"{key} '{uri}' is a local path, which the cluster at '{address}' cannot see; use an s3:// URI")
    values: dict[str, Any] = {key: storage.normalize_uri(uri) for key, uri in local.items() if not key.startswith("data.train.")}
    values["data.train"] = [part.model_copy(update={"uri": storage.normalize_uri(part.uri)}).model_dump() for part in job.data.train_parts]
    return with_values(job, values)
