"""Optimizer, schedule, loss and weight averaging, from the job file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eagleray.config.schema import OptimizerConfig, ScheduleConfig, TrainingConfig
from eagleray.training.mixing import Mix

AUXILIARY_WEIGHT = 0.3
"""Share of each auxiliary head's loss (Szegedy et al. 2014, arXiv:1409.4842, section 5)."""

WARMUP_START = 0.01


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer; biases and norms (one-dimensional parameters) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = bool(parameters) and parameters[0].is_cuda
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """Build the learning-rate schedule, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step / steps_per_epoch, epochs, config))


def learning_rate_factor(epoch: float, epochs: int, config: ScheduleConfig) -> float:
    """Return the share of the peak learning rate at a (fractional) epoch.

    Linear warm-up (Goyal et al. 2017, arXiv:1706.02677), then cosine (Loshchilov & Hutter 2016,
    arXiv:1608.03983), division by ten every `step_epochs`, or constant.
    """
    if epoch < config.warmup_epochs:
        return WARMUP_START + (1 - WARMUP_START) * epoch / config.warmup_epochs
    if config.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - config.warmup_epochs) / (epochs - config.warmup_epochs))))
    if config.name == "step":
        return float(0.1 ** (int(epoch) // config.step_epochs))
    return 1.0


def build_ema(model: nn.Module, config: TrainingConfig) -> AveragedModel | None:
    """Build the moving average of weights and buffers, if the job asks for one."""
    if config.ema_decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)


def sample_losses(outputs: Any, targets: torch.Tensor, label_smoothing: float, mix: Mix | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross-entropy of each sample float [B], main logits [B, C]); auxiliary heads count if there are any."""
    heads = [head for head in outputs if head is not None] if isinstance(outputs, tuple) else [outputs]
    if mix is not None:
        targets = mix.probabilities(targets, heads[0].shape[1])
    losses = [nn.functional.cross_entropy(head, targets, reduction="none", label_smoothing=label_smoothing) for head in heads]
    return losses[0] + AUXILIARY_WEIGHT * sum(losses[1:], torch.zeros_like(losses[0])), heads[0]
