"""Which parts of a network are trained, and when, where it starts from trained weights."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from eagleray.config.schema import FineTuneConfig, JobConfig
from eagleray.errors import ConfigError, near_miss
from eagleray.models.layers import head_names
from eagleray.models.zoo import build_outline


def find_head(job: JobConfig, num_classes: int) -> frozenset[str]:
    """Return the names of the head's parameters; none where the job treats them like all others."""
    if job.train.finetune == FineTuneConfig():
        return frozenset()
    return head_names(job.model, num_classes, job.data.image_size)


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """Freeze for good the parameters whose names start with one of `parts` (whole words between the dots).

    Raises:
        ConfigError: nothing starts so.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(_starts_with(name, part) for name in names):
            known = sorted({".".join(words[:count]) for words in (name.split(".") for name in names) for count in range(1, len(words) + 1)})
            first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            hint = near_miss(part, known) or f"; its parts: {first}"
            raise ConfigError(f"train.finetune.freeze: the model has no part '{part}'{hint}")
    for name, parameter in model.named_parameters():
        if any(_starts_with(name, part) for part in parts):
            parameter.requires_grad_(False)


def train_parts(model: nn.Module, optimizer: torch.optim.Optimizer, head: Collection[str], *, head_only: bool) -> None:
    """Let only the head, or all that the optimizer has, be trained from now on."""
    heads = {id(parameter) for name, parameter in model.named_parameters() if name in head}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(not head_only or id(parameter) in heads)
            parameter.grad = None


def set_train_mode(model: nn.Module) -> None:
    """Put the model into training mode, but for batch norms that are frozen: those keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def check_finetune(job: JobConfig, num_classes: int) -> None:
    """Raise ConfigError if `train.finetune` freezes parts the model does not have, all of it, or random weights."""
    config = job.train.finetune
    if not config.freeze and not config.freeze_epochs:
        return
    if job.model.pretrained is None and ":" not in job.model.name:
        raise ConfigError("train.finetune freezes random weights; give model.pretrained, or leave freeze and freeze_epochs out")
    model = build_outline(job.model, num_classes, job.data.image_size)
    freeze_parts(model, config.freeze)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(f"train.finetune.freeze {config.freeze} leaves nothing to train; take a part out")
    if config.freeze_epochs and not trained & head_names(job.model, num_classes, job.data.image_size):
        raise ConfigError(
            f"train.finetune.freeze_epochs trains the head alone, but '{job.model.name}' has none that is trained "
            "(layers whose size is the number of classes); leave the key out, or take the head out of train.finetune.freeze"
        )


def _starts_with(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")
