"""What a step is made of on this machine's cores, each by itself: started by torchrun, one process and one thread per core."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from jobs.benchmarks.systems.protocol import answer
from torch import nn
from torchvision.models import get_model

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""As DDP's buckets of 25 MB in float32."""


def main(model: str, image_size: int, batch_size: int, num_classes: int, steps: int) -> None:
    """Time a step of one process while the others sleep, then of all at once without a word between them, then averaging gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = get_model(model, num_classes=num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-5)
    images = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(num_classes, (batch_size,))
    buckets = torch.zeros(sum(parameter.numel() for parameter in network.parameters())).split(BUCKET_ELEMENTS)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()

    def average() -> None:
        for bucket in buckets:
            dist.all_reduce(bucket)

    alone = _seconds(step, steps) if dist.get_rank() == 0 else 0.0
    dist.barrier()
    together = torch.tensor(_seconds(step, steps))
    dist.all_reduce(together)
    averaging = _seconds(average, steps)
    if dist.get_rank() == 0:
        answer({"alone_s": alone, "together_s": together.item() / dist.get_world_size(), "allreduce_s": averaging})
    dist.destroy_process_group()


def _seconds(call: Callable[[], None], times: int) -> float:
    """Return the median seconds of a call, after two untimed ones."""
    call(), call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
