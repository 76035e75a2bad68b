"""Putting a state dict into a network: all of it, or all but a head for other classes."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from eagleray.errors import ConfigError

_NAMED = 3
"""Parameters that an error names."""


def restore_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load the state dict of an equal network; raises RuntimeError if it is not one."""
    model.load_state_dict(_with_versions(weights, model))


def fit_weights(model: nn.Module, weights: dict[str, torch.Tensor], head: Collection[str], *, keep_head: bool) -> None:
    """Load trained weights; the head stays as it is if they are for another number of classes.

    Args:
        weights: of a network like `model`, but maybe for other classes, or without a head.
        head: names of the head's parameters.
        keep_head: take the head of `weights` if it has the right size.

    Raises:
        ConfigError: anything but the head is missing, left over, or of another shape; says how many, and names the first.
    """
    own = model.state_dict()
    if not keep_head or any(name not in weights or weights[name].shape != own[name].shape for name in head):
        weights = {name: tensor for name, tensor in weights.items() if name not in head}
        replaced = set(head)
    else:
        replaced = set()
    misshaped = [name for name, tensor in weights.items() if name in own and tensor.shape != own[name].shape]
    fitting = {name: tensor for name, tensor in weights.items() if name not in misshaped}
    outcome = model.load_state_dict(_with_versions(fitting, model), strict=False)
    # The counter of batch norms is younger than many trained weights.
    missing = [name for name in outcome.missing_keys if name not in replaced.union(misshaped) and not name.endswith(".num_batches_tracked")]
    problems = [
        _count("missing", missing),
        _count("that the model does not have", outcome.unexpected_keys),
        _count("of another shape", [f"{name} {list(weights[name].shape)} for {list(own[name].shape)}" for name in misshaped]),
    ]
    if any(problems):
        raise ConfigError(", ".join(filter(None, problems)))


def unwrap_weights(document: Any) -> dict[str, torch.Tensor] | None:
    """Return the state dict within what people save: itself, or one under the usual keys; None if there is none."""
    for key in ("weights", "state_dict", "model"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    if not isinstance(document, dict) or not document or not all(isinstance(value, torch.Tensor) for value in document.values()):
        return None
    if all(name.startswith("module.") for name in document):  # saved from within DataParallel or DDP
        document = {name.removeprefix("module."): value for name, value in document.items()}
    return {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in document.items()}


_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""torchvision's weights for DenseNets still have the names that its modules had at first (`norm.1` for `norm1`)."""


def _with_versions(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Say that the weights are of the modules' newest versions, which MNASNet insists on and safetensors cannot say."""
    versioned = type(model.state_dict())(weights)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned


def _count(what: str, names: list[str]) -> str:
    more = ", …" if len(names) > _NAMED else ""
    return f"{len(names)} {what} ({', '.join(names[:_NAMED])}{more})" if names else ""
