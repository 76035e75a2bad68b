"""Measuring finished weights on a split that selected nothing."""

from __future__ import annotations

import ray
import torch

from eagleray.config.schema import JobConfig
from eagleray.data.shards import load_manifest
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model
from eagleray.training.loop import Forward, Worker, eval_stream, evaluate, set_up_process
from eagleray.training.resources import WorkerResources, share_resources


def evaluate_weights(job: JobConfig, weights: dict[str, torch.Tensor], uri: str, prefix: str) -> dict[str, float]:
    """Evaluate a state dict of `job.model` on the split at `uri`, on one GPU of the cluster or else in this process.

    Returns:
        `{prefix}_loss`, `{prefix}_top1`, `{prefix}_top5` (fractions), `{prefix}_samples`.
    """
    resources = share_resources(ray.cluster_resources(), 1, job.train.use_gpu)
    if not resources.gpus:
        return _evaluate(job, weights, uri, prefix, resources)
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(_evaluate)
    metrics: dict[str, float] = ray.get(task.remote(job, weights, uri, prefix, resources))
    return metrics


def _evaluate(job: JobConfig, weights: dict[str, torch.Tensor], uri: str, prefix: str, resources: WorkerResources) -> dict[str, float]:
    device = torch.device("cuda" if resources.gpus else "cpu")
    worker = Worker(0, 1, device, resources.threads, resources.train_decode, resources.eval_decode)
    set_up_process(job, worker)
    model = build_model(job.model, len(load_manifest(uri).classes), job.data.image_size)
    model.load_state_dict(weights)
    model.to(device).to(memory_format=torch.channels_last)
    batches = next(eval_stream(job, uri, worker).epochs(0, 1))
    return evaluate(model, batches, Forward(device, Preprocessing.of(job.data), job.train.precision), prefix)
