"""How the cluster's CPUs and GPUs are shared out among workers and their decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eagleray.config.schema import TrainingConfig
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

    @property
    def all_cpus(self) -> float:
        """Its own, and those of its decoding."""
        return self.cpus + sum(decode.tasks * decode.cpus for decode in (self.train_decode, self.eval_decode))


def validates_beside(train: TrainingConfig, free: dict[str, float]) -> bool:
    """Return whether a run has a share of the cluster for validation, besides those of its workers.

    On CPUs the workers' shares get smaller for it, so that it must be asked for by name.

    Args:
        free: Ray's `available_resources()`.

    Raises:
        TrainingError: it is asked for, and there is no GPU for it.
    """
    gpus, workers = free.get("GPU", 0), train.max_workers
    if train.validation == "inline" or train.use_gpu is False or (train.use_gpu == "auto" and gpus < workers):
        return train.validation == "beside"
    if train.validation == "beside" and gpus <= workers:
        raise TrainingError(
            f"train.validation: beside with {workers} workers needs {workers + 1} GPUs, {gpus:g} are free; "
            "set train.validation: inline, lower train.num_workers, or add GPU nodes"
        )
    return gpus > workers


def share_resources(cluster: dict[str, float], num_workers: int, use_gpu: bool | str) -> WorkerResources:
    """Give each of `num_workers` an equal share of the cluster's CPUs.

    A decoding task that waits for its batches to be used keeps its CPU. So the tasks of all streams
    together must fit beside the workers, or two streams that wait for each other could hold all CPUs;
    on a small machine each gets a fraction of a CPU.

    Args:
        cluster: Ray's `cluster_resources()`, and what it may grow by.

    Raises:
        TrainingError: GPUs are asked for and the cluster has too few.
    """
    num_gpus = cluster.get("GPU", 0)
    if use_gpu is True and num_gpus < num_workers:
        raise TrainingError(
            f"train.use_gpu: true with {num_workers} workers needs {num_workers} GPUs, the cluster has at most {num_gpus:g}; "
            "set train.use_gpu: auto, lower train.num_workers, or add GPU nodes"
        )
    gpus = 1.0 if use_gpu is True or (use_gpu == "auto" and num_gpus >= num_workers) else 0.0
    share = cluster.get("CPU", 1.0) / num_workers
    # Just above half of a small share, so that a node does not take a lost one's worker besides its own.
    cpus = 1.0 if share >= 3 else (math.floor(50 * share) + 1) / 100
    return share_what_is_left(WorkerResources(cpus, gpus, 1, DecodeResources(), DecodeResources()), cluster, num_workers)


def share_what_is_left(worker: WorkerResources, cluster: dict[str, float], num_workers: int) -> WorkerResources:
    """Return `worker` with threads and decoding for so many workers on the cluster as it is now.

    An elastic run may go on with fewer or more workers per node than it began with.
    """
    share = cluster.get("CPU", 1.0) / num_workers
    left = share - worker.cpus
    threads = max(1, int(share))
    if left >= 2:
        return replace(worker, threads=threads, train_decode=DecodeResources.on(int(left) - 1), eval_decode=DecodeResources(1, 1.0))
    half = DecodeResources(tasks=1, cpus=max(0.01, math.floor(left / 2 * 100) / 100))
    return replace(worker, threads=threads, train_decode=half, eval_decode=half)
