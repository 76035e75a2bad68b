"""Run a job file on a cluster through Ray's job server, and look after it."""

from __future__ import annotations

import http
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from eagleray import storage
from eagleray.cluster.connect import CONNECT_TIMEOUT_S, has_token, package_directory, prepare_environment, quiet
from eagleray.config.load import build_job, dump_job, with_values
from eagleray.config.schema import JobConfig
from eagleray.errors import ClusterError, ConfigError
from eagleray.placement import QUEUE_PREFIX

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

VERBS = ("train", "tune")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 0.5
AGENT_TIMEOUT_S = 60.0
STOP_WAIT_S = 120
"""So long a job may take to save where it is before it is ended hard; Ray's own default is 3 s."""


@dataclass(frozen=True)
class JobInfo:
    submission_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    message: str
    started: datetime | None
    ended: datetime | None
    verb: str
    """train or tune; '' where somebody else than eagleray submitted the job."""
    run: str
    """Name of its run."""
    job_file: str
    """The resolved job file, YAML."""
    serves: bool
    """Whether it deploys the model that it has trained."""
    queue: str
    """'': it waits for nobody."""


def submit_job(
    job: JobConfig,
    address: str,
    *,
    run: str,
    verb: str | None = None,
    resume: bool = False,
    serves: bool = False,
    queue: str | None = None,
) -> str:
    """Start `eagleray train` or `tune` with `job` on the cluster whose job server is at `address`; return the job's id.

    The package and the resolved job file travel; data, results and secrets do not.

    Args:
        address: `http://host:8265`.
        run: name of the run.
        verb: by default `tune` where the job has a `tune` section, else `train`.
        resume: go on with that run.
        serves: make what was trained the champion, and deploy it on the same cluster.
        queue: queue of the cluster's to wait in until it has room for the job's workers.

    Raises:
        ClusterError: nobody answers there, the token is missing or wrong, the cluster runs another Ray, has no such queue, or
            one that is too small for the job.
        ConfigError: the job uses local paths that the cluster cannot see.
    """
    verb = verb or ("tune" if job.tune is not None else "train")
    if verb not in VERBS:
        raise ConfigError(f"--verb '{verb}': expected one of {', '.join(VERBS)}")
    if serves and verb != "train":
        raise ConfigError("--on-finish serve: a search only finds a job; train its winner with --on-finish serve")
    portable = _with_portable_paths(job, address)
    with _client(address) as client, tempfile.TemporaryDirectory() as directory:
        _check_ray_version(client, address)
        (Path(directory) / "job.yaml").write_text(dump_job(portable), encoding="utf-8")
        return _submit_when_ready(
            client,
            entrypoint=_entrypoint(verb, run, resume, serves),
            runtime_env={
                "working_dir": directory,
                "py_modules": [str(package_directory())],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            },
            metadata={"verb": verb, "run": run, "job_file": dump_job(portable), "serves": "yes" if serves else "", "queue": queue or ""},
            entrypoint_resources=_place_in_queue(queue, portable, verb, address) if queue is not None else None,
        )


def resubmit_job(submission_id: str, address: str, *, fresh_run: str | None = None) -> str:
    """Submit a job that has ended once more, with this version of the package; return the new job's id.

    Args:
        fresh_run: name of a new run; by default the job goes on with its own from the newest checkpoint.

    Raises:
        ClusterError: it still runs, or eagleray did not submit it; or as `submit_job`.
    """
    ended = job_status(submission_id, address)
    if not ended.job_file:
        raise ClusterError(f"job '{submission_id}' was not submitted by eagleray; submit it as it was the first time")
    if ended.status in ("PENDING", "RUNNING"):
        raise ClusterError(
            f"job '{submission_id}' is {ended.status}; stop it first: eagleray jobs stop {submission_id} --address {address}"
        )
    job = build_job(yaml.safe_load(ended.job_file), source=submission_id)
    is_fresh = fresh_run is not None
    return submit_job(
        job,
        address,
        run=fresh_run or ended.run,
        verb=ended.verb,
        resume=not is_fresh,
        serves=ended.serves,
        queue=ended.queue or None,
    )


def _place_in_queue(queue: str, job: JobConfig, verb: str, address: str) -> dict[str, float]:
    """Return the share of a queue that the job's driver holds as long as it runs: its number of workers."""
    sizes = {
        name.removeprefix(QUEUE_PREFIX): amount
        for resources in _resources_of_nodes(address)
        for name, amount in resources.items()
        if name.startswith(QUEUE_PREFIX)
    }
    if queue not in sizes:
        raise ClusterError(f"--queue '{queue}': this cluster has {', '.join(sizes) or 'no queues'}; see `queues` in its description")
    workers = job.train.max_workers
    if verb == "tune":
        if job.tune is None or job.tune.max_concurrent is None:
            raise ConfigError("tune.max_concurrent is not set, which a queue must know; set it to the number of trials at a time")
        workers = job.tune.max_concurrent
    if workers > sizes[queue]:
        raise ClusterError(f"--queue '{queue}': it lets {sizes[queue]:g} workers run at a time, the job has {workers}; lower its number")
    return {f"{QUEUE_PREFIX}{queue}": workers}


def _resources_of_nodes(address: str) -> list[dict[str, float]]:
    """Return what each node has; the job server of a cluster that has just started answers before there is one."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        with connection(address) as get:
            nodes = get("/api/v0/nodes?detail=true")["data"]["result"]["result"]
        found = [node["resources_total"] for node in nodes if node["state"] == "ALIVE" and node.get("resources_total")]
        if found or time.monotonic() > deadline:
            return found
        time.sleep(POLL_S)


def _entrypoint(verb: str, run: str, resume: bool, serves: bool) -> str:
    """Return the job's command: one process, for Ray tells those to stop that it finds at that moment, and a shell's may yet come."""
    command = f"exec python -m eagleray {verb} job.yaml {'--resume' if resume else '--name'} {shlex.quote(run)}"
    return f"{command} --on-finish serve --address auto" if serves else command


def _check_ray_version(client: JobSubmissionClient, address: str) -> None:
    """Refuse a cluster with another Ray: a job fails there late, and not by saying so."""
    theirs = str(client._do_request("GET", "/api/version").json().get("ray_version", "unknown"))
    ours = metadata.version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ClusterError(
            f"'{address}' runs Ray {theirs}, this eagleray needs {'.'.join(ours.split('.')[:2])}; start the cluster from "
            "an image made with cluster/images/Dockerfile, or install the eagleray that goes with it"
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


def stop_job(submission_id: str, address: str) -> JobInfo | None:
    """Stop a job and return what became of it once it has ended, its checkpoint saved; None where it had ended before.

    One that waits in a queue is PENDING still: Ray stops it when its turn comes, before it does anything.

    Raises:
        ClusterError: there is no such job, it does not end, nobody answers, or the token is missing or wrong.
    """
    with _client(address) as client:
        if _details(client, submission_id).status.is_terminal():
            return None
        is_told = client.stop_job(submission_id)
        deadline = time.monotonic() + STOP_WAIT_S + POLL_S
        while not (job := _details(client, submission_id)).status.is_terminal():
            is_told = is_told or client.stop_job(submission_id)  # Ray may have had no process yet to tell
            if is_told and job.status == "PENDING" and _info(job).queue:
                break
            if time.monotonic() > deadline:
                raise ClusterError(f"job '{submission_id}' has not ended within {STOP_WAIT_S} s; see its log, and stop it again")
            time.sleep(POLL_S)
        return _info(job)


@contextmanager
def connection(address: str) -> Iterator[Callable[[str], Any]]:
    """Give a function that returns what the job server answers to GET of a path, decoded. Raises ClusterError."""
    with _client(address) as client:

        def get(path: str) -> Any:
            answer = client._do_request("GET", path)
            if answer.status_code != http.HTTPStatus.OK:
                raise ClusterError(f"'{address}{path}' answers {answer.status_code}: {' '.join(answer.text.split())[:200]}")
            return answer.json()

        yield get


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
    ended = datetime.fromtimestamp(details.end_time / 1000, UTC) if details.end_time else None
    told = details.metadata or {}
    return JobInfo(
        submission_id=details.submission_id,
        status=str(details.status.value),
        entrypoint=details.entrypoint,
        message=details.message or "",
        started=started,
        ended=ended,
        verb=told.get("verb", ""),
        run=told.get("run", ""),
        job_file=told.get("job_file", ""),
        serves=told.get("serves") == "yes",
        queue=told.get("queue", ""),
    )


def _with_portable_paths(job: JobConfig, address: str) -> JobConfig:
    """Make local paths absolute for a cluster on this machine; refuse them for any other."""
    paths = {"workspace.root": job.workspace.root, "data.val": job.data.val, "data.test": job.data.test}
    paths |= {f"data.train.{i}": part.uri for i, part in enumerate(job.data.train_parts)}
    if job.model.pretrained is not None and job.model.pretrained.is_uri:
        paths["model.pretrained.source"] = job.model.pretrained.source
    local = {key: uri for key, uri in paths.items() if uri is not None and storage.is_local(uri)}
    if local and urlsplit(address).hostname not in LOOPBACK:
        key, uri = next(iter(local.items()))
        raise ConfigError(f"{key} '{uri}' is a local path, which the cluster at '{address}' cannot see; use an s3:// URI")
    values: dict[str, Any] = {key: storage.normalize_uri(uri) for key, uri in local.items() if not key.startswith("data.train.")}
    values["data.train"] = [part.model_copy(update={"uri": storage.normalize_uri(part.uri)}).model_dump() for part in job.data.train_parts]
    return with_values(job, values)
