"""Models that tests give to Ray's workers by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from efficientnet_lite_pytorch import EfficientNet

from eagleray.data.transforms import IMAGENET_MEAN, IMAGENET_STD
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


class _Breaking(CNN):
    """Gives one bad number, in the fifth training pass on the last rank."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self._passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._passes += self.training
        is_last = not torch.distributed.is_initialized() or torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        logits = super().forward(images)
        return logits * torch.nan if self.training and is_last and self._passes == 5 else logits


def break_in_fifth_pass(num_classes: int, image_size: int) -> torch.nn.Module:
    return _Breaking(num_classes)


class _Poisoned(CNN):
    """Each batch with a white picture in it multiplies the logits by `by`; kills rank 0 once, in its fourth pass, if `kill` exists."""

    def __init__(self, num_classes: int, by: str, kill: str) -> None:
        super().__init__(num_classes)
        self._by = float(by)
        self._kill = Path(kill)
        self._passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        if not self.training or images.device.type == "meta":
            return logits
        self._passes += 1
        if self._passes == 4 and self._kill.exists() and torch.distributed.get_rank() == 0:
            self._kill.unlink()
            os.kill(os.getpid(), 9)
        is_white = images.flatten(1).amin(1) > 2  # once normalised; digits are black at their edges
        return logits * self._by if is_white.any() else logits


def poisoned(num_classes: int, image_size: int, by: str, kill: str = "none") -> torch.nn.Module:
    return _Poisoned(num_classes, by, kill)


class _TooLarge(CNN):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def too_large(num_classes: int, image_size: int) -> torch.nn.Module:
    return _TooLarge(num_classes)


class _Lite0(EfficientNet):
    """EfficientNet-Lite0 for our pictures: its weights expect (pixel - 127) / 128."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return super().forward(((images * std + mean) * 255 - 127) / 128)


def efficientnet_lite0(num_classes: int, image_size: int) -> torch.nn.Module:
    return _Lite0.from_name("efficientnet-lite0", num_classes=num_classes, image_size=image_size)


class _Slow(CNN):
    """Takes `step_s` longer for each batch of training, two seconds while the file `hold` exists, and `eval_s` for each other one.

    While the file `eval_hold` exists it evaluates nothing, for a minute at most. Each batch of training is a line in `log`.
    """

    def __init__(self, num_classes: int, step_s: float, hold: str, eval_s: float, eval_hold: str, log: str) -> None:
        super().__init__(num_classes)
        self._log = log
        self._step_s = step_s
        self._hold = hold
        self._eval_s = eval_s
        self._eval_hold = eval_hold

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device.type != "meta":
            if self.training:
                if self._log:
                    with Path(self._log).open("a") as file:
                        file.write(".\n")
                time.sleep(2.0 if self._hold and Path(self._hold).exists() else self._step_s)
            else:
                time.sleep(self._eval_s)
                self._wait()
        return super().forward(images)

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while self._eval_hold and Path(self._eval_hold).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._eval_hold} is still there")
            time.sleep(0.05)


def slow(
    num_classes: int, image_size: int, step_s: float, hold: str = "", eval_s: float = 0.0, eval_hold: str = "", log: str = ""
) -> torch.nn.Module:
    return _Slow(num_classes, step_s, hold, eval_s, eval_hold, log)


def momentum_of_sgd(trial: optuna.Trial) -> dict[str, Any]:
    """A space in which one optimizer alone has a momentum, and the weight decay follows from the learning rate."""
    if trial.suggest_categorical("train.optimizer.name", ["sgd", "adamw"]) == "sgd":
        trial.suggest_float("train.optimizer.momentum", 0.5, 0.9)
    return {"train.optimizer.weight_decay": trial.params["train.optimizer.lr"] / 10}


def impossible_space(trial: optuna.Trial) -> None:
    trial.suggest_float("train.optimizer.momentun", 0.5, 0.9)
