"""What jobs have cost: the time of nodes, at the prices of a cluster description, shared out among those who held them."""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from eagleray.cluster.description import Cloud, ClusterDescription
from eagleray.cluster.state import NodeInfo, actor_holdings, cluster_nodes
from eagleray.cluster.submit import JobInfo, list_jobs

HOUR_S = 3600.0


@dataclass(frozen=True)
class Holding:
    """A job had this much of a node from `start` to `end`, in seconds since the epoch."""

    job: str
    node_id: str
    gpus: float
    cpus: float
    start: float
    end: float


@dataclass(frozen=True)
class Rental:
    """A node was there from `start` to `end`, in seconds since the epoch."""

    node_id: str
    group: str
    usd_per_hour: float
    start: float
    end: float


@dataclass
class Costs:
    """In USD; `total` is that of all nodes, and what no job held is `idle`."""

    jobs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    gpu_hours: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    groups: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    node_hours: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.groups.values())


def share_out(rentals: Iterable[Rental], holdings: Iterable[Holding]) -> Costs:
    """Share the cost of each node, moment by moment, among the jobs that held something on it, by how much they held.

    Who holds one of four GPUs while nobody holds the others pays for the node: it is there for that job alone.
    """
    costs = Costs()
    on_node: dict[str, list[Holding]] = defaultdict(list)
    for holding in holdings:
        on_node[holding.node_id].append(holding)
        costs.gpu_hours[holding.job] += holding.gpus * max(0.0, holding.end - holding.start) / HOUR_S
    for rental in rentals:
        held = on_node[rental.node_id]
        costs.groups[rental.group] += (rental.end - rental.start) / HOUR_S * rental.usd_per_hour
        costs.node_hours[rental.group] += (rental.end - rental.start) / HOUR_S
        times = {rental.start, rental.end, *(at for h in held for at in (h.start, h.end) if rental.start < at < rental.end)}
        for start, end in itertools.pairwise(sorted(times)):
            usd = (end - start) / HOUR_S * rental.usd_per_hour
            active = [h for h in held if h.start <= start and h.end >= end]
            key = "gpus" if any(h.gpus for h in active) else "cpus"
            weights = Counter({h.job: 0.0 for h in active})
            for h in active:
                weights[h.job] += getattr(h, key)
            whole = sum(weights.values())
            if not whole:
                costs.idle += usd
            for job, weight in weights.items() if whole else ():
                costs.jobs[job] += usd * weight / whole
    return costs


def cluster_costs(address: str, description: ClusterDescription, cloud: Cloud) -> tuple[Costs, list[JobInfo]]:
    """Return what a cluster has cost since its head was started, and the jobs that it ran.

    Args:
        address: the job server, `http://head:8265`.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong.
        ConfigError: the description has no machine for one of its groups.
    """
    now = time.time()
    nodes = cluster_nodes(address)
    rentals = [
        Rental(node.node_id, node.group or "head", _price(description, cloud, node), node.started, node.ended or now) for node in nodes
    ]
    holdings = [
        Holding(job, node_id, resources.get("GPU", 0.0), resources.get("CPU", 0.0), start, end or now)
        for job, node_id, resources, start, end in actor_holdings(address)
    ]
    return share_out(rentals, holdings), list_jobs(address)


def _price(description: ClusterDescription, cloud: Cloud, node: NodeInfo) -> float:
    group = next((shape for name, shape in description.groups.items() if name == node.group), None)
    if group is None:
        machine = description.machine(cloud, description.head, "head")
        return description.known_machines(cloud)[machine].usd_per_hour
    is_spot = group.market == "spot" or node.node_type.endswith("-spot")
    machine = description.machine(cloud, group, f"groups.{node.group}", is_spot=is_spot)
    prices = description.known_machines(cloud)[machine]
    return (prices.spot_usd_per_hour if is_spot else None) or prices.usd_per_hour
