"""Measuring finished weights on a split that selected nothing."""

from __future__ import annotations

from itertools import chain
from typing import Any

import ray
import torch

from eagleray.config.schema import JobConfig
from eagleray.data.shards import load_manifest
from eagleray.data.transforms import Preprocessing
from eagleray.models.weights import restore_weights
from eagleray.models.zoo import build_model
from eagleray.placement import cluster_for
from eagleray.training.loop import Evaluation, Forward, Worker, eval_stream, evaluate, set_up_process
from eagleray.training.resources import WorkerResources, share_resources


def evaluate_weights(job: JobConfig, weights: dict[str, torch.Tensor], uri: str, prefix: str) -> dict[str, float]:
    """Evaluate a state dict of `job.model` on the split at `uri`, on one GPU of the cluster or else in this process.

    Returns:
        The metrics of an `Evaluation`.
    """
    resources = share_resources(cluster_for(1, job.train.use_gpu), 1, job.train.use_gpu)
    if not resources.gpus:
        return _evaluate(job, weights, uri, prefix, resources).metrics
    evaluation: Evaluation = ray.get(start_evaluation(job, weights, uri, prefix, resources))
    return evaluation.metrics


def start_evaluation(
    job: JobConfig, weights: dict[str, torch.Tensor], uri: str, prefix: str, resources: WorkerResources, num_parts: int = 1
) -> Any:
    """Evaluate as `evaluate_weights` does, in a task with resources of its own; a task whose process dies is tried again.

    Args:
        num_parts: workers whose parts of the batches are gone through one after the other, for the very metrics that they
            would come to together.

    Returns:
        A reference to the `Evaluation`.
    """
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(_evaluate)
    return task.remote(job, weights, uri, prefix, resources, num_parts)


def _evaluate(
    job: JobConfig, weights: dict[str, torch.Tensor], uri: str, prefix: str, resources: WorkerResources, num_parts: int = 1
) -> Evaluation:
    device = torch.device("cuda" if resources.gpus else "cpu")
    workers = [
        Worker(rank, num_parts, device, resources.threads, resources.train_decode, resources.eval_decode) for rank in range(num_parts)
    ]
    set_up_process(job, workers[0])
    num_classes = len(load_manifest(uri).classes)
    model = build_model(job.model, num_classes, job.data.image_size)
    restore_weights(model, weights)
    model.to(device).to(memory_format=torch.channels_last)
    batches = chain.from_iterable(next(eval_stream(job, uri, worker).epochs(0, 1)) for worker in workers)
    forward = Forward(device, Preprocessing.of(job.data), job.train.precision)
    return evaluate(model, batches, forward, prefix, num_classes, job.train.eval_flip)
