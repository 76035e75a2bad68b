"""A network that waits for a device it does not have: a benchmark of who gets room when then needs no more than two cores."""

from __future__ import annotations

import time

import torch

from eagleray.models.zoo import CNN


class _Waiting(CNN):
    def __init__(self, num_classes: int, step_s: float, eval_s: float) -> None:
        super().__init__(num_classes)
        self._step_s = step_s
        self._eval_s = eval_s

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self._step_s if self.training else self._eval_s)
        return super().forward(images)


def cnn(num_classes: int, image_size: int, step_s: float = 0.0, eval_s: float = 0.0) -> torch.nn.Module:
    """Return the small CNN that takes so many seconds more for each batch, in training and in evaluation."""
    return _Waiting(num_classes, step_s, eval_s)
