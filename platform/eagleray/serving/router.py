"""Which variant answers a request, and the record of it. Runs within the ingress replica, on its event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from eagleray.config.schema import ServingConfig
from eagleray.errors import DataError, EagleRayError, ServingError, near_miss
from eagleray.serving import deployment
from eagleray.serving.experiment import NOT_COUNTED, Experiment, Variant, assign
from eagleray.serving.outcomes import (
    ExperimentLog,
    hash_routing_key,
    load_signing_key,
    new_request_id,
    parse_request_id,
    read_assignments,
    read_outcomes,
)
from eagleray.serving.report import experiment_report

if TYPE_CHECKING:
    from eagleray.serving.predictor import Prediction

ATTEMPTS = 3
"""A replica that dies under a request is replaced; the request is sent again."""

DRAIN_TIMEOUT_S = 30.0


class BackendSpec(BaseModel):
    """A version that is up."""

    version: int
    application: str
    """Its Ray Serve application."""
    package_uri: str
    weights_sha256: str
    image_size: int
    classes: list[str]


class ModelSpec(BaseModel):
    """How one model's requests are answered."""

    experiment: Experiment
    backends: dict[str, BackendSpec]
    """By variant; an ended experiment has its winner's only."""
    config: ServingConfig


class RouterState(BaseModel):
    """All that the ingress knows: its Ray Serve `user_config`, so that it survives the replica."""

    experiments_uri: str | None = None
    models: dict[str, ModelSpec] = {}


class NotFoundError(EagleRayError):
    """A model, version or variant that is not served (404)."""


class BusyError(EagleRayError):
    """Too many requests are waiting (503)."""


@dataclass
class Backend:
    """A backend as it is used: its handle, and how many requests are with it."""

    spec: BackendSpec
    handle: DeploymentHandle[Any]
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Target:
    """Where a request goes."""

    model: ModelSpec
    variant: Variant
    backend: Backend
    revision: int
    key_hash: str


@dataclass(frozen=True)
class Answer:
    """What is answered to one request, one entry per picture."""

    request_ids: list[str]
    target: Target
    predictions: list[list[Prediction]]
    latency_ms: float


class Router:
    """Assigns requests to variants, sends them there and logs both."""

    def __init__(self) -> None:
        self.state = RouterState()
        self._backends: dict[str, Backend] = {}
        self._logs: dict[str, ExperimentLog] = {}
        self._signing_key = b""

    async def reconfigure(self, state: RouterState) -> None:
        """Take over a new state at once; return when no request is left with a backend that is gone from it.

        Raises:
            StorageError: the experiments' folder cannot be used; the state stays as it was.
        """
        if state.experiments_uri is not None and state.experiments_uri != self.state.experiments_uri:
            self._signing_key = await asyncio.to_thread(load_signing_key, state.experiments_uri)
        wanted = {spec.application: spec for model in state.models.values() for spec in model.backends.values()}
        removed = [backend for name, backend in self._backends.items() if name not in wanted]
        self._backends = {name: self._backends.get(name) or self._connect(spec) for name, spec in wanted.items()}
        self.state = state
        for backend in removed:
            if backend.in_flight:
                backend.idle.clear()
                with suppress(TimeoutError):  # what hangs longer is ended with its replica
                    await asyncio.wait_for(backend.idle.wait(), DRAIN_TIMEOUT_S)

    def _connect(self, spec: BackendSpec) -> Backend:
        return Backend(spec, serve.get_deployment_handle(deployment.NAME, app_name=spec.application))

    async def close(self) -> None:
        """Make all log rows durable."""
        await asyncio.gather(*(log.flush() for log in self._logs.values()))

    # --- Routing ------------------------------------------------------------------------------------------------

    def model(self, name: str) -> ModelSpec:
        """Return the model called `name`. Raises NotFoundError."""
        spec = self.state.models.get(name)
        if spec is None:
            served = ", ".join(self.state.models) or "none"
            raise NotFoundError(f"no model '{name}' is served here{near_miss(name, self.state.models)}; served: {served}")
        return spec

    def target(self, model_name: str, routing_key: str | None, variant: str | None = None, version: int | None = None) -> Target:
        """Choose who answers: the variant or version asked for (not counted in the experiment), else by routing key.

        Raises:
            NotFoundError: no such model, variant or version is served.
        """
        model = self.model(model_name)
        experiment = model.experiment
        key = routing_key or secrets.token_hex(16)
        is_override = variant is not None or version is not None
        chosen = self._asked_for(model, variant, version) if is_override else assign(experiment, key)
        revision = NOT_COUNTED if is_override or not experiment.is_running else experiment.revision
        backend = self._backends[model.backends[chosen.name].application]
        return Target(model, chosen, backend, revision, hash_routing_key(experiment.salt, key))

    @staticmethod
    def _asked_for(model: ModelSpec, variant: str | None, version: int | None) -> Variant:
        live = [v for v in model.experiment.variants if v.name in model.backends]
        for candidate in live:
            if variant == candidate.name or version == candidate.version:
                return candidate
        what = f"variant '{variant}'" if variant is not None else f"version {version}"
        names = ", ".join(f"{v.name} (version {v.version})" for v in live)
        raise NotFoundError(f"'{model.experiment.model}' has no {what} up; up: {names}")

    # --- Answering ----------------------------------------------------------------------------------------------

    async def classify(self, target: Target, pictures: list[bytes], top_k: int) -> Answer:
        """Classify encoded pictures.

        Raises:
            DataError: one of them cannot be decoded.
            BusyError: too many requests are waiting for this variant.
        """
        started = time.perf_counter()
        result = await self._call(target, "classify", pictures, top_k)
        if result["refused"] is not None:
            raise DataError(result["refused"])
        return self._answered(target, result["predictions"], started)

    async def classify_pixels(self, target: Target, pixels: NDArray[np.uint8]) -> tuple[Answer, NDArray[np.float32]]:
        """Classify uint8 [N, H, W, 3]; returns probabilities, float32 [N, C], besides. Raises BusyError."""
        started = time.perf_counter()
        probabilities: NDArray[np.float32] = await self._call(target, "classify_pixels", pixels)
        classes = target.backend.spec.classes
        best: list[list[Prediction]] = [[{"label": classes[int(row.argmax())], "probability": float(row.max())}] for row in probabilities]
        return self._answered(target, best, started), probabilities

    async def _call(self, target: Target, method: str, *arguments: Any) -> Any:
        backend = target.backend
        backend.in_flight += 1
        try:
            return await self._call_replica(target, method, *arguments)
        except BackPressureError:
            self._log_error(target)
            raise BusyError(f"too many requests are waiting for '{target.model.experiment.model}'; try again") from None
        except DeploymentUnavailableError:
            self._log_error(target)
            raise BusyError(f"version {target.variant.version} of '{target.model.experiment.model}' is not available") from None
        except Exception:
            self._log_error(target)
            raise
        finally:
            backend.in_flight -= 1
            if not backend.in_flight:
                backend.idle.set()

    @staticmethod
    async def _call_replica(target: Target, method: str, *arguments: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await target.backend.handle.options(method_name=method).remote(*arguments)
            except (RayActorError, ReplicaUnavailableError):
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _answered(self, target: Target, predictions: list[list[Prediction]], started: float) -> Answer:
        latency_ms = (time.perf_counter() - started) * 1000
        experiment = target.model.experiment
        request_ids = []
        for best in (row[0] for row in predictions):
            request_id = new_request_id(self._signing_key, experiment.id, target.variant.name, target.revision, best["label"])
            self._log_assignment(target, request_id, best, latency_ms)
            request_ids.append(request_id)
        return Answer(request_ids, target, predictions, latency_ms)

    # --- Log ----------------------------------------------------------------------------------------------------

    def _log(self, experiment: str) -> ExperimentLog:
        assert self.state.experiments_uri is not None
        if experiment not in self._logs:
            self._logs[experiment] = ExperimentLog(self.state.experiments_uri, experiment)
        return self._logs[experiment]

    def _log_error(self, target: Target) -> None:
        request_id = new_request_id(self._signing_key, target.model.experiment.id, target.variant.name, target.revision, "")
        self._log_assignment(target, request_id, None, None)

    def _log_assignment(self, target: Target, request_id: str, best: Prediction | None, latency_ms: float | None) -> None:
        self._log(target.model.experiment.id).assignments.add(
            {
                "request_id": request_id,
                "time": datetime.now(UTC),
                "variant": target.variant.name,
                "version": target.variant.version,
                "revision": target.revision,
                "key_hash": target.key_hash,
                "label": best and best["label"],
                "probability": best and best["probability"],
                "latency_ms": latency_ms,
                "is_error": best is None,
            }
        )

    async def feedback(self, request_id: str, label: str | None, outcome: bool | None) -> bool:
        """Record what came of a request, durably; returns the outcome.

        Args:
            label: the true class; the outcome is whether it was answered.
            outcome: the outcome itself, where there is no label.

        Raises:
            ServingError: the id was not issued here, or the label is no class of the model.
            StorageError: it could not be made durable; send it again.
        """
        issued = parse_request_id(self._signing_key, request_id)
        if label is not None:
            self._check_label(issued.experiment, label)
            outcome = issued.predicted(label)
        assert outcome is not None
        await self._log(issued.experiment).outcomes.add_durably(
            {
                "request_id": request_id,
                "time": datetime.now(UTC),
                "variant": issued.variant,
                "revision": issued.revision,
                "label": label,
                "outcome": outcome,
            }
        )
        return outcome

    def _check_label(self, experiment: str, label: str) -> None:
        for model in self.state.models.values():
            if model.experiment.id == experiment:
                classes = {name for backend in model.backends.values() for name in backend.classes}
                if label not in classes:
                    raise ServingError(f"label '{label}' is no class of '{model.experiment.model}'{near_miss(label, classes)}")

    async def report(self, model_name: str) -> dict[str, Any]:
        """Return the figures of a model's experiment; see `report.experiment_report`. Raises NotFoundError, StorageError."""
        experiment, uri = self.model(model_name).experiment, self.state.experiments_uri
        assert uri is not None
        await self._log(experiment.id).flush()

        def read() -> dict[str, Any]:
            return experiment_report(experiment, read_assignments(uri, experiment.id), read_outcomes(uri, experiment.id))

        return await asyncio.to_thread(read)
