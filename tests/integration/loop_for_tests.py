"""The training loop run in the test's own process, without Ray Train."""

from __future__ import annotations

import torch

from eagleray.config.schema import JobConfig
from eagleray.data.stream import DecodeResources
from eagleray.training.loop import Pause, Worker, train


def worker_of(rank: int = 0, world_size: int = 1) -> Worker:
    decode = DecodeResources(tasks=1, cpus=0.2)
    return Worker(rank, world_size, torch.device("cpu"), 1, decode, decode)


def run(job: JobConfig, resume: dict[str, object] | None = None) -> list[Pause]:
    """Run the loop and keep the state of each pause as it was then."""
    pauses = []
    for pause in train(job, worker_of(), resume):
        state = {name: _copy(part) for name, part in pause.state().items()}
        pauses.append(Pause(pause.epoch, pause.metrics, pause.quarantined, lambda state=state: state))
    return pauses


def _copy(part: object) -> object:
    if isinstance(part, torch.Tensor):
        return part.clone()
    if isinstance(part, dict):
        return {key: _copy(value) for key, value in part.items()}
    return [_copy(value) for value in part] if isinstance(part, list) else part
