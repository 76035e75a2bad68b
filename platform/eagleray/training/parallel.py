"""How a network is spread over the workers of a run: copied to each of them (DDP), or cut up among them (FSDP2).

What only FSDP needs takes seconds to load, and is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from eagleray.artifacts.checkpoint import dump_shards, load_shards
from eagleray.config.schema import TrainingConfig
from eagleray.errors import ConfigError


def place(model: nn.Module, ema: AveragedModel | None, config: TrainingConfig, device: torch.device) -> None:
    """Bring a network and its moving average to the device; with FSDP, each rank keeps its part of both.

    Parameters change with it: the optimizer is to be built afterwards.
    """
    networks = [model] if ema is None else [model, ema.module]
    for network in networks:
        network.to(device)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    for network in networks:
        if is_sharded(config):
            from torch.distributed.fsdp import fully_shard

            for block in _blocks(network):
                fully_shard(block)
            fully_shard(network)
        else:  # FSDP2 takes parameters of the usual memory format only
            network.to(memory_format=torch.channels_last)
            if device.type == "cpu":
                _spare_narrow_projections(network)


def _spare_narrow_projections(network: nn.Module) -> None:
    """Let strided 1×1 convolutions of fewer than 8 channels work in the usual memory format.

    In channels-last, the backward pass of torch 2.15 on CPUs (oneDNN) writes past its memory there, and the process dies.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels < 8:
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def is_sharded(config: TrainingConfig) -> bool:
    return config.parallelism == "fsdp" and dist.is_initialized()


def _is_cut_up(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it is loaded where a network was cut up
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def with_sync_batch_norm(model: nn.Module, config: TrainingConfig, device: torch.device) -> nn.Module:
    """Let batch norms see the pictures of all ranks, where the job asks for it."""
    if not config.sync_batch_norm:
        return model
    if device.type != "cuda":
        raise ConfigError("train.sync_batch_norm: true works on GPUs only; set it to false, or train.use_gpu: true")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def replicate(model: nn.Module, config: TrainingConfig, device: torch.device) -> nn.Module:
    """Return the network as it is called in training, so that its gradients are averaged over all ranks."""
    if config.compile:
        model = cast(nn.Module, torch.compile(model))
    if _is_cut_up(model) or not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def gradient_sync(replica: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Return a context for a part of a step; gradients are averaged over ranks in the last one."""
    if _is_cut_up(replica):
        cast(Any, replica).set_requires_gradient_sync(is_last)
    if isinstance(replica, DistributedDataParallel) and not is_last:
        return replica.no_sync()
    return nullcontext()


def clip_gradients(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Bring the norm of all gradients down to `max_norm` if it is above; return what it was, a scalar on the device."""
    if max_norm is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    else:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return cast(Any, norm).full_tensor() if _is_cut_up(model) else norm


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, which are those that are saved: each has seen other pictures."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def model_state(model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return network, average and optimizer as they are saved, and the `weights` that are evaluated.

    Of a sharded network every rank has to call it: `shards` are the files of its own part, and rank 0 alone gets the weights.
    """
    evaluated = model if ema is None else ema.module
    if _is_cut_up(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        for network in (model, evaluated):  # of what all ranks have, any one may be saved
            share_buffers(network)
        weights = get_model_state_dict(evaluated, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {"weights": weights, "shards": dump_shards(_sharded_state(model, ema, optimizer), dist.get_rank())}
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
        "optimizer": optimizer.state_dict(),
        "weights": evaluated.state_dict(),
    }


def restore_model(state: dict[str, Any], model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer) -> None:
    """Bring network, average and optimizer to a state of `model_state`, saved by any number of ranks.

    Raises:
        TrainingError: the shards are missing or damaged.
    """
    if _is_cut_up(model):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_state_dict

        sharded = _sharded_state(model, ema, optimizer)
        load_shards(state["uri"], sharded)
        set_state_dict(model, optimizer, model_state_dict=sharded["model"], optim_state_dict=sharded["optimizer"])
        if ema is not None:
            set_model_state_dict(ema.module, sharded["ema"])
            ema.n_averaged.copy_(sharded["n_averaged"])
        return
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])


def _sharded_state(model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if ema is not None:
        state |= {"ema": get_model_state_dict(ema.module), "n_averaged": ema.n_averaged}
    return state


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what a network repeats, such as residual and transformer blocks: the members of its sequences."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(child, nn.Sequential | nn.ModuleList):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from _blocks(child)


def _checkpoint_activations(model: nn.Module) -> None:
    """Let each block keep its input alone for the backward pass, and compute the rest again."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper

    blocks = set(_blocks(model))

    def wrap(block: nn.Module) -> nn.Module:
        wrapped: nn.Module = checkpoint_wrapper(block, context_fn=lambda: (nullcontext(), _without_statistics(block)))
        return wrapped

    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch twice."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked, deepcopy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count, seen in before:
            norm.momentum = momentum
            if count is not None and seen is not None:
                count.copy_(seen)
