"""What a training step waits for on a cluster: pure arithmetic, from figures that are measured or assumed elsewhere.

Input (storage, decoding, the head's tasks) is made while the GPUs work, so that a step takes as long as the slower of
the two; gradients that are not averaged behind the backward pass, and what a checkpoint holds up, come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eagleray.data.plan import default_window_size

HOUR_S = 3600.0


@dataclass(frozen=True)
class Workload:
    """A training run; bytes are per picture, per copy of the gradients, and per checkpoint with the best weights beside it."""

    pictures: int
    picture_bytes: float
    epochs: int
    max_batch_per_gpu: int
    max_global_batch: int
    gradient_bytes: float
    checkpoint_bytes: float
    row_groups: int

    def batch_per_gpu(self, gpus: int) -> int:
        """Return pictures per GPU and step: the global batch is bounded, as accuracy falls beyond (You et al. 2018, arXiv:1709.05011)."""
        return max(1, min(self.max_batch_per_gpu, self.max_global_batch // gpus))

    def windows(self, gpus: int) -> int:
        """Return the windows of an epoch's plan; each rank decodes its part of each one in a task of its own."""
        return max(1, round(self.pictures / default_window_size(self.pictures, self.row_groups, self.batch_per_gpu(gpus) * gpus)))


@dataclass(frozen=True)
class Cluster:
    """Equal nodes, their services, and rates in bytes, pictures or tasks per second.

    Attributes:
        decode_cores_per_gpu: cores that decode for a GPU, wherever they are.
        images_per_s_per_core: of decoding.
        plan_s_per_picture: core seconds to compute the order; each rank computes that of all ranks, and takes its part.
        nvlink_bytes_per_s, network_bytes_per_s: what a ring carries between GPUs of a node, and what a node's adapter does.
        hop_s: latency of one message of the ring.
        storage_bytes_per_s: of the store, to all nodes together.
        upload_bytes_per_s: from rank 0 to the store.
        dump_bytes_per_s: of copying the state into a checkpoint, which the step waits for.
        tasks_per_s: tasks and reports that the head takes.
        usd_per_node_hour, head_usd_per_hour: prices.
    """

    gpus_per_node: int
    images_per_s_per_gpu: float
    decode_cores_per_gpu: float
    images_per_s_per_core: float
    plan_s_per_picture: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    hop_s: float
    storage_bytes_per_s: float
    upload_bytes_per_s: float
    dump_bytes_per_s: float
    tasks_per_s: float
    usd_per_node_hour: float
    head_usd_per_hour: float

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Estimate:
    """One size of cluster. `waits` are seconds of a step by what they are spent on; they add up to `step_s`."""

    gpus: int
    images_per_s: float
    step_s: float
    waits: dict[str, float]
    bottleneck: str
    hours: float
    usd: float
    decode_cores_per_gpu_needed: float
    storage_bytes_per_s_needed: float

    def share(self, resource: str) -> float:
        return self.waits[resource] / self.step_s


def simulate(work: Workload, cluster: Cluster, gpus: int) -> Estimate:
    """Return what a step costs on `gpus` GPUs and what bounds it; needed cores and bandwidth are those at which GPUs are the bound."""
    batch = work.batch_per_gpu(gpus)
    steps = -(-work.pictures // (batch * gpus))
    compute = batch / cluster.images_per_s_per_gpu
    network = exposed_s(allreduce_s(work.gradient_bytes, cluster, gpus), compute)
    decode = batch / cluster.images_per_s_per_core + batch * gpus * cluster.plan_s_per_picture  # core seconds
    input_s = {
        "storage": batch * gpus * work.picture_bytes / storage_rate(cluster, gpus),
        "decoding": decode / cluster.decode_cores_per_gpu,
        "head": head_s(work, cluster, gpus) / steps,
    }
    slowest = max(input_s, key=lambda name: input_s[name])
    waits = {"GPU": compute, "network": network, **dict.fromkeys(input_s, 0.0)}
    waits[slowest] = max(0.0, input_s[slowest] - compute - network)
    waits["checkpoint"] = checkpoint_s(work, cluster, steps * sum(waits.values())) / steps
    step = sum(waits.values())
    is_late = waits[slowest] > 1e-9 * step  # and not by rounding
    spent = waits | ({slowest: input_s[slowest]} if is_late else {})
    bottleneck = max(spent, key=lambda name: spent[name])
    hours = work.epochs * steps * step / HOUR_S
    return Estimate(
        gpus,
        work.pictures / (steps * step),
        step,
        waits,
        bottleneck,
        hours,
        hours * usd_per_hour(cluster, gpus),
        decode / (compute + network),
        batch * gpus * work.picture_bytes / (compute + network),
    )


def allreduce_s(size_bytes: float, cluster: Cluster, gpus: int) -> float:
    """Return the seconds to average gradients over all GPUs by a ring: 2 (n - 1) / n of them through the slowest link, in 2 (n - 1) hops.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms". One ring goes over all GPUs and crosses each node's
    adapter once each way; NCCL's trees (since 2.4) have fewer hops, so that this is on the safe side.
    """
    if gpus == 1:
        return 0.0
    link = cluster.nvlink_bytes_per_s if gpus <= cluster.gpus_per_node else min(cluster.nvlink_bytes_per_s, cluster.network_bytes_per_s)
    hops = gpus if gpus <= cluster.gpus_per_node else cluster.nodes(gpus)
    return 2 * (gpus - 1) / gpus * size_bytes / link + 2 * (hops - 1) * cluster.hop_s


def exposed_s(allreduce: float, compute: float) -> float:
    """Return what of averaging gradients a step waits for: that which does not fit behind the backward pass, at least the last bucket.

    Li et al. 2020, "PyTorch Distributed" (arXiv:2006.15704): buckets of 25 MB go off during backward, two thirds of the
    time of a step; a quarter is taken as the last bucket's part, as for ResNet-50's 102 MB.
    """
    return max(allreduce - compute * 2 / 3, allreduce / 4)


def storage_rate(cluster: Cluster, gpus: int) -> float:
    """Return the bytes per second that reach all nodes: as many as the store gives or their adapters take."""
    return min(cluster.storage_bytes_per_s, cluster.nodes(gpus) * cluster.network_bytes_per_s)


def head_s(work: Workload, cluster: Cluster, gpus: int) -> float:
    """Return the seconds that the head is busy in an epoch: one task per rank and window, one report per rank."""
    return gpus * (work.windows(gpus) + 1) / cluster.tasks_per_s


def checkpoint_s(work: Workload, cluster: Cluster, epoch_s: float) -> float:
    """Return what a checkpoint per epoch holds up: copying the state, and what of the upload is not done by the next one.

    Rank 0 alone writes, beside the training, one checkpoint at a time; all others wait for it in the next step.
    """
    return work.checkpoint_bytes / cluster.dump_bytes_per_s + max(0.0, work.checkpoint_bytes / cluster.upload_bytes_per_s - epoch_s)


def usd_per_hour(cluster: Cluster, gpus: int) -> float:
    """Return the price of whole nodes and the head."""
    return cluster.nodes(gpus) * cluster.usd_per_node_hour + cluster.head_usd_per_hour


def elastic(parts: Sequence[tuple[float, Estimate]]) -> tuple[float, float]:
    """Return (hours, USD) of a run of which each estimate does a share of the pictures; shares add up to 1."""
    assert abs(sum(share for share, _ in parts) - 1) < 1e-9
    return sum(share * part.hours for share, part in parts), sum(share * part.usd for share, part in parts)


@dataclass(frozen=True)
class CoreCosts:
    """Seconds per step of a worker that trains on one core, each measured by itself.

    Attributes:
        compute_s: forward, backward and update, alone on the machine.
        contention: how much longer that takes with as many processes at once as there are workers.
        decode_s: decoding the batch, with all cores at it.
        other_s: what the run with one worker took beyond computing: Ray, the loop's own accounts.
        allreduce_s: averaging the gradients, by all workers.
    """

    compute_s: float
    contention: float
    decode_s: float
    other_s: float
    allreduce_s: float


def step_on_cores(costs: CoreCosts) -> float:
    """Return the seconds of a step where every core has a worker: nothing runs beside anything else, so that all costs add up."""
    return (costs.compute_s + costs.other_s) * costs.contention + costs.decode_s + costs.allreduce_s


def with_needs_met(cluster: Cluster, estimate: Estimate) -> Cluster:
    """Return the cluster with the decode cores and the storage at which this estimate's GPUs would be the bound."""
    return replace(
        cluster,
        decode_cores_per_gpu=max(cluster.decode_cores_per_gpu, estimate.decode_cores_per_gpu_needed),
        storage_bytes_per_s=max(cluster.storage_bytes_per_s, estimate.storage_bytes_per_s_needed),
    )
