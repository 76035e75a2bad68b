"""What a network is made of: its head, and its layers from the input to the head."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from eagleray.config.schema import ModelConfig
from eagleray.models.zoo import build_outline


def head_names(config: ModelConfig, num_classes: int, image_size: int) -> frozenset[str]:
    """Return the names of the parameters whose shape depends on the number of classes.

    They are found by building the network for two numbers of classes, so this holds for a user's own too.
    """
    one, other = (build_outline(config, count, image_size).state_dict() for count in (num_classes, num_classes + 1))
    return frozenset(name for name, tensor in one.items() if name not in other or tensor.shape != other[name].shape)


def layer_depths(model: nn.Module, head: Collection[str]) -> dict[str, int]:
    """Return for each parameter by how many layers it lies below the head; 0: in the head itself.

    A layer is a child of a sequence (a residual block, a transformer block, a convolution) or of the network.
    The modules are taken to be defined in the order in which a picture passes them.

    Args:
        head: names of the head's parameters.
    """
    places: dict[str, int] = {}
    place = -1
    for parameters, is_layer in _parts(model):
        body = {name: parameter for name, parameter in parameters.items() if name not in head}
        # Norms, and what stands beside the layers such as a position embedding, go with the layer before them.
        if is_layer and any(parameter.ndim > 1 for parameter in body.values()):
            place += 1
        places |= dict.fromkeys(body, max(place, 0))
    return {name: place + 1 - places[name] if name in places else 0 for name, _ in model.named_parameters()}


def iterate_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers from the input to the head: each child of a sequence (a block, a convolution) or of the network."""
    half = _size(model) / 2

    def layers_of(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if _holds_layers(child, half):
                yield from layers_of(child)
            else:
                yield child

    return layers_of(model)


def _holds_layers(child: nn.Module, half: float) -> bool:
    """Say whether this is no layer but what holds layers: a sequence, or what has most of the weights (an encoder, a stage)."""
    return type(child) in (nn.Sequential, nn.ModuleList) or (any(child.children()) and _size(child) > half)


def _parts(model: nn.Module) -> Iterator[tuple[dict[str, nn.Parameter], bool]]:
    """Yield the parameters of each child of a sequence by name, and whether it is one or stands beside them."""
    half = _size(model) / 2

    def parts_of(module: nn.Module, prefix: str) -> Iterator[tuple[dict[str, nn.Parameter], bool]]:
        yield {prefix + name: parameter for name, parameter in module.named_parameters(recurse=False)}, not any(module.children())
        for name, child in module.named_children():
            if _holds_layers(child, half):
                yield from parts_of(child, f"{prefix}{name}.")
            else:
                yield dict(child.named_parameters(prefix + name)), True

    return parts_of(model, "")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
