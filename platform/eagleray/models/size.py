"""How large a network is, known without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from eagleray.config.schema import ModelConfig
from eagleray.models.zoo import build_outline


@dataclass(frozen=True)
class NetworkSize:
    parameters: int
    flops: int
    """Floating-point operations of one picture's forward pass; a multiply-add counts as two."""


def network_size(config: ModelConfig, num_classes: int, image_size: int) -> NetworkSize:
    """Return the size of a network for pictures of `image_size` pixels a side.

    Raises:
        ConfigError: there is no such network, or it cannot take such pictures.
    """
    model = build_outline(config, num_classes, image_size).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return NetworkSize(sum(parameter.numel() for parameter in model.parameters()), int(counter.get_total_flops()))
