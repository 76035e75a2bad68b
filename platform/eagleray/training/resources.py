"""How the cluster's CPUs and GPUs are shared out among workers and their decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eagleray.data.stream import DecodeResources
from eagleray.errors import TrainingError


@dataclass(frozen=True)
class WorkerResources:
    """Logical resources of one worker; `train_decode` and `eval_decode` are its streams', besides its own `cpus`."""

    cpus: float
    gpus: float
    threads: int
    train_decode: DecodeResources
    eval_decode: DecodeResources


def share_resources(cluster: dict[str, float], num_workers: int, use_gpu: bool | str) -> WorkerResources:
    """Give each of `num_workers` an equal share of the cluster's CPUs.

    A decoding task that waits for its batches to be used keeps its CPU. So the tasks of all streams
    together must fit beside the workers, or two streams that wait for each other could hold all CPUs;
    on a small machine each gets a fraction of a CPU.

    Args:
        cluster: Ray's `cluster_resources()`.

    Raises:
        TrainingError: GPUs are asked for and the cluster has too few.
    """
    num_gpus = cluster.get("GPU", 0)
    if use_gpu is True and num_gpus < num_workers:
        raise TrainingError(
            f"train.use_gpu: true with {num_workers} workers needs {num_workers} GPUs, the cluster has {num_gpus:g}; "
            "set train.use_gpu: auto, lower train.num_workers, or add GPU nodes"
        )
    gpus = 1.0 if use_gpu is True or (use_gpu == "auto" and num_gpus >= num_workers) else 0.0
    share = cluster.get("CPU", 1.0) / num_workers
    if share < 3:
        quarter = math.floor(share / 4 * 100) / 100
        one = DecodeResources(tasks=1, cpus=quarter)
        return WorkerResources(2 * quarter, gpus, max(1, int(share)), one, one)
    train_decode = DecodeResources(tasks=int(share) - 2, cpus=1.0)
    return WorkerResources(1.0, gpus, max(1, int(share)), train_decode, DecodeResources(tasks=1, cpus=1.0))
