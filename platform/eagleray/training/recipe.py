"""Optimizer, schedule, loss and weight averaging, from the job file."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from eagleray.config.schema import ScheduleConfig, TrainingConfig
from eagleray.models.layers import layer_depths
from eagleray.training.parallel import is_sharded

AUXILIARY_WEIGHT = 0.3
"""Share of each auxiliary head's loss (Szegedy et al. 2014, arXiv:1409.4842, section 5)."""


def build_optimizer(model: nn.Module, config: TrainingConfig, head: Collection[str] = ()) -> torch.optim.Optimizer:
    """Build the optimizer at its peak learning rate; see `parameter_groups`."""
    optimizer, groups, lr = config.optimizer, parameter_groups(model, config, head), peak_learning_rate(config)
    betas = (optimizer.momentum, 0.99 if optimizer.name == "lion" else 0.999)
    eps = optimizer.eps
    match optimizer.name:
        case "sgd":
            nesterov = optimizer.nesterov and optimizer.momentum > 0
            fused = not is_sharded(config)  # torch 2.15 has no fused SGD for a network that is cut up
            return torch.optim.SGD(groups, lr=lr, momentum=optimizer.momentum, nesterov=nesterov, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps or 1e-8, fused=True)
        case "rmsprop":  # with the constants of torchvision's reference recipes
            return torch.optim.RMSprop(groups, lr=lr, momentum=optimizer.momentum, alpha=0.9, eps=eps or 0.0316)
    import timm.optim  # takes seconds, as timm imports all its networks

    built: torch.optim.Optimizer
    if optimizer.name == "lamb":
        built = timm.optim.Lamb(groups, lr=lr, betas=betas, eps=eps or 1e-6, max_grad_norm=None)  # `train.grad_clip_norm` clips
    else:
        built = timm.optim.Lion(groups, lr=lr, betas=betas)
    return built


def parameter_groups(model: nn.Module, config: TrainingConfig, head: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the optimizer's groups: by learning rate, and whether they are decayed; biases and norms are not.

    Parameters that are frozen for some epochs only are in them too, so that the groups stay the same.

    Args:
        head: names of the head's parameters.
    """
    finetune, peak = config.finetune, peak_learning_rate(config)
    depths = layer_depths(model, head)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = finetune.head_lr_factor if name in head else finetune.layer_decay ** depths[name]
            is_decayed = parameter.ndim > 1
            group = {"params": [], "lr": peak * factor, "weight_decay": config.optimizer.weight_decay if is_decayed else 0.0}
            groups.setdefault((factor, is_decayed), group)["params"].append(parameter)
    return list(groups.values())


def peak_learning_rate(config: TrainingConfig) -> float:
    """Return the peak learning rate, scaled with the global batch where the job says which one `lr` is meant for."""
    optimizer = config.optimizer
    if optimizer.lr_batch_size is None:
        return optimizer.lr
    return optimizer.lr * config.global_batch_size / optimizer.lr_batch_size


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int, steps_per_epoch: int) -> LambdaLR:
    """Build the learning-rate schedule, to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, epochs, steps_per_epoch, config))


def with_hyperparameters(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of a run, as the training loop saves it, for a run with other hyperparameters.

    Args:
        optimizer: of the same network with those hyperparameters, at its peak learning rate.
    """
    groups = []
    for group, own, base in zip(state["optimizer"]["param_groups"], optimizer.param_groups, state["schedule"]["base_lrs"], strict=True):
        settings = {key: value for key, value in own.items() if key != "params"}
        groups.append({**group, **settings, "lr": own["lr"] * group["lr"] / base, "initial_lr": own["lr"]})
    rates = {"base_lrs": [group["initial_lr"] for group in groups], "_last_lr": [group["lr"] for group in groups]}
    return {
        **state,
        "optimizer": {**state["optimizer"], "param_groups": groups},
        "schedule": {**state["schedule"], **rates},
    }


def learning_rate(schedule: LambdaLR, step: int) -> float:
    """Return the learning rate of a step of the run, the highest of the parameter groups."""
    return float(max(schedule.base_lrs) * schedule.lr_lambdas[0](step))


def learning_rate_factor(step: int, epochs: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """Return the share of the peak learning rate at a step of the run.

    Linear warm-up (Goyal et al. 2017, arXiv:1706.02677), then cosine (Loshchilov & Hutter 2016,
    arXiv:1608.03983), linear, `step_decay` every `step_epochs`, or constant; or one cycle.
    """
    if config.name == "one_cycle":
        return _one_cycle_factor(step, epochs * steps_per_epoch, config)
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.warmup_start + (1 - config.warmup_start) * epoch / config.warmup_epochs
    progress = min(1.0, (epoch - config.warmup_epochs) / (epochs - config.warmup_epochs))
    match config.name:
        case "cosine":
            return _cosine(1.0, 0.0, progress)
        case "linear":
            return 1 - progress
        case "step":
            return float(config.step_decay ** (step // steps_per_epoch // config.step_epochs))
    return 1.0


def _one_cycle_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Return the share of the peak in the cycle of Smith & Topin 2018 (arXiv:1708.07120), as torch's `OneCycleLR` has it."""
    first, peak_step = 1 / config.div_factor, config.rise * num_steps - 1
    anneal = _cosine if config.anneal == "cosine" else _line
    if step < peak_step:
        return anneal(first, 1.0, step / peak_step)
    return anneal(1.0, first / config.final_div_factor, min(1.0, (step - peak_step) / (num_steps - 1 - peak_step)))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _line(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def build_ema(model: nn.Module, config: TrainingConfig) -> AveragedModel | None:
    """Build the moving average of weights and buffers, if the job asks for one."""
    if config.ema_decay is None:
        return None
    if config.parallelism == "fsdp":  # torch averages no mixture of sharded parameters and whole buffers at once
        return AveragedModel(model, avg_fn=get_ema_avg_fn(config.ema_decay), use_buffers=True)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)


def sample_losses(outputs: Any, targets: torch.Tensor, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross-entropy of each sample float [B], main logits [B, C]); auxiliary heads count if there are any.

    Args:
        outputs: logits, or a tuple of them: the main head's and auxiliary ones' or None.
        targets: labels int64 [B], or probabilities float [B, C].
    """
    heads = [head for head in outputs if head is not None] if isinstance(outputs, tuple) else [outputs]
    losses = [nn.functional.cross_entropy(head, targets, reduction="none", label_smoothing=label_smoothing) for head in heads]
    return losses[0] + AUXILIARY_WEIGHT * sum(losses[1:], torch.zeros_like(losses[0])), heads[0]
