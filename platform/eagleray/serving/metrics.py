"""What serving tells Prometheus, through Ray's own metrics: each node's port has the figures of its replicas.

Requests over HTTP by route and status, queues and replicas are Ray Serve's metrics (`ray_serve_…`) and not repeated here.
Names get the prefix `ray_` on the way out.
"""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

LATENCY_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000]
BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]

_OF_VARIANT = ("model", "variant")


class RouterMetrics:
    """What the ingress knows, by model and variant."""

    def __init__(self) -> None:
        self.answers = Counter("eagleray_answers", "Pictures that were classified.", _OF_VARIANT)
        self.errors = Counter(
            "eagleray_errors", "Requests that a variant did not answer, by reason: busy, deadline or failed.", (*_OF_VARIANT, "reason")
        )
        self.latency = Histogram("eagleray_latency_ms", "From the request's body to the answer.", LATENCY_MS, _OF_VARIANT)
        self.in_flight = Gauge("eagleray_in_flight", "Requests that are with a variant's version or wait for it.", ("backend",))
        self.share = Gauge("eagleray_traffic_share", "Of the users, by the weights in force.", _OF_VARIANT)
        self.outcomes = Counter("eagleray_outcomes", "Feedback that has arrived.", _OF_VARIANT)
        self.outcome_sum = Counter(
            "eagleray_outcome_sum", "Sum of the outcomes that are above 0; by number, the rate of successes.", _OF_VARIANT
        )


class ReplicaMetrics:
    """What a replica knows of its batches."""

    def __init__(self) -> None:
        self.batch_size = Histogram("eagleray_batch_size", "Pictures that were classified at once.", BATCH_SIZES)
        self.batch_ms = Histogram("eagleray_batch_ms", "Time of the network for one batch.", LATENCY_MS)


class WatcherMetrics:
    """What the watcher found at its last look."""

    def __init__(self) -> None:
        self.breached = Gauge("eagleray_guardrail_breached", "1 where a guardrail is broken.", (*_OF_VARIANT, "metric"))
        self.success_rate = Gauge("eagleray_success_rate", "Success rate, or mean, of the revision in force.", _OF_VARIANT)
        self.difference = Gauge("eagleray_difference", "Estimate and bounds of the difference to the control.", (*_OF_VARIANT, "bound"))

    def tell(self, figures: dict[str, Any]) -> None:
        """Take over the figures of `report.experiment_report`."""
        model = figures["model"]
        for name, row in figures["variants"].items():
            if row["mean"] is not None:
                self.success_rate.set(row["mean"], {"model": model, "variant": name})
        for name, row in figures["differences"].items():
            for bound in ("estimate", "lower", "upper"):
                if row[bound] is not None:
                    self.difference.set(row[bound], {"model": model, "variant": name, "bound": bound})
        for guard in figures["guardrails"]:
            metric = guard["metric"] if guard["label"] is None else f"{guard['metric']} of {guard['label']}"
            self.breached.set(float(guard["is_breached"]), {"model": model, "variant": guard["variant"], "metric": metric})
