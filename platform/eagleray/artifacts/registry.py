"""The registry on MLflow: runs with their curves, versions with their lineage, aliases, events.

MLflow keeps runs, metrics, versions and aliases (SQLite by default). Weights and cards are packages in
the workspace (see `package`); a version's source is its package's URI. Events, the running experiment
and each run's job file are small objects beside them: MLflow cuts long tags off.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from eagleray import storage
from eagleray.config.load import dump_job
from eagleray.config.schema import JobConfig, WorkspaceConfig
from eagleray.errors import RegistryError, near_miss

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

EXPERIMENT_NAME = "experiment.json"
CONNECT_TIMEOUT_S = 3.0
MAX_PARAM_CHARS = 6000
"""MLflow's limit on a parameter's value."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version; `package_uri` holds its weights and card."""

    name: str
    version: int
    package_uri: str
    run_id: str
    aliases: tuple[str, ...]
    created: datetime
    tags: dict[str, str]

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.version}"


class Registry:
    """Runs, versions, aliases and events of one workspace."""

    def __init__(self, workspace: WorkspaceConfig) -> None:
        self.workspace = workspace

    def start_run(self, run_name: str, job: JobConfig, tags: dict[str, str]) -> str:
        """Open an MLflow run in the experiment named after the job, with the job as parameters; return its id.

        The whole resolved job file lies among the run's artifacts; the tag `job_uri` says where.
        """
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment_id(job.name), run_name=run_name, tags=tags)
        run_id = str(run.info.run_id)
        params = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in _flat(job.model_dump(mode="json")).items()]
        self._client.log_batch(run_id, params=params)
        self.log_artifact(run_id, "job.yaml", dump_job(job).encode())
        self._client.set_tag(run_id, "job_uri", storage.join(self._artifacts_uri, run_id, "artifacts", "job.yaml"))
        return run_id

    def reopen_run(self, run_name: str, job: JobConfig) -> str | None:
        """Set the newest MLflow run of that name back to RUNNING, and return its id; None if there is none."""
        experiment = self._client.get_experiment_by_name(job.name)
        if experiment is None:
            return None
        query = f"attributes.run_name = '{run_name}'"
        found = self._client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1)
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, "RUNNING")
        return run_id

    def log_artifact(self, run_id: str, name: str, data: bytes) -> None:
        """Keep a file among the run's artifacts, where MLflow's pages show it."""
        storage.write_bytes(storage.join(self._artifacts_uri, run_id, "artifacts", name), data)

    @contextmanager
    def system_metrics(self, run_id: str) -> Iterator[None]:
        """Log the use of this machine's CPUs, memory, disks, network and GPUs to the run, for the block."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        _ = self._client  # which checks that the registry can be used
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.workspace.resolved_tracking_uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        """Add one point to each metric's curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()])

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)

    def register(self, name: str, package_uri: str, run_id: str, tags: dict[str, str]) -> ModelVersion:
        """Add a package as the next version of `name`, and return it."""
        with _kept_if_there():
            self._client.create_registered_model(name)
        version = self._client.create_model_version(name, source=package_uri, run_id=run_id, tags=tags)
        self.record_event(name, "registered", {"version": int(version.version), "run_id": run_id, "package_uri": package_uri})
        return self._version(version)

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Return all versions, or those of one model, newest first.

        Raises:
            RegistryError: there is no model of that name.
        """
        # A search for versions leaves aliases out; they are on the registered model.
        aliases = {model.name: dict(model.aliases) for model in ([self._model(name)] if name is not None else self._models())}
        query = f"name='{name}'" if name is not None else ""
        found = [self._version(version, aliases.get(version.name, {})) for version in self._client.search_model_versions(query)]
        return sorted(found, key=lambda version: (version.created, version.version), reverse=True)

    def resolve(self, reference: str) -> ModelVersion:
        """Return the version that `name@alias` or `name:version` means.

        Raises:
            RegistryError: no such model, version or alias; says what there is.
        """
        name, separator, wanted = _split_reference(reference)
        versions = self.versions(name)
        for version in versions:
            if (separator == ":" and str(version.version) == wanted) or (separator == "@" and wanted in version.aliases):
                return version
        if separator == "@":
            known = sorted({alias for version in versions for alias in version.aliases})
            hint = near_miss(wanted, known) or (f"; its aliases: {', '.join(known)}" if known else "; it has no alias yet")
            raise RegistryError(f"'{reference}': model '{name}' has no alias '{wanted}'{hint}")
        numbers = ", ".join(str(version.version) for version in reversed(versions))
        raise RegistryError(f"'{reference}': model '{name}' has no version '{wanted}'; its versions: {numbers or 'none'}")

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let `name@alias` mean `version` from now on."""
        self.resolve(f"{name}:{version}")
        self._client.set_registered_model_alias(name, alias, str(version))

    def record_event(self, name: str, kind: str, details: dict[str, Any]) -> None:
        """Keep what was decided about a model, when, and on which numbers."""
        now = datetime.now(UTC)
        event = {"time": now.isoformat(), "kind": kind, **details}
        storage.write_bytes(
            storage.join(self._model_uri(name), "events", f"{now:%Y%m%dT%H%M%S.%f}-{kind}.json"), json.dumps(event).encode()
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return all events of a model, oldest first."""
        return [json.loads(storage.read_bytes(uri)) for uri in storage.list_files(storage.join(self._model_uri(name), "events"))]

    def load_experiment(self, name: str) -> dict[str, Any] | None:
        """Return the running experiment of a model, None if there is none."""
        uri = storage.join(self._model_uri(name), EXPERIMENT_NAME)
        return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None

    def save_experiment(self, name: str, experiment: dict[str, Any] | None) -> None:
        """Replace the running experiment of a model; None ends it."""
        uri = storage.join(self._model_uri(name), EXPERIMENT_NAME)
        if experiment is not None:
            storage.write_bytes(uri, json.dumps(experiment, indent=2).encode())
        elif storage.exists(uri):
            storage.delete_file(uri)

    def _model_uri(self, name: str) -> str:
        return storage.join(self.workspace.experiments_uri, name)

    @property
    def _artifacts_uri(self) -> str:
        return storage.join(self.workspace.runs_uri, "mlflow")

    @cached_property
    def _client(self) -> MlflowClient:
        uri = self.workspace.resolved_tracking_uri
        _check_server(uri)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        try:
            with _schema_lock(uri):
                client = MlflowClient(tracking_uri=uri)
                # Both stores are used once: MLflow makes their tables then, and what cannot be used is told here.
                client.search_experiments(max_results=1)
                client.search_registered_models(max_results=1)
        except (MlflowException, SQLAlchemyError) as error:
            raise RegistryError(
                f"MLflow at '{uri}' cannot be used: {str(error).strip().splitlines()[0][:200]}; check workspace.tracking_uri, "
                "and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if the server asks for them"
            ) from error
        return client

    def _experiment_id(self, name: str) -> str:
        with _kept_if_there():
            return str(self._client.create_experiment(name, artifact_location=self._artifacts_uri))
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            raise RegistryError(
                f"MLflow at '{self.workspace.resolved_tracking_uri}': experiment '{name}' is deleted; "
                "restore it there, or choose another name for the job"
            )
        return str(experiment.experiment_id)

    def _models(self) -> list[RegisteredModel]:
        models, token = [], None
        while True:
            page = self._client.search_registered_models(page_token=token)
            models += page
            token = page.token
            if not token:
                return models

    def _model(self, name: str) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        known = [model.name for model in self._models()]
        raise RegistryError(
            f"no model '{name}' in the registry '{self.workspace.resolved_tracking_uri}'{near_miss(name, known)}; "
            f"registered: {', '.join(known) or 'none yet (train one)'}"
        )

    def _version(self, version: Any, aliases: dict[str, str] | None = None) -> ModelVersion:
        named = sorted(alias for alias, number in (aliases or {}).items() if str(number) == str(version.version))
        created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
        return ModelVersion(
            version.name, int(version.version), version.source, version.run_id or "", tuple(named), created, dict(version.tags)
        )


@contextmanager
def _kept_if_there() -> Iterator[None]:
    """Let the block make something in MLflow that may be there already, even since a moment ago."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _check_server(uri: str) -> None:
    """Raise RegistryError within seconds where no MLflow server listens; MLflow itself would try for minutes."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"workspace.tracking_uri '{uri}': nobody listens there ({getattr(error, 'strerror', None) or error}); "
            "start the MLflow server, or leave the key out for an SQLite file in workspace.root"
        ) from None


@contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """Make the folder of an SQLite registry, and let one process at a time make its tables: MLflow's migrations break each other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    import fcntl

    folder = os.path.dirname(os.path.abspath(uri.removeprefix("sqlite:///")))
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RegistryError(f"'{folder}': the registry's folder cannot be made ({error.strerror}); choose another workspace.root") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # releases the lock


def _split_reference(reference: str) -> tuple[str, str, str]:
    for separator in "@:":
        name, found, wanted = reference.partition(separator)
        if found and name and wanted:
            return name, separator, wanted
    raise RegistryError(f"'{reference}': give a version as name@alias (imagenet@champion) or name:version (imagenet:7)")


def _flat(document: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(document, dict):
        return {prefix: str(document)}
    return {key: value for name, part in document.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
