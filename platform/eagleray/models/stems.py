"""First layers for small pictures: they keep the resolution, where the usual ones halve it once or more."""

from __future__ import annotations

from typing import Any

from torch import nn

SMALL_INPUT = 64
"""Up to this side (pixels) `model.stem: auto` means the small stem."""

RESNETS = ("resnet", "resnext", "wide_resnet")
_FIRST_STRIDE = {
    "efficientnet": "features.0.0",
    "mobilenet": "features.0.0",
    "mnasnet": "layers.0",
    "regnet": "stem.0",
    "shufflenet": "conv1.0",
}
"""Family → its first convolution, 3×3, which keeps its shape and with it fits trained weights."""


def has_small_stem(name: str) -> bool:
    """Say whether there is a small stem for the network of that name; those of ours for small pictures need none."""
    return name != "resnet_cifar" and ":" not in name and name.startswith((*RESNETS, "densenet", "convnext", *_FIRST_STRIDE))


def set_small_stem(name: str, model: nn.Module) -> nn.Module:
    """Change the stem of torchvision's network of that name in place."""
    network: Any = model
    if name.startswith(RESNETS):
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif name.startswith("densenet"):
        network.features.conv0 = nn.Conv2d(3, network.features.conv0.out_channels, 3, padding=1, bias=False)
        network.features.pool0 = nn.Identity()
    elif name.startswith("convnext"):
        network.features[0][0] = nn.Conv2d(3, network.features[0][0].out_channels, 3, padding=1)
    else:
        path = next(path for family, path in _FIRST_STRIDE.items() if name.startswith(family))
        network.get_submodule(path).stride = (1, 1)
    if name.startswith("shufflenet"):
        network.maxpool = nn.Identity()
    return model
