"""What the peers' servers share: the networks, and the steps from a JPEG to an answer as torchvision's documentation has them.

Runs in the peers' environments: torch, torchvision and Pillow are all there is.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import v2

TASK = "EAGLERAY_BENCHMARK_TASK"
"""Environment variable with the task as JSON, for servers that start processes of their own."""

MAX_BATCH_SIZE = 32
BATCH_WAIT_S = 0.002


@dataclass(frozen=True)
class ServeTask:
    """Serve a network on a port of the loopback.

    Attributes:
        network: `resnet18`, or `cnn` (convolutions 3 → 32 → 64, one layer of 128).
        backend: eagleray's `serve.backend`; peers compute with eager PyTorch.
        placement: eagleray's `serve.placement`.
        package: the network trained, as eagleray's package; None: with random weights.
        int8_agreement: eagleray's `serve.int8_agreement`.
    """

    network: str
    image_size: int
    num_classes: int
    port: int
    backend: str = "auto"
    placement: str = "auto"
    package: str | None = None
    int8_agreement: float | None = None


def task() -> ServeTask:
    return ServeTask(**json.loads(os.environ[TASK]))


class Classifier:
    """From encoded pictures to answers; eager PyTorch on all cores."""

    def __init__(self, to_do: ServeTask) -> None:
        size = to_do.image_size
        torch.set_num_threads(os.cpu_count() or 1)
        self._network = build(to_do).eval().to(memory_format=torch.channels_last)
        self._transform = v2.Compose(
            [
                v2.Resize(size * 8 // 7, antialias=True),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def decode(self, data: bytes) -> torch.Tensor:
        return self.prepare(Image.open(io.BytesIO(data)))

    def prepare(self, picture: Image.Image) -> torch.Tensor:
        image: torch.Tensor = self._transform(picture.convert("RGB"))
        return image

    def classify(self, images: list[torch.Tensor]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
            best = self._network(batch).softmax(dim=1).max(dim=1)
        return [{"label": int(i), "probability": float(p)} for p, i in zip(best.values, best.indices, strict=True)]


def build(to_do: ServeTask) -> nn.Module:
    torch.manual_seed(0)
    if to_do.network == "resnet18":
        return resnet18(num_classes=to_do.num_classes)
    side = to_do.image_size // 4
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side * side, 128),
        nn.ReLU(),
        nn.Linear(128, to_do.num_classes),
    )
