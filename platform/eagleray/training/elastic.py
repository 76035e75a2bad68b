"""How many workers an elastic run has: as there is room for beside serving, and as divide the lanes of a global batch.

Serving comes first. Where its replicas find no room, the run saves a checkpoint, goes on with fewer workers, and takes the room back
when the replicas have gone. The order of samples does not depend on the number of workers, so that it is the same all along.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision, ScalingDecision

from eagleray.placement import GROUP_LABEL, total, work_nodes
from eagleray.training.board import Message

LENDING_CHECK_S = 3.0
"""Seconds between looks for replicas that find no room."""

LONGEST_SAVE_S = 60.0
"""So long a checkpoint is waited for before workers are given up without it."""

_SERVE_NAMESPACE = "serve"


@dataclass(frozen=True)
class Held:
    """Resources that serving has on a node, or waits for (`node_id` None)."""

    node_id: str | None
    resources: dict[str, float]


class LanesPolicy(ElasticScalingPolicy):
    """Decides in Ray Train's controller."""

    def __init__(self, scaling_config: ScalingConfig, lanes: int, board: Any) -> None:
        super().__init__(scaling_config)
        self._lanes = lanes
        self._board = board
        self._looked = float("-inf")
        self._asked: tuple[float, int] | None = None
        """When a checkpoint was asked for, and how many there were before."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        config = self.scaling_config
        left = beside(whole_nodes(config.label_selector), serving_holds(), config._resources_per_worker_not_none)
        # Ray's own count knows of other runs, but not of serving.
        room = min(super()._count_possible_workers(reserved_resources), super()._count_possible_workers(left))
        return max((number for number in range(1, room + 1) if self._lanes % number == 0), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        now = time.monotonic()
        if self._asked is not None or now - self._looked >= LENDING_CHECK_S:
            self._looked = now
            reserved = self._get_reserved_resources()
            possible = self._count_possible_workers(reserved) if reserved is not None else worker_group_state.num_workers
            if self.scaling_config.min_workers <= possible < worker_group_state.num_workers:
                return self._give_up_workers(possible, now)
            self._asked = None
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return self._give_up_workers(decision.num_workers, now)  # the need arose since the last look
        return decision

    def _give_up_workers(self, num_workers: int, now: float) -> ScalingDecision:
        """Decide to go on with fewer workers, once there is a checkpoint from after the need for it was seen."""
        if self._asked is None:
            self._asked = now, ray.get(self._board.ask_to_save.remote())
            self._board.post.remote(Message(f"serving needs room: saving a checkpoint, then going on with {num_workers} worker(s)"))
            return NoopDecision()
        asked_at, before = self._asked
        if ray.get(self._board.num_checkpoints.remote()) == before and now - asked_at < LONGEST_SAVE_S:
            return NoopDecision()
        self._asked = None
        return self._get_resize_decision(num_workers)


def whole_nodes(labels: Mapping[str, str] | None) -> dict[str, dict[str, float]]:
    """Return all resources, used or not, of each node that is up and has these labels."""
    wanted = (labels or {}).items()
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and wanted <= node["Labels"].items()}


def cluster_beside_serving() -> dict[str, float]:
    """Return the cluster's logical resources without nodes that serve, and without what serving holds or waits for on the others."""
    return total(beside(work_nodes(), serving_holds(), {}))


def beside(nodes: Mapping[str, Mapping[str, float]], held: Iterable[Held], per_worker: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return what is left of each node's resources beside what serving holds, and waits for.

    What waits is put where it costs the fewest workers: on the node that has most to spare once its workers are placed.
    """
    left = {node: dict(resources) for node, resources in nodes.items()}
    for what in held:
        node = what.node_id if what.node_id is not None else _best_node(left, what.resources, per_worker)
        if node in left:
            for name, amount in what.resources.items():
                left[node][name] = left[node].get(name, 0.0) - amount
    return left


def _best_node(left: Mapping[str, Mapping[str, float]], wanted: Mapping[str, float], per_worker: Mapping[str, float]) -> str | None:
    def workers(resources: Mapping[str, float]) -> float:
        return min((resources.get(name, 0.0) // amount for name, amount in per_worker.items() if amount), default=0.0)

    def cost(node: str) -> float:
        after = {name: amount - wanted.get(name, 0.0) for name, amount in left[node].items()}
        return workers(left[node]) - workers(after)

    fitting = [node for node, resources in left.items() if all(resources.get(name, 0.0) >= amount for name, amount in wanted.items())]
    return min(fitting, key=cost, default=None)


def serving_holds() -> list[Held]:
    """Return what the actors of Ray Serve hold, and what those wait for that have no node yet.

    Those that wait for a node of a group of their own are left out: room on other nodes is of no use to them.
    """
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    accessor = state._connect_and_get_accessor()
    tables = [accessor.get_actor_table(None, name) for name in ("ALIVE", "PENDING_CREATION")]
    actors = [gcs_pb2.ActorTableData.FromString(row) for table in tables for row in table]
    return [
        Held(actor.node_id.hex() or None, dict(actor.required_resources))
        for actor in actors
        if actor.ray_namespace == _SERVE_NAMESPACE
        and actor.required_resources
        and (actor.node_id or GROUP_LABEL not in dict(actor.label_selector))
    ]
