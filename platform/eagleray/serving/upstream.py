"""A version that is up, as the ingress asks it: its replicas and, where its network is small, a copy in the ingress's own process.

To hand a picture to another process and its classes back takes longer than a small network takes for them. The copy answers as
many requests at a time as make a batch. What is beyond, what is large, what it refuses, and heat maps go to the replicas, and so
does everything until the copy is there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Gauge

from eagleray.config.schema import ServingConfig
from eagleray.serving import deployment
from eagleray.serving.backends import INT8, BackendChoice

COPIED = ("classify", "classify_encoded", "classify_pixels")
"""What a copy is asked."""

METHODS = (*COPIED, "explain", "is_small")
"""What replicas of a version are asked."""

ATTEMPTS = 3
"""A replica that dies under a request is replaced; the request is sent again."""

RETRY_S = 30.0
"""Time after which a copy that could not be had is tried again."""

COPY_BYTES = 1_000_000
"""Most bytes of a request that a copy takes."""

COPY_PIXELS = 1_000_000
"""Most pixels of a picture that a copy decodes: larger ones take longer than it takes to hand them over, and much memory."""

_log = logging.getLogger("ray.serve")


class BackendSpec(BaseModel):
    """A version that is up."""

    version: int
    application: str
    """Its Ray Serve application."""
    package_uri: str
    weights_sha256: str
    network: str = ""
    """What it computes, but for the weights: equal for versions that are as fast as each other."""
    image_size: int
    classes: list[str]
    choice: BackendChoice | None = None
    """What computes it; None before it was ever up."""


class Upstream:
    """Asks the version of a Ray Serve application; `update` says what it is."""

    spec: BackendSpec

    def __init__(self, application: str, in_flight: Gauge) -> None:
        handle: DeploymentHandle[Any] = serve.get_deployment_handle(deployment.NAME, app_name=application)
        self._methods = {method: handle.options(method_name=method) for method in METHODS}
        self._tags = {"backend": application}
        self._gauge = in_flight
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._known: tuple[BackendSpec, ServingConfig] | None = None
        self._copy: _Copy | None = None
        self._bringing: asyncio.Task[None] | None = None

    def update(self, spec: BackendSpec, config: ServingConfig) -> None:
        """Take over what the version is and how it is served. A copy of it comes up beside; nobody waits for it."""
        if self._known == (spec, config):
            return
        self.spec, self._known, self._copy = spec, (spec, config), None
        if self._bringing is not None:
            self._bringing.cancel()
        # int8 would be calibrated for seconds, beside the requests.
        has_copy = config.placement == "auto" and spec.choice is not None and spec.choice.backend != INT8
        self._bringing = asyncio.create_task(self._bring_copy(spec, config)) if has_copy else None

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Return what the version answers.

        Raises:
            ray.serve.exceptions.BackPressureError: too many requests are waiting.
            ray.serve.exceptions.DeploymentUnavailableError: it cannot be brought up.
        """
        self._count(1)
        try:
            if self._copy is not None and self._copy.takes(method, arguments[0]):
                answer = await self._copy.ask(method, *arguments)
                if not _is_refused(answer):
                    return answer
            return await self._ask_replica(method, *arguments)
        finally:
            self._count(-1)

    async def drain(self, timeout_s: float) -> None:
        """Return when no request is under way, or after `timeout_s`."""
        if self._bringing is not None:
            self._bringing.cancel()
        if self._in_flight:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def _ask_replica(self, method: str, *arguments: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            response = self._methods[method].remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()  # drops what the replica has not begun
                raise
            except (RayActorError, ReplicaUnavailableError):
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def _bring_copy(self, spec: BackendSpec, config: ServingConfig) -> None:
        while True:
            try:
                if await self._ask_replica("is_small"):
                    self._copy = await asyncio.to_thread(_Copy, spec, config)
                return
            except Exception as error:  # of whatever kind: the replicas answer
                _log.warning(f"{spec.application}: no copy of it in the ingress yet: {error!r}")
                await asyncio.sleep(RETRY_S)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._gauge.set(self._in_flight, self._tags)
        if not self._in_flight:
            self._idle.set()


class _Copy:
    """A version in this process, on one core."""

    def __init__(self, spec: BackendSpec, config: ServingConfig) -> None:
        assert spec.choice is not None
        all_cores = os.cpu_count() or 1  # shared out among as many, which leaves one
        self._classifier = deployment.Classifier(spec.package_uri, all_cores, spec.choice.backend, config.trusted_keys)
        pixels = min(config.max_image_pixels, COPY_PIXELS)
        self._classifier.reconfigure(config.model_copy(update={"max_image_pixels": pixels}).model_dump(mode="json"))
        self._max_requests = config.max_batch_size
        self._in_flight = 0

    def takes(self, method: str, pictures: Any) -> bool:
        if method not in COPIED or self._in_flight >= self._max_requests:
            return False
        return (sum(map(len, pictures)) if isinstance(pictures, list) else int(pictures.nbytes)) <= COPY_BYTES

    async def ask(self, method: str, *arguments: Any) -> Any:
        self._in_flight += 1
        try:
            return await getattr(self._classifier, method)(*arguments)
        finally:
            self._in_flight -= 1


def _is_refused(answer: Any) -> bool:
    """Return whether a picture was refused: a replica may take larger ones, and says why where it does not."""
    if isinstance(answer, dict):
        return answer["refused"] is not None
    return isinstance(answer, tuple) and answer[1] is not None
