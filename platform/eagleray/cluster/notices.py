"""A node that the cloud will take away: tell Ray, so that training saves a checkpoint and nothing new starts there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from eagleray.cluster.connect import check_address, prepare_environment
from eagleray.cluster.description import Cloud
from eagleray.errors import ClusterError

METADATA_URLS: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5.0
"""AWS advises to look every five seconds."""

GCP_GRACE_S = 30.0
"""Google Cloud gives this much from the notice on; AWS names the time, two minutes ahead."""


@dataclass(frozen=True)
class Notice:
    """The node goes at `deadline`, in seconds since the epoch."""

    deadline: float


def read_notice(cloud: Cloud, url: str | None = None) -> Notice | None:
    """Ask the cloud's metadata service whether this machine will be taken away.

    AWS: Spot instance interruption notices, `spot/instance-action` (IMDSv2). Google Cloud: `instance/preempted`.

    Args:
        url: the metadata service; by default the cloud's own address.

    Raises:
        httpx.HTTPError: nobody answers there.
    """
    with httpx.Client(base_url=url or METADATA_URLS[cloud], timeout=2.0, trust_env=False) as client:
        return (_aws_notice if cloud == "aws" else _gcp_notice)(client)


def _aws_notice(client: httpx.Client) -> Notice | None:
    token = client.put("/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}).raise_for_status().text
    answer = client.get("/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    return Notice(datetime.fromisoformat(answer.raise_for_status().json()["time"]).timestamp())


def _gcp_notice(client: httpx.Client) -> Notice | None:
    answer = client.get("/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}).raise_for_status()
    return Notice(time.time() + GCP_GRACE_S) if answer.text.strip() == "TRUE" else None


def watch_notices(
    cloud: Cloud, address: str, *, node_id: str | None = None, url: str | None = None, on_message: Callable[[str], None] = print
) -> None:
    """Look for a notice until there is one, then drain this node; returns when that is done, or Ray has left the node.

    A metadata service that does not answer is asked again.

    Args:
        address: the cluster's, `host:6379`.
        node_id: this node's, where several run on one machine.

    Raises:
        ClusterError: this machine is no node of the cluster.
    """
    prepare_environment()
    node = _find_node(address, node_id)
    failures = 0
    while _is_alive(address, node):
        try:
            notice, failures = read_notice(cloud, url), 0
        except (httpx.HTTPError, ValueError, KeyError) as error:
            notice, failures = None, failures + 1
            if failures == 1:  # told once, not every five seconds
                on_message(f"the metadata service of {cloud} does not answer ({error or type(error).__name__}); going on asking")
        if notice is not None:
            on_message(f"node {node} will be taken away in {notice.deadline - time.time():.0f} s")
            _drain(address, node, notice.deadline)
            return
        time.sleep(POLL_S)


def drain_this_node(address: str, deadline_s: float, *, node_id: str | None = None) -> None:
    """Tell the cluster that this node goes in `deadline_s` seconds; return when it has no work left, or then.

    Raises:
        ClusterError: nobody answers at `address`, this machine is no node of the cluster, or Ray refuses.
    """
    prepare_environment()
    node, deadline = _find_node(address, node_id), time.time() + deadline_s
    _drain(address, node, deadline)
    while _is_alive(address, node) and time.time() < deadline:
        time.sleep(1.0)


def _drain(address: str, node_id: str, deadline: float) -> None:
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why_not = _gcs(address).drain_node(node_id, reason, "the cloud takes the node away", int(deadline * 1000))
    if not accepted:
        raise ClusterError(f"node {node_id} cannot be drained: {why_not}")


def _find_node(address: str, node_id: str | None) -> str:
    import ray

    here = ray.util.get_node_ip_address()
    nodes = [node for node, ip in _alive_nodes(address).items() if (node == node_id if node_id else ip == here)]
    if not nodes:
        which = f"no node '{node_id}'" if node_id else f"this machine ({here}) is no node"
        raise ClusterError(f"{which} of the cluster at '{address}'; run it on a node, after `ray start`")
    return nodes[0]


def _is_alive(address: str, node_id: str) -> bool:
    return node_id in _alive_nodes(address)


def _alive_nodes(address: str) -> dict[str, str]:
    """Return the IP address of each node that is up, by its id."""
    from ray.core.generated import gcs_pb2

    nodes = _gcs(address).get_all_node_info()
    return {node_id.hex(): node.node_manager_address for node_id, node in nodes.items() if node.state == gcs_pb2.GcsNodeInfo.ALIVE}


def _gcs(address: str) -> Any:
    import ray._raylet

    check_address(address)
    return ray._raylet.GcsClient(address=address)
