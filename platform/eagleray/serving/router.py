"""Which variant answers a request, and the record of it. Runs within the ingress replica, on its event loop."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from eagleray.config.schema import REQUEST_TIMEOUT_S, ServingConfig
from eagleray.errors import DataError, EagleRayError, ServingError, StorageError, near_miss
from eagleray.serving import protocol
from eagleray.serving.experiment import NOT_COUNTED, Experiment, Variant, assign
from eagleray.serving.metrics import RouterMetrics
from eagleray.serving.outcomes import (
    ExperimentLog,
    LogReader,
    hash_routing_key,
    load_signing_key,
    new_request_id,
    parse_request_id,
)
from eagleray.serving.report import experiment_report
from eagleray.serving.statistics import saliency_similarity
from eagleray.serving.upstream import BackendSpec, Upstream

if TYPE_CHECKING:
    from eagleray.serving.deployment import Explained
    from eagleray.serving.predictor import Prediction

WATCHER_NAME = "Watcher"
WATCHER_APPLICATION = "eagleray-watcher"

DRAIN_TIMEOUT_S = REQUEST_TIMEOUT_S
DECISION_TIMEOUT_S = 60.0

MAX_MIRRORED = 64
"""Copies that may be on their way to shadows; beyond it requests are not copied, so that a slow shadow costs nobody."""

SALIENCY_EVERY_S = 2.0
"""Least time between two pictures for which a variant and its shadow are both asked where they looked: it costs each of
them a backward pass, during which others wait."""


class ModelSpec(BaseModel):
    """How one model's requests are answered."""

    experiment: Experiment
    backends: dict[str, BackendSpec]
    """By variant; an ended experiment has its winner's only."""
    config: ServingConfig


class RouterState(BaseModel):
    """All that the ingress knows: its Ray Serve `user_config`, so that it survives the replica."""

    experiments_uri: str | None = None
    keys_uri: str | None = None
    """Folder of the API keys; None: everybody is let in."""
    models: dict[str, ModelSpec] = {}


class NotFoundError(EagleRayError):
    """A model, version or variant that is not served (404)."""


class BusyError(EagleRayError):
    """Too many requests are waiting (503)."""


class DeadlineError(EagleRayError):
    """There was no answer in the time that the request had (504)."""


def status_of(error: EagleRayError) -> int:
    """Return HTTP's status for an error."""
    statuses = {NotFoundError: 404, DataError: 422, ServingError: 422, BusyError: 503, StorageError: 503, DeadlineError: 504}
    return statuses.get(type(error), 500)


@dataclass(frozen=True)
class Target:
    """Where a request goes."""

    model: ModelSpec
    variant: Variant
    upstream: Upstream
    revision: int
    key_hash: str
    covariate: float | None = None
    until: float = math.inf
    """When the answer must be there, on the event loop's clock."""


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
        self._upstreams: dict[str, Upstream] = {}
        self._leaving: list[Upstream] = []
        self._logs: dict[str, ExperimentLog] = {}
        self._readers: dict[str, LogReader] = {}
        self._reading = asyncio.Lock()
        self._mirrored: set[asyncio.Task[None]] = set()
        self._saliency_asked = -math.inf
        self._signing_key = b""
        self._metrics = RouterMetrics()

    async def reconfigure(self, state: RouterState) -> None:
        """Take over a new state. Requests that are with a version that is gone from it go on there; see `drain`.

        Raises:
            StorageError: the experiments' folder cannot be used; the state stays as it was.
        """
        if state.experiments_uri is not None and state.experiments_uri != self.state.experiments_uri:
            self._signing_key = await asyncio.to_thread(load_signing_key, state.experiments_uri)
        wanted = {spec.application: (spec, model.config) for model in state.models.values() for spec in model.backends.values()}
        self._leaving += [upstream for name, upstream in self._upstreams.items() if name not in wanted]
        self._upstreams = {name: self._upstreams.get(name) or Upstream(name, self._metrics.in_flight) for name in wanted}
        for name, (spec, config) in wanted.items():
            self._upstreams[name].update(spec, config)
        self.state = state
        for model in state.models.values():
            for name, share in model.experiment.shares.items():
                self._metrics.share.set(share, {"model": model.experiment.model, "variant": name})

    async def drain(self) -> None:
        """Return when no request is left with a version that is gone.

        Not to be waited for in `reconfigure`: as long as that takes, Ray Serve sends the ingress no requests.
        """
        leaving, self._leaving = self._leaving, []
        await asyncio.gather(*(upstream.drain(DRAIN_TIMEOUT_S) for upstream in leaving))  # what hangs longer is ended with its replica

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

    def target(
        self,
        model_name: str,
        routing_key: str | None,
        variant: str | None = None,
        version: int | None = None,
        covariate: float | None = None,
        until: float = math.inf,
    ) -> Target:
        """Choose who answers: the variant or version asked for (not counted in the experiment), else by routing key.

        Args:
            covariate: what is known of the user from before the experiment and goes with the outcome, if anything.
            until: when the answer must be there, on the event loop's clock.

        Raises:
            NotFoundError: no such model, variant or version is served.
        """
        model = self.model(model_name)
        experiment = model.experiment
        key = routing_key or secrets.token_hex(16)
        is_override = variant is not None or version is not None
        chosen = self._asked_for(model, variant, version) if is_override else assign(experiment, key)
        revision = NOT_COUNTED if is_override or not experiment.is_running else experiment.revision
        upstream = self._upstreams[model.backends[chosen.name].application]
        return Target(model, chosen, upstream, revision, hash_routing_key(experiment.salt, key), covariate, until)

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
            DeadlineError: it was not answered in its time.
        """
        started = time.perf_counter()
        result = await self._call(target, "classify", pictures, top_k)
        if result["refused"] is not None:
            raise DataError(result["refused"])
        answer = self._answered(target, result["predictions"], started)
        self._mirror(answer, "classify", pictures, 1)
        return answer

    async def classify_encoded(self, target: Target, pictures: list[bytes]) -> tuple[Answer, NDArray[np.float32]]:
        """Classify encoded pictures; returns probabilities, float32 [N, C], besides. Raises as `classify` does."""
        started = time.perf_counter()
        rows, refused = await self._call(target, "classify_encoded", pictures)
        if refused is not None:
            raise DataError(refused)
        probabilities = np.stack(rows)
        answer = self._answered(target, [[best] for best in _best(probabilities, target.upstream.spec.classes)], started)
        self._mirror(answer, "classify", pictures, 1)
        return answer, probabilities

    async def classify_pixels(self, target: Target, pixels: NDArray[np.uint8]) -> tuple[Answer, NDArray[np.float32]]:
        """Classify uint8 [N, H, W, 3]; returns probabilities, float32 [N, C], besides. Raises BusyError, DeadlineError."""
        started = time.perf_counter()
        probabilities: NDArray[np.float32] = await self._call(target, "classify_pixels", pixels)
        answer = self._answered(target, [[best] for best in _best(probabilities, target.upstream.spec.classes)], started)
        self._mirror(answer, "classify_pixels", pixels)
        return answer, probabilities

    async def infer(self, target: Target, asked: protocol.Asked) -> protocol.Answered:
        """Answer a request of the Open Inference Protocol. Raises as `classify` does."""
        pictures, spec = asked.pictures, target.upstream.spec
        call = self.classify_encoded(target, pictures) if isinstance(pictures, list) else self.classify_pixels(target, pictures)
        answer, probabilities = await call
        name = target.model.experiment.model
        return protocol.Answered(name, spec.version, target.variant.name, spec.classes, probabilities, answer.request_ids)

    def metadata(self, model: str, version: int | None) -> dict[str, Any]:
        """Return what the Open Inference Protocol tells of a model. Raises NotFoundError."""
        backends = self.model(model).backends.values()
        spec = self.target(model, None, version=version).upstream.spec
        assert spec.choice is not None
        versions = sorted({other.version for other in backends})
        return protocol.model_metadata(model, versions, spec.classes, spec.weights_sha256, spec.image_size, spec.choice.backend)

    async def explain(self, target: Target, picture: bytes, label: str | None, as_png: bool) -> Explained:
        """Show where the target's network looked in an encoded picture; never counted in the experiment.

        Args:
            label: the class to be explained; None: the most probable one.

        Raises:
            DataError: the picture cannot be decoded, or there is no heat map of this network.
            ServingError: `label` is no class of the version.
            BusyError: too many requests are waiting for this variant.
        """
        classes = target.upstream.spec.classes
        if label is not None and label not in classes:
            raise ServingError(f"label '{label}' is no class of version {target.variant.version}{near_miss(label, classes)}")
        explained: Explained = await self._call(replace(target, revision=NOT_COUNTED), "explain", picture, label, as_png)
        if explained["refused"] is not None:
            raise DataError(explained["refused"])
        return explained

    async def _call(self, target: Target, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout_at(target.until) as timeout:
                return await target.upstream.ask(method, *arguments)
        except BackPressureError:
            self._log_error(target, "busy")
            raise BusyError(f"too many requests are waiting for '{target.model.experiment.model}'; try again") from None
        except DeploymentUnavailableError:
            self._log_error(target, "busy")
            raise BusyError(f"version {target.variant.version} of '{target.model.experiment.model}' is not available") from None
        except Exception as error:
            is_late = isinstance(error, TimeoutError) and timeout.expired()
            self._log_error(target, "deadline" if is_late else "failed")
            if is_late:
                raise DeadlineError(f"'{target.model.experiment.model}' had no answer in the time that the request has") from None
            raise

    def _answered(self, target: Target, predictions: list[list[Prediction]], started: float) -> Answer:
        latency_ms = (time.perf_counter() - started) * 1000
        experiment = target.model.experiment
        tags = {"model": experiment.model, "variant": target.variant.name}
        self._metrics.answers.inc(len(predictions), tags)
        self._metrics.latency.observe(latency_ms, tags)
        request_ids = []
        for best in (row[0] for row in predictions):
            request_id = new_request_id(self._signing_key, experiment.id, target.variant.name, target.revision, best["label"])
            self._log_assignment(target, request_id, best, latency_ms)
            request_ids.append(request_id)
        return Answer(request_ids, target, predictions, latency_ms)

    # --- Shadows ------------------------------------------------------------------------------------------------

    def _mirror(self, answer: Answer, method: str, *arguments: Any) -> None:
        """Send a copy of an answered request to the shadows; nobody waits for them."""
        target = answer.target
        if target.revision == NOT_COUNTED:
            return
        for shadow in target.model.experiment.variants:
            if shadow.is_shadow and secrets.randbelow(10**6) < shadow.mirror * 10**6 and len(self._mirrored) < MAX_MIRRORED:
                upstream = self._upstreams[target.model.backends[shadow.name].application]
                copy = replace(target, variant=shadow, upstream=upstream)
                compares = method == "classify" and self._may_compare_saliency()
                task = asyncio.get_running_loop().create_task(self._ask_shadow(copy, answer, compares, method, *arguments))
                self._mirrored.add(task)
                task.add_done_callback(self._mirrored.discard)

    async def _ask_shadow(self, target: Target, answer: Answer, compares: bool, method: str, *arguments: Any) -> None:
        started = time.perf_counter()
        best: Sequence[Prediction | None]
        try:
            best = _best(await target.upstream.ask(method, *arguments), target.upstream.spec.classes)
        except Exception:  # of whatever kind: it is the shadow's, and counted as such
            best = [None] * len(answer.request_ids)
        latency_ms = (time.perf_counter() - started) * 1000
        label = answer.predictions[0][0]["label"]
        saliency = [await self._saliency_similarity(target.upstream, answer.target.upstream, arguments[0][0], label) if compares else None]
        saliency += [None] * (len(best) - 1)
        for request_id, mine, answered, similarity in zip(answer.request_ids, best, answer.predictions, saliency, strict=True):
            self._log_assignment(target, request_id, mine, latency_ms if mine else None, answered[0]["label"], similarity)

    def _may_compare_saliency(self) -> bool:
        now = time.monotonic()
        if now - self._saliency_asked < SALIENCY_EVERY_S:
            return False
        self._saliency_asked = now
        return True

    async def _saliency_similarity(self, shadow: Upstream, answering: Upstream, picture: bytes, label: str) -> float | None:
        """Return how alike the places are that spoke for a class in both networks; None where one of them has no heat map of it."""
        try:
            asked = (upstream.ask("explain", picture, label, False) for upstream in (shadow, answering))
            one, other = (explained["heat_map"] for explained in await asyncio.gather(*asked))
        except Exception:  # of whatever kind: no user has asked for it
            return None
        return None if one is None or other is None else saliency_similarity(one, other)

    # --- Log ----------------------------------------------------------------------------------------------------

    def _log(self, experiment: str) -> ExperimentLog:
        assert self.state.experiments_uri is not None
        if experiment not in self._logs:
            self._logs[experiment] = ExperimentLog(self.state.experiments_uri, experiment)
        return self._logs[experiment]

    def _log_error(self, target: Target, reason: str) -> None:
        self._metrics.errors.inc(1, {"model": target.model.experiment.model, "variant": target.variant.name, "reason": reason})
        request_id = new_request_id(self._signing_key, target.model.experiment.id, target.variant.name, target.revision, "")
        self._log_assignment(target, request_id, None, None)

    def _log_assignment(
        self,
        target: Target,
        request_id: str,
        best: Prediction | None,
        latency_ms: float | None,
        answered_label: str | None = None,
        saliency: float | None = None,
    ) -> None:
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
                "covariate": target.covariate,
                "answered_label": answered_label,
                "saliency_similarity": saliency,
            }
        )

    async def feedback(self, request_id: str, label: str | None, value: float | None) -> float:
        """Record what came of a request, durably; returns the outcome.

        Args:
            label: the true class; the outcome is whether it was answered (1 or 0).
            value: the outcome itself, where there is no label.

        Raises:
            ServingError: the id was not issued here, the label is no class of the model, or a number was sent where
                the experiment compares successes.
            StorageError: it could not be made durable; send it again.
        """
        issued = parse_request_id(self._signing_key, request_id)
        model = next((model for model in self.state.models.values() if model.experiment.id == issued.experiment), None)
        if label is not None:
            _check_label(model, label)
            value = float(issued.predicted(label))
        assert value is not None
        if model is not None and model.experiment.outcome == "proportion" and value not in (0.0, 1.0):
            raise ServingError(
                f"value {value:g}: the experiment on '{model.experiment.model}' compares successes; send 0 or 1, or outcome or label"
            )
        await self._log(issued.experiment).outcomes.add_durably(
            {
                "request_id": request_id,
                "time": datetime.now(UTC),
                "variant": issued.variant,
                "revision": issued.revision,
                "label": label,
                "value": value,
            }
        )
        if model is not None:
            tags = {"model": model.experiment.model, "variant": issued.variant}
            self._metrics.outcomes.inc(1, tags)
            if value > 0:
                self._metrics.outcome_sum.inc(value, tags)
        return value

    async def report(self, model_name: str) -> dict[str, Any]:
        """Return the figures of a model's experiment; see `report.experiment_report`. Raises NotFoundError, StorageError."""
        experiment, uri = self.model(model_name).experiment, self.state.experiments_uri
        assert uri is not None
        await self._log(experiment.id).flush()
        reader = self._readers.setdefault(experiment.id, LogReader(uri, experiment.id))
        async with self._reading:
            return await asyncio.to_thread(lambda: experiment_report(experiment, reader.assignments(), reader.outcomes()))

    async def decide(self, model_name: str, decision: Literal["promote", "abort"], variant: str | None, by: str) -> Experiment:
        """End the experiment on a model, and return it as it is then; the watcher, which has the registry, does it.

        Args:
            variant: to be promoted; None: the only challenger.
            by: who decides, for the event.

        Raises:
            ServingError: no experiment is running, it has no watcher, or it is not clear which variant is meant.
        """
        experiment = self.model(model_name).experiment
        if not experiment.is_watched:
            raise ServingError(
                f"no watched experiment is running on '{model_name}'; start one with `eagleray ab start`, or decide with `eagleray ab {decision}`"
            )
        watcher: DeploymentHandle[Any] = serve.get_deployment_handle(WATCHER_NAME, app_name=WATCHER_APPLICATION)
        try:
            async with asyncio.timeout(DECISION_TIMEOUT_S):
                decided = await watcher.decide.remote(model_name, decision, variant, by)
        except TimeoutError:
            raise BusyError(
                f"the watcher has not answered within {DECISION_TIMEOUT_S:.0f} s; look at the experiment, and try again"
            ) from None
        if decided["refused"] is not None:
            raise ServingError(decided["refused"])
        return Experiment.model_validate(decided["experiment"])


def _best(answered: Any, classes: list[str]) -> list[Prediction]:
    """Return the most probable class of each picture, from what either way of classifying answers. Raises DataError."""
    if isinstance(answered, np.ndarray):
        return [{"label": classes[int(row.argmax())], "probability": float(row.max())} for row in answered]
    if answered["refused"] is not None:
        raise DataError(answered["refused"])
    return [row[0] for row in answered["predictions"]]


def _check_label(model: ModelSpec | None, label: str) -> None:
    if model is None:  # of an experiment that has ended
        return
    classes = {name for backend in model.backends.values() for name in backend.classes}
    if label not in classes:
        raise ServingError(f"label '{label}' is no class of '{model.experiment.model}'{near_miss(label, classes)}")
