"""Models that tests give to Ray's workers by name."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eagleray.models.zoo import CNN


class _Crashing(CNN):
    """Kills its process once, in the third epoch (of 15 steps) on rank 0."""

    def __init__(self, num_classes: int, marker: str) -> None:
        super().__init__(num_classes)
        self._marker = Path(marker)
        self._steps = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._steps += self.training
        if self._steps == 2 * 15 + 3 and torch.distributed.get_rank() == 0 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), 9)
        return super().forward(images)


def crash_in_third_epoch(num_classes: int, image_size: int, marker: str) -> torch.nn.Module:
    return _Crashing(num_classes, marker)
