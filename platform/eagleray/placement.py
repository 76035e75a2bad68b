"""Where work lands on a cluster of several kinds of nodes, and what the cluster may grow to.

Nodes of a cluster that was rendered from a description carry the name of their group as a label, and its head knows all groups,
also those that have no node yet. On any other cluster nothing is said about nodes: work lands wherever there is room.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

GROUP_LABEL = "eagleray.io/group"
NODE_GROUPS_VARIABLE = "EAGLERAY_NODE_GROUPS"
"""Environment variable of the head, which drivers of submitted jobs inherit: `{"train": {"cpus": 16, "gpus": 1, "max": 8}, …}`."""

QUEUE_PREFIX = "queue:"
"""The head has a logical resource of this name and the queue's for each queue: as much of it as its jobs may have workers."""

LONGEST_WAIT_S = 30 * 24 * 3600
"""Ray gives a submitted job up that has not begun after a quarter of an hour; one in a queue may wait as long as this."""


def node_environment(groups: str) -> dict[str, str]:
    """Return the environment of every node, given the groups as JSON."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between replicas, as on a Ray that is started here
        "RAY_JOB_START_TIMEOUT_SECONDS": str(LONGEST_WAIT_S),
        NODE_GROUPS_VARIABLE: groups,
    }


@dataclass(frozen=True)
class NodeGroup:
    """A kind of nodes; each has `cpus` and `gpus`, and there are `max` of them at most."""

    name: str
    cpus: float
    gpus: float
    max: int


def known_groups() -> list[NodeGroup]:
    """Return the groups of nodes that this cluster may have; none where it does not grow, or nobody said so."""
    declared = json.loads(os.environ.get(NODE_GROUPS_VARIABLE) or "{}")
    return [NodeGroup(name, group["cpus"], group["gpus"], group["max"]) for name, group in declared.items()]


def on_group(name: str) -> dict[str, str] | None:
    """Return Ray's label selector for nodes of a group; None where the cluster knows no such group."""
    return {GROUP_LABEL: name} if any(group.name == name for group in known_groups()) else None


def off_group(name: str) -> dict[str, str] | None:
    """Return Ray's label selector for nodes of any group but this; None where the cluster knows no such group."""
    return {GROUP_LABEL: f"!{name}"} if any(group.name == name for group in known_groups()) else None


def keep_helpers_here() -> None:
    """Where the cluster grows and shrinks: start those of Ray Data's actors that outlive jobs on this node, the head.

    Otherwise they start where data is first read, on a training node, which would then never be idle.
    """
    if known_groups():
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
        from ray.data._internal.stats import get_or_create_stats_actor
        from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

        get_or_create_autoscaling_coordinator()
        get_or_create_stats_actor()
        get_or_create_usage_collection_actor()


def work_nodes() -> dict[str, dict[str, float]]:
    """Return the logical resources, used or not, of each node that is up and not kept for serving, by node id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["Labels"].get(GROUP_LABEL) != "serve"}


def total(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of the nodes' resources."""
    result: Counter[str] = Counter()
    for resources in nodes.values():
        result.update(resources)
    return dict(result)


def cluster_for(num_workers: int, use_gpu: bool | str) -> dict[str, float]:
    """Return the logical resources of the connected cluster, but for nodes that serve, once it has grown for so many workers."""
    import ray

    counts = Counter(node["Labels"].get(GROUP_LABEL) for node in ray.nodes() if node["Alive"])
    return grown(total(work_nodes()), counts, known_groups(), num_workers, use_gpu)


def grown(
    now: dict[str, float], counts: Mapping[str | None, int], groups: list[NodeGroup], num_workers: int, use_gpu: bool | str
) -> dict[str, float]:
    """Return `now` with the nodes that so many workers bring up: one GPU each where there are GPUs for all, else one CPU each.

    Args:
        now: of the nodes that are up.
        counts: nodes that each group has now.
    """
    candidates = [group for group in groups if group.name == "train"] or groups
    limit = now.get("GPU", 0) + sum(group.gpus * (group.max - counts.get(group.name, 0)) for group in candidates)
    with_gpu = use_gpu is True or (use_gpu == "auto" and limit >= num_workers)
    key, size = ("GPU", "gpus") if with_gpu else ("CPU", "cpus")
    result = dict(now)
    for group in candidates:
        each = getattr(group, size)
        missing = num_workers - result.get(key, 0)
        if each and missing > 0:
            nodes = min(math.ceil(missing / each), group.max - counts.get(group.name, 0))
            result["CPU"] = result.get("CPU", 0) + nodes * group.cpus
            result["GPU"] = result.get("GPU", 0) + nodes * group.gpus
    return result
