"""What a cluster's job server knows: nodes, who holds what on them, and what waits for room."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eagleray.cluster.submit import JobInfo, connection, list_jobs
from eagleray.placement import GROUP_LABEL, QUEUE_PREFIX

NODE_TYPE_LABEL = "ray.io/node-group"
MAX_ENTRIES = 10_000
"""Ray's own limit of entries in an answer."""


@dataclass(frozen=True)
class NodeInfo:
    """A node, up or gone; times in seconds since the epoch."""

    node_id: str
    group: str
    """Group of a cluster description; '' for the head, and for nodes of other clusters."""
    node_type: str
    """Its type in the autoscaler's configuration; '' without one."""
    is_head: bool
    cpus: float
    gpus: float
    started: float
    ended: float | None


@dataclass(frozen=True)
class Demand:
    """`count` requests for `resources` that no node has room for, and why."""

    resources: dict[str, float]
    count: int
    why: str


@dataclass(frozen=True)
class ClusterStatus:
    """Nodes that are up, what is used of them (by node id), nodes that start or failed to, what waits, and jobs that run or wait."""

    nodes: list[NodeInfo]
    used: Mapping[str, Mapping[str, float]]
    starting: list[str]
    failed: list[str]
    demands: list[Demand]
    jobs: list[JobInfo]


def cluster_nodes(address: str) -> list[NodeInfo]:
    """Return the nodes of a cluster since its head was started, those that are gone too. Raises ClusterError."""
    with connection(address) as get:
        answer = get(f"/api/v0/nodes?detail=true&limit={MAX_ENTRIES}")
    return [_node(row) for row in answer["data"]["result"]["result"]]


def actor_holdings(address: str) -> Iterator[tuple[str, str, dict[str, float], float, float | None]]:
    """Yield job id, node id, resources, start and end (None: still there; seconds since the epoch) of each actor that holds something.

    Raises:
        ClusterError: nobody answers, or the token is missing or wrong.
    """
    with connection(address) as get:
        actors = get("/logical/actors")["data"]["actors"]
        jobs = {job["job_id"]: job["submission_id"] for job in get("/api/jobs/") if job.get("job_id") and job.get("submission_id")}
    for actor in actors.values():
        resources = {name: amount for name, amount in (actor.get("requiredResources") or {}).items() if name in ("CPU", "GPU")}
        start, end = int(actor.get("startTime") or 0), int(actor.get("endTime") or 0)
        node = (actor.get("address") or {}).get("nodeId") or ""
        if resources and start and node:
            yield jobs.get(actor["jobId"], f"driver {actor['jobId']}"), node, resources, start / 1000, end / 1000 if end else None


def cluster_status(address: str) -> ClusterStatus:
    """Return what a cluster does now. Raises ClusterError."""
    with connection(address) as get:
        actors = get(f"/api/v0/actors?detail=true&limit={MAX_ENTRIES}")["data"]["result"]["result"]
        tasks = [row for state in ("RUNNING", "PENDING_NODE_ASSIGNMENT") for row in get(_tasks_in(state))["data"]["result"]["result"]]
        groups = get(f"/api/v0/placement_groups?detail=true&limit={MAX_ENTRIES}")["data"]["result"]["result"]
        told = get("/api/cluster_status?format=1")["data"].get("clusterStatus") or ""
    nodes = [node for node in cluster_nodes(address) if node.ended is None]
    used: dict[str, Counter[str]] = defaultdict(Counter)
    for row in actors + tasks:
        if row["state"] in ("ALIVE", "RUNNING") and row.get("node_id"):
            used[row["node_id"]].update(_amounts(row["required_resources"]))
    for bundle in _bundles(groups, "CREATED"):
        used[bundle["node_id"]].update(_amounts(bundle["unit_resources"]))
    starting = [line for line in _section(told, "Pending:") if not line.startswith("(")]
    failed = [line for line in _section(told, "Recent failures:") if not line.startswith("(") and "NodeTerminated" not in line]
    wanted = [
        *_waiting(actors, "PENDING_CREATION"),
        *_waiting(tasks, "PENDING_NODE_ASSIGNMENT"),
        *(_amounts(b["unit_resources"]) for b in _bundles(groups, "PENDING")),
    ]
    counts = Counter(tuple(sorted(resources.items())) for resources in wanted if resources)
    demands = [Demand(dict(resources), count, _why(dict(resources), nodes, starting)) for resources, count in counts.items()]
    jobs = [job for job in list_jobs(address) if job.status in ("PENDING", "RUNNING")]
    return ClusterStatus(nodes, dict(used), starting, failed, demands, jobs)


def _tasks_in(state: str) -> str:
    return f"/api/v0/tasks?detail=true&limit={MAX_ENTRIES}&filter_keys=state&filter_predicates=%3D&filter_values={state}"


def _amounts(resources: Mapping[str, float] | None) -> dict[str, float]:
    return {name: amount for name, amount in (resources or {}).items() if name in ("CPU", "GPU") or name.startswith(QUEUE_PREFIX)}


def _waiting(rows: list[dict[str, Any]], state: str) -> Iterator[dict[str, float]]:
    """Yield what actors or tasks wait for that have no node yet; those of placement groups wait with the group."""
    for row in rows:
        if row["state"] == state and not row.get("node_id") and not row.get("placement_group_id"):
            yield _amounts(row["required_resources"])


def _bundles(groups: list[dict[str, Any]], state: str) -> Iterator[dict[str, Any]]:
    for group in groups:
        if group["state"] == state:
            yield from group["bundles"] or []


def _section(status: str, title: str) -> Iterator[str]:
    """Yield the lines below a title of Ray's own report, the only place where it tells of nodes that start or failed to."""
    lines = iter(status.splitlines())
    for line in lines:
        if line.strip() == title:
            break
    for line in lines:
        if not line.startswith(" "):
            return
        yield line.strip()


def _node(row: dict[str, Any]) -> NodeInfo:
    labels, resources = row.get("labels") or {}, row.get("resources_total") or {}
    return NodeInfo(
        node_id=row["node_id"],
        group=labels.get(GROUP_LABEL, ""),
        node_type=labels.get(NODE_TYPE_LABEL, ""),
        is_head=bool(row["is_head_node"]),
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        started=int(row["start_time_ms"]) / 1000,
        ended=int(row["end_time_ms"]) / 1000 if row["state"] == "DEAD" else None,
    )


def _why(resources: dict[str, float], nodes: list[NodeInfo], starting: list[str]) -> str:
    def holds(node: NodeInfo) -> bool:
        return node.cpus >= resources.get("CPU", 0) and node.gpus >= resources.get("GPU", 0)

    if starting:
        return "waits for nodes that start: " + ", ".join(starting)
    if any(holds(node) for node in nodes):
        return "waits for room: all nodes that could take it are busy"
    return "no node that is up could take it; if it stays so, no kind of node of this cluster can, or all are at their max"
