"""A bare PyTorch DDP loop, started by torchrun: the pictures are tensors in memory already, nothing is checked, kept or told.

The least that training can cost with this model and batch on these devices.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from jobs.benchmarks.systems.protocol import answer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import get_model


def main(model: str, image_size: int, batch_size: int, num_classes: int, steps: int) -> None:
    """Time `steps` optimizer steps; `batch_size` is one rank's."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    torch.manual_seed(0)
    network = DistributedDataParallel(get_model(model, num_classes=num_classes).to(device, memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-5)
    images = torch.randn(4 * batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(num_classes, (4 * batch_size,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    dist.barrier()
    start = time.perf_counter()
    for step in range(steps):
        part = slice(step % 4 * batch_size, (step % 4 + 1) * batch_size)
        with autocast:
            loss = nn.functional.cross_entropy(network(images[part]), targets[part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step == 0:
            first_step_ended = time.time()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    rate = steps * batch_size * dist.get_world_size() / (time.perf_counter() - start)
    if dist.get_rank() == 0:
        answer({"images_per_s": rate, "first_step_ended": first_step_ended})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
