"""Looks after experiments while nobody looks: guardrails, ramps, and traffic by policy.

A Ray Serve application of its own, so that Serve restarts it where it dies, and it ends with the endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from ray import serve

from eagleray.config.schema import WorkspaceConfig
from eagleray.errors import EagleRayError
from eagleray.serving import endpoint
from eagleray.serving.experiment import Experiment, conclude, next_ramp_step, with_policy_weights
from eagleray.serving.metrics import WatcherMetrics
from eagleray.serving.router import WATCHER_APPLICATION, WATCHER_NAME

if TYPE_CHECKING:
    from eagleray.artifacts.registry import Registry

INTERVAL_S = 5.0
LEAST_CHANGE = 0.01
"""Of a share, before a policy's new weights are put into force: each change costs the router a little."""

logger = logging.getLogger("ray.serve")


@serve.deployment(name=WATCHER_NAME)
class Watcher:
    """The replica that looks after all experiments of the endpoint; `workspace` is a dumped `WorkspaceConfig`."""

    def __init__(self, workspace: dict[str, Any], interval_s: float) -> None:
        from eagleray.artifacts.registry import Registry

        self._registry = Registry(WorkspaceConfig.model_validate(workspace))
        self._metrics = WatcherMetrics()
        self._interval_s = interval_s
        self._busy = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            for model in endpoint.models():
                try:
                    with self._busy:
                        look_after(self._registry, model, self._metrics.tell)
                except EagleRayError as error:  # a store that is away, a version that does not come up: the next look tries again
                    logger.warning("experiment on '%s': %s", model, error)

    async def decide(self, model: str, decision: Literal["promote", "abort"], variant: str | None, by: str) -> dict[str, Any]:
        """End an experiment; returns it, or why that cannot be."""
        try:
            ended = await asyncio.to_thread(self._decide, model, decision, variant, by)
        except EagleRayError as error:
            return {"experiment": None, "refused": str(error)}
        return {"experiment": ended.model_dump(mode="json"), "refused": None}

    def _decide(self, model: str, decision: Literal["promote", "abort"], variant: str | None, by: str) -> Experiment:
        from eagleray.serving import ab  # which starts this watcher

        with self._busy:
            return ab.promote(self._registry, model, variant, by) if decision == "promote" else ab.abort(self._registry, model, by)

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("the watcher's thread has ended")

    def __del__(self) -> None:
        self._end.set()


def start(workspace: WorkspaceConfig) -> None:
    """Bring the watcher up, unless it is. Raises ServingError where it does not come up."""
    options = {"ray_actor_options": endpoint.actor_options(0)}
    application = endpoint.deployment_of(Watcher, options, str(INTERVAL_S)).bind(workspace.model_dump(mode="json"), INTERVAL_S)
    endpoint.run([serve.RunTarget(application, WATCHER_APPLICATION, None, endpoint.QUIET)])


def look_after(registry: Registry, model: str, on_figures: Callable[[dict[str, Any]], None] = lambda figures: None) -> None:
    """Look at the experiment on `model` once, and do what is due; `on_figures` is told what was seen."""
    from eagleray.serving.ab import record  # which starts this watcher

    experiment = endpoint.experiment(model)
    if not experiment.is_watched:
        return
    figures = endpoint.report(model)
    on_figures(figures)
    changed = decide(experiment, figures, datetime.now(UTC))
    if changed is None:
        return
    endpoint.update_experiment(changed)
    kind = "ab_guardrail" if not changed.is_running else "ab_ramp" if changed.revision > experiment.revision else "ab_policy"
    record(registry, changed, kind, {"by": "watcher", "reason": changed.reason, "weights": changed.shares, "report": figures})


def decide(experiment: Experiment, figures: dict[str, Any], now: datetime) -> Experiment | None:
    """Return the experiment as it has to be from now on; None where it stays as it is.

    Args:
        figures: of `report.experiment_report`.
    """
    breaches = [guard["reason"] for guard in figures["guardrails"] if guard["is_breached"]]
    if breaches:
        return conclude(experiment, experiment.control.name, "aborted", now, "; ".join(breaches))
    if experiment.ramp:
        return next_ramp_step(experiment, now)
    weights = figures["policy_weights"]
    if weights and max(abs(weights[name] - experiment.shares[name]) for name in weights) >= LEAST_CHANGE:
        return with_policy_weights(experiment, weights)
    return None
