"""Every architecture by name, for any number of classes and any input size it can take.

Names: `cnn`, `resnet_cifar`, `vgg_cifar` (here), every torchvision classifier, or a user's
`module:function`, called with `num_classes`, `image_size` and `model.params`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from eagleray.config.load import load_function
from eagleray.config.schema import ModelConfig
from eagleray.errors import ConfigError, near_miss
from eagleray.models.blur import add_blur
from eagleray.models.stems import RESNETS, SMALL_INPUT, has_small_stem, set_small_stem

SMALL_NETWORK = 30_000_000
"""Parameters up to which a network is tried out with its weights; without them torch loads its compiler, which takes longer."""


class CNN(nn.Module):
    """Two conv/pool blocks and two linear layers; float [N, 3, S, S] → logits [N, classes], any S ≥ 4.

    Pooling to 4×4 before the first linear layer makes the number of weights independent of S.
    """

    def __init__(self, num_classes: int, width: int = 32, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(2 * width * 16, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _resnet_cifar(num_classes: int, depth: int = 20, width: int = 16) -> nn.Module:
    """ResNet for small pictures, depth 6n + 2 (He et al. 2016, arXiv:1512.03385, section 4.2)."""
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"model.params.depth {depth}: resnet_cifar has 6n + 2 layers; use 8, 14, 20, 32, …")
    blocks = (depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    channels_in = width
    for stage in range(3):
        channels = width * 2**stage
        for block in range(blocks):
            layers.append(_BasicBlock(channels_in, channels, stride=2 if stage and not block else 1))
            channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, num_classes))


def _vgg_cifar(num_classes: int, width: int = 32, stages: int = 2, dropout: float = 0.0) -> nn.Module:
    """VGG with batch norm (Simonyan & Zisserman 2014, arXiv:1409.1556) for small pictures.

    Each stage has two 3×3 convolutions and halves the side; the classifier is one layer on the average.
    """
    layers: list[nn.Module] = []
    channels_in = 3
    for stage in range(stages):
        channels = width * 2**stage
        for _ in range(2):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            channels_in = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels_in, num_classes))


_OWN: dict[str, Callable[..., nn.Module]] = {"cnn": CNN, "resnet_cifar": _resnet_cifar, "vgg_cifar": _vgg_cifar}


def model_names() -> list[str]:
    """Return all names of the zoo, ours first."""
    return [*_OWN, *_torchvision_names()]


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build a network with random weights: float [N, 3, S, S] → logits [N, num_classes].

    GoogLeNet and Inception v3 return their auxiliary logits besides while in training mode.

    Raises:
        ConfigError: unknown name, a parameter the architecture does not have, or an input it cannot take.
    """
    builder = _builder(config.name, image_size)
    _check_options(config, builder)
    try:
        model: nn.Module = builder(num_classes=num_classes, **config.params)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"model.params for '{config.name}' at data.image_size {image_size} px: {error}") from error
    if config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_INPUT and has_small_stem(config.name)):
        set_small_stem(config.name, model)
    return add_blur(model) if config.blur_pool else model


def build_outline(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build a network without weights, on the device `meta`, which costs next to nothing."""
    try:
        with torch.device("meta"):
            return build_model(config, num_classes, image_size)
    except (NotImplementedError, RuntimeError):
        # RegNets, and maybe a user's own, compute with tensors while they are built.
        return build_model(config, num_classes, image_size).to("meta")


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError if `config` names no architecture, or a parameter or option it does not have."""
    _check_options(config, _builder(config.name, image_size=224))


def check_input(config: ModelConfig, num_classes: int, image_size: int, key: str = "data.image_size", size: int | None = None) -> None:
    """Raise ConfigError if the network cannot be built, or cannot take pictures of `key` pixels in training or evaluation.

    Args:
        size: the value of `key` where it is another one than that which the network is built for.
    """
    size = size or image_size
    model, device = build_outline(config, num_classes, image_size), torch.device("meta")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if sum(parameter.numel() for parameter in model.parameters()) <= SMALL_NETWORK:
            model, device = build_model(config, num_classes, image_size), torch.device("cpu")
        try:
            with device:
                for is_training in (True, False):  # auxiliary heads are there in training only
                    model.train(is_training)(torch.zeros(2, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"model '{config.name}' cannot take pictures of {key} {size} px ({error}); use another size, a larger one as a rule"
            ) from None


def _builder(name: str, image_size: int) -> Callable[..., nn.Module]:
    if ":" in name:
        return partial(load_function("model.name", name), image_size=image_size)
    if name in _OWN:
        return _OWN[name]
    if name not in _torchvision_names():
        raise ConfigError(f"model.name '{name}' is not in the zoo{near_miss(name, model_names())}; or give module:function")
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit"):
        options["image_size"] = image_size
    if name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    if name in ("googlenet", "inception_v3"):
        # Their ImageNet weights expect pixels in -1..1: what all pictures here are normalised by is undone within.
        options |= {"init_weights": True, "transform_input": True}
    from torchvision.models import get_model_builder

    return partial(get_model_builder(name), **options)


def _torchvision_names() -> list[str]:
    # Importing torchvision takes seconds; a worker with a small network of ours needs none of it.
    from torchvision import models

    return list(models.list_models(module=models))


def _check_options(config: ModelConfig, builder: Callable[..., nn.Module]) -> None:
    if config.stem == "small" and not has_small_stem(config.name):
        raise ConfigError(f"model.stem small: the zoo has no small stem for '{config.name}'; leave the key out")
    if config.blur_pool and not config.name.startswith(RESNETS):
        raise ConfigError(
            f"model.blur_pool: '{config.name}' is no ResNet; leave the key out, or use resnet50, resnext50_32x4d, resnet_cifar, …"
        )
    while isinstance(builder, partial):
        builder = builder.func
    parameters = inspect.signature(builder).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in config.params:
        if key not in parameters:
            raise ConfigError(f"model.params.{key}: '{config.name}' has no such parameter{near_miss(key, parameters)}")
