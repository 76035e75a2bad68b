"""How many replicas a version that follows the requests has; Ray Serve's controller asks."""

from __future__ import annotations

import math
import time
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

BUSY = "busy"
"""What a replica tells of itself: the share of the time since it was last asked in which its network computed."""

MOST_BUSY = 0.7
"""Share of their time that replicas may be busy once there are fewer of them."""

POLICY = "eagleray.serving.autoscaling:replicas_for_load"


def replicas_for_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the replicas that the requests need, and nothing to remember.

    As many as Ray Serve's own rule says, which counts requests that are with replicas or wait; but none is taken away that the
    others could not do without. For how few would do, that count does not say: where two are half busy each, hardly
    a request is with them at any moment, and with one of them requests pile up.
    """
    wanted, _ = replica_queue_length_autoscaling_policy(context)
    busy = context.aggregated_metrics or {}
    fewest = math.ceil(sum(busy.get(BUSY, {}).values()) / MOST_BUSY)
    return max(wanted, min(fewest, context.target_num_replicas)), {}


class BusyTime:
    """A context for what keeps a replica busy, one after the other; what is under way counts."""

    def __init__(self) -> None:
        self._asked = time.perf_counter()
        self._begun: float | None = None
        self._busy_s = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        assert self._begun is not None
        self._busy_s += time.perf_counter() - self._begun
        self._begun = None

    def share(self, now: float) -> float:
        """Return the share of the time since the last call, `now` being that of `time.perf_counter`, that something was under way."""
        if self._begun is not None:
            self._busy_s, self._begun = self._busy_s + now - self._begun, now
        share = self._busy_s / max(now - self._asked, 1e-9)
        self._asked, self._busy_s = now, 0.0
        return share
