"""What a job will cost, before it starts: its work, at the speed and the price of a cluster description's training nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eagleray.cluster.description import Cloud, ClusterDescription
from eagleray.config.schema import JobConfig
from eagleray.errors import ConfigError
from eagleray.models.size import network_size

HOUR_S = 3600.0

PEAK_FLOPS = {"T4": 65e12, "V100": 125e12, "L4": 121e12, "A10G": 70e12, "A100": 312e12, "H100": 989e12}
"""By kind of GPU, operations per second in half precision, without sparsity (NVIDIA's data sheets)."""

UTILISATION = 0.15
"""Share of its peak at which a GPU trains. Of ResNet-50 it is 0.13 with FFCV (16 epochs in 14.9 minutes on 8 A100,
github.com/libffcv/ffcv-imagenet) and 0.19 with DALI (2,470 images/s on one, NVIDIA DeepLearningExamples)."""

BACKWARD = 2
"""Work of the backward pass, in forward passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""


@dataclass(frozen=True)
class CostEstimate:
    """Of a run, or of all trials of a search as if each were the job's own model and none were stopped early."""

    trials: int
    images_per_s: float
    """Of a worker, averaged over training."""

    is_measured: bool
    """Whether `images_per_s` was given, rather than computed from the network's work."""

    workers: int
    """At a time; of a search, trials at a time."""

    nodes: int
    hours: float
    worker_hours: float
    machine: str
    usd: float
    """On demand, with the head."""

    spot_usd: float | None
    """With training nodes as spot; None where the cloud has no such machine as spot."""


def estimate_cost(
    job: JobConfig,
    description: ClusterDescription,
    cloud: Cloud,
    *,
    num_classes: int,
    train_pictures: int,
    val_pictures: int,
    images_per_s: float | None = None,
) -> CostEstimate:
    """Estimate time and cost of a job on the nodes of group `train`, start-up of nodes not included.

    Args:
        train_pictures: of an epoch.
        val_pictures: looked at after each epoch.
        images_per_s: of one worker while it trains, where that was measured; by default from the network's work, the GPU's
            peak and `UTILISATION`.

    Raises:
        ConfigError: the description has no group `train` or no machine for it, the speed of its nodes is not known, or the
            network cannot be.
    """
    group = description.groups.get("train")
    if group is None:
        raise ConfigError("groups: there is no `train`, whose nodes the job would run on")
    epochs = job.tune.epochs if job.tune is not None else job.train.epochs
    trials = job.tune.num_trials if job.tune is not None else 1
    train_flops, val_flops = _run_flops(job, epochs, num_classes, train_pictures, val_pictures)
    speed = images_per_s * train_flops / (epochs * train_pictures) if images_per_s is not None else _flops_per_s(job, group.gpu)
    worker_hours = trials * (train_flops + val_flops) / speed / HOUR_S
    per_node = group.gpus or 1
    workers = job.train.max_workers if job.tune is None else min(trials, job.tune.max_concurrent or group.max * per_node)
    nodes = math.ceil(workers / per_node)
    if nodes > group.max:
        raise ConfigError(f"groups.train.max: {group.max} node(s) hold {group.max * per_node} worker(s), the job has {workers}")
    hours = worker_hours / workers

    def usd(is_spot: bool) -> float:
        machine = description.machine(cloud, group, "groups.train", is_spot=is_spot)
        head = description.machine(cloud, description.head, "head")
        prices = description.known_machines(cloud)
        node = (prices[machine].spot_usd_per_hour if is_spot else None) or prices[machine].usd_per_hour
        return hours * (nodes * node + prices[head].usd_per_hour)

    try:
        spot_usd = usd(is_spot=True)
    except ConfigError:
        spot_usd = None
    return CostEstimate(
        trials=trials,
        images_per_s=speed * epochs * train_pictures / train_flops,
        is_measured=images_per_s is not None,
        workers=workers,
        nodes=nodes,
        hours=hours,
        worker_hours=worker_hours,
        machine=description.machine(cloud, group, "groups.train"),
        usd=usd(is_spot=False),
        spot_usd=spot_usd,
    )


def _run_flops(job: JobConfig, epochs: int, num_classes: int, train_pictures: int, val_pictures: int) -> tuple[float, float]:
    """Return the work of training and of validation; training may be at other sizes, and grow."""
    sizes = [job.data.train_size.of_epoch(epoch) if job.data.train_size else job.data.image_size for epoch in range(epochs)]
    per_picture = {size: network_size(job.model, num_classes, size).flops for size in {*sizes, job.data.image_size}}
    train = train_pictures * (1 + BACKWARD) * sum(per_picture[size] for size in sizes)
    return train, val_pictures * per_picture[job.data.image_size] * epochs


def _flops_per_s(job: JobConfig, gpu: str | None) -> float:
    if job.train.precision == "fp32" or gpu not in PEAK_FLOPS:
        what = "train.precision fp32" if gpu in PEAK_FLOPS else f"groups.train.gpu {gpu or 'none'}"
        raise ConfigError(f"{what}: its speed is not known; give what a worker was seen to do (`eagleray runs show`): --images-per-second")
    return PEAK_FLOPS[gpu] * UTILISATION
