"""Mixup and CutMix: the pictures and labels of a batch mixed with each other, on the device.

As in `torchvision.transforms.v2`: one weight per batch, a row's partner is the row before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from eagleray.config.schema import TrainingConfig
from eagleray.data.stream import Batch


@dataclass(frozen=True)
class Mix:
    """How the rows of a batch are mixed.

    Attributes:
        partners: int64 [B], the row that each row is mixed with.
        weight: a row's own share of its label.
        box: (left, top, right, bottom) in pixels of the part that comes from the partner (CutMix);
            None: the pictures are blended by `weight` (mixup).
    """

    partners: torch.Tensor
    weight: float
    box: tuple[int, int, int, int] | None

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Mix uint8 [B, S, S, 3] into new memory: uint8 (CutMix) or float32 (mixup)."""
        if self.box is None:
            return torch.lerp(images[self.partners].float(), images.float(), self.weight)
        left, top, right, bottom = self.box
        mixed = images.clone()
        mixed[:, top:bottom, left:right] = images[self.partners, top:bottom, left:right]
        return mixed

    def probabilities(self, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Return the mixed labels, float32 [B, C], of int64 [B]."""
        return _blend(targets, targets[self.partners], self.weight, num_classes)


@dataclass(frozen=True)
class Inputs:
    """A batch on the device, mixed.

    Attributes:
        images: uint8 [B, S, S, 3], or float32 in the same range.
        targets: int64 [B], each row's own label.
        partners: int64 [B], the label of the row mixed in; None: nothing is.
        weight: a row's own share of its label.
        is_valid: bool [B].
    """

    images: torch.Tensor
    targets: torch.Tensor
    partners: torch.Tensor | None
    weight: float
    is_valid: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, mix: Mix | None, device: torch.device) -> Inputs:
        images, targets, is_valid = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets, batch.is_valid))
        if mix is None:
            return cls(images, targets, None, 1.0, is_valid)
        return cls(mix.images(images), targets, targets[mix.partners], mix.weight, is_valid)

    def split(self, num_parts: int) -> list[Inputs]:
        """Cut into parts of as many rows each; a row stays mixed with whatever it was."""
        rows = len(self.targets) // num_parts
        parts = [slice(start, start + rows) for start in range(0, len(self.targets), rows)]
        partners = [None if self.partners is None else self.partners[part] for part in parts]
        return [
            Inputs(self.images[part], self.targets[part], others, self.weight, self.is_valid[part])
            for part, others in zip(parts, partners, strict=True)
        ]

    def labels(self, num_classes: int) -> torch.Tensor:
        """Return what the loss compares with: int64 [B], or mixed float32 [B, C]."""
        return self.targets if self.partners is None else _blend(self.targets, self.partners, self.weight, num_classes)

    def dominant(self) -> torch.Tensor:
        """Return the label with the larger share, int64 [B]; the row's own if they are equal."""
        return self.targets if self.partners is None or self.weight >= 0.5 else self.partners


def draw_mix(config: TrainingConfig, batch: Batch, seed: list[int], device: torch.device) -> Mix | None:
    """Draw how a batch is mixed, as a pure function of `seed`; None where the job asks for no mixing.

    Rows that do not count are mixed with no other, neither fillers nor the grey ones in place of bad pictures.
    """
    alphas = {"mixup": config.mixup_alpha, "cutmix": config.cutmix_alpha}
    choices = [name for name, alpha in alphas.items() if alpha]
    if not choices:
        return None
    rng = np.random.default_rng(seed)
    choice = choices[rng.integers(len(choices))]
    weight, box = rng.beta(alphas[choice], alphas[choice]), None
    if choice == "cutmix":
        size = batch.images.shape[1]
        box = _draw_box(size, 1 - weight, rng)
        weight = 1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2
    valid = np.flatnonzero(batch.is_valid.numpy())
    partners = np.arange(len(batch.targets))
    partners[valid] = np.roll(valid, 1)
    return Mix(torch.from_numpy(partners).to(device, non_blocking=True), float(weight), box)


def _blend(own: torch.Tensor, others: torch.Tensor, weight: float, num_classes: int) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot
    return torch.lerp(one_hot(others, num_classes).float(), one_hot(own, num_classes).float(), weight)


def _draw_box(size: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a square of `share` of the picture about a random pixel, and cut it off at the edges."""
    half = int(0.5 * math.sqrt(share) * size)
    x, y = (int(place) for place in rng.integers(size, size=2))
    return max(x - half, 0), max(y - half, 0), min(x + half, size), min(y + half, size)
