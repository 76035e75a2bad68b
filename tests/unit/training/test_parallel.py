"""A network that is cut up among workers trains like a copied one, and each worker keeps its part of it only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eagleray.artifacts.checkpoint import SHARDS_NAME
from eagleray.config.schema import ModelConfig, TrainingConfig
from eagleray.errors import TrainingError
from eagleray.models.zoo import build_model
from eagleray.training.parallel import clip_gradients, gradient_sync, model_state, place, replicate, restore_model, with_sync_batch_norm
from eagleray.training.recipe import build_ema, build_optimizer

DEVICE = torch.device("cpu")


def build(name: str = "vgg_cifar", **params: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, params=params), 5, 16)


def config_of(**settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"optimizer": {"lr": 0.05}, "ema_decay": 0.9, **settings})


def batch_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)


def test_activations_that_are_computed_again_change_nothing() -> None:
    """Neither the gradients nor batch norm's statistics, which see each batch once."""
    kept, dropped = build(), build()
    place(kept, None, config_of(), DEVICE)
    place(dropped, None, config_of(activation_checkpointing=True), DEVICE)
    images, targets = batch_of(0, 0)
    for model in (kept, dropped):
        nn.functional.cross_entropy(model.train()(images), targets).backward()
    assert list(kept.state_dict()) == list(dropped.state_dict())
    assert all(torch.equal(kept.state_dict()[name], value) for name, value in dropped.state_dict().items())
    for one, other in zip(kept.parameters(), dropped.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_batch_norm_over_all_workers_is_of_every_layer() -> None:
    """On a GPU every batch norm is exchanged, and keeps its name and weights."""
    asked = config_of(sync_batch_norm=True)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in with_sync_batch_norm(build(), config_of(), DEVICE).modules())
    changed = with_sync_batch_norm(build(), asked, torch.device("cuda"))
    norms = [module for module in changed.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert list(changed.state_dict()) == list(build().state_dict())


DEBUG_MALLOC = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


@pytest.mark.skipif(not DEBUG_MALLOC.exists(), reason="glibc's checks of the heap are not here: sudo apt-get install libc6")
def test_narrow_networks_leave_the_heap_alone() -> None:
    """A ResNet of few channels, on pictures as they are fed, with glibc looking after each piece of memory."""
    code = """
import torch
from eagleray.config.schema import ModelConfig, TrainingConfig
from eagleray.models.zoo import build_model
from eagleray.training.parallel import place

torch.set_num_threads(1)
for width in (4, 6, 7):
    model = build_model(ModelConfig(name="resnet_cifar", params={"depth": 8, "width": width}), 10, 8)
    place(model, None, TrainingConfig(optimizer={"lr": 0.1}), torch.device("cpu"))
    for _ in range(10):
        model(torch.randn(32, 8, 8, 3).permute(0, 3, 1, 2)).sum().backward()
"""
    environment = os.environ | {"LD_PRELOAD": str(DEBUG_MALLOC), "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def _start(rank: int, world_size: int, directory: str, name: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/{name}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)


def _set_up(config: TrainingConfig) -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer, nn.Module]:
    model = build()
    ema = build_ema(model, config)
    assert ema is not None
    place(model, ema, config, DEVICE)
    return model, ema, build_optimizer(model, config), replicate(model, config, DEVICE)


def _train(rank: int, directory: str, parallelism: str) -> None:
    """Train three steps on two ranks, in two parts each, and save what came out; with FSDP also through a checkpoint."""
    _start(rank, 2, directory, parallelism)
    config = config_of(parallelism=parallelism, activation_checkpointing=parallelism == "fsdp", grad_clip_norm=1.0, accumulate=2)
    model, ema, optimizer, replica = _set_up(config)
    middle = None
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        for part in range(2):
            images, targets = batch_of(rank, 2 * step + part)
            with gradient_sync(replica, is_last=part == 1):
                (nn.functional.cross_entropy(replica.train()(images), targets) / 2).backward()
        norm = clip_gradients(model, config.grad_clip_norm)
        optimizer.step()
        ema.update_parameters(model)
        if step == 1 and parallelism == "fsdp":  # go on from a checkpoint, with a fresh network
            state = model_state(model, ema, optimizer)
            middle = state["weights"]
            for name, data in state["shards"].items():
                Path(directory, "checkpoint", SHARDS_NAME).mkdir(parents=True, exist_ok=True)
                Path(directory, "checkpoint", SHARDS_NAME, name).write_bytes(data)
            dist.barrier()
            model, ema, optimizer, replica = _set_up(config)
            restore_model({"uri": f"{directory}/checkpoint"}, model, ema, optimizer)
    held = sum(_bytes(p) + _bytes(optimizer.state[p]["momentum_buffer"]) for p in model.parameters())
    weights = model_state(model, ema, optimizer)["weights"]
    if rank == 0:
        torch.save({"weights": weights, "middle": middle, "norm": norm, "held": held}, Path(directory, f"{parallelism}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _train_both_ways(rank: int, directory: str) -> None:
    for parallelism in ("ddp", "fsdp"):
        _train(rank, directory, parallelism)
    if rank == 0:
        _restore_alone(directory)


def _restore_alone(directory: str) -> None:
    """Bring a single rank to the checkpoint of the two, and find it out where a shard of it is damaged or missing."""
    _start(0, 1, directory, "alone")
    model, ema, optimizer, _ = _set_up(config_of(parallelism="fsdp"))
    restore_model({"uri": f"{directory}/checkpoint"}, model, ema, optimizer)
    torch.save(model_state(model, ema, optimizer)["weights"], Path(directory, "alone.pt"))
    shard = max(Path(directory, "checkpoint", SHARDS_NAME).iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TrainingError, match=r"rank-00001.zip' is damaged .*delete the folder '.*checkpoint' and resume"):
        restore_model({"uri": f"{directory}/checkpoint"}, model, ema, optimizer)
    shard.unlink()
    with pytest.raises(TrainingError, match=r"checkpoint' lacks a shard"):
        restore_model({"uri": f"{directory}/checkpoint"}, model, ema, optimizer)
    dist.destroy_process_group()


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _assert_close(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_workers_with_a_part_each_come_to_the_weights_of_two_copies(tmp_path: Path) -> None:
    """With accumulation, clipping and a moving average, and across a checkpoint, also onto one worker; each holds about half."""
    torch.multiprocessing.spawn(_train_both_ways, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    copied, sharded = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ddp", "fsdp"))
    _assert_close(sharded["weights"], copied["weights"])
    torch.testing.assert_close(sharded["norm"], copied["norm"], rtol=1e-4, atol=1e-5)
    assert sharded["held"] < 0.6 * copied["held"]
    _assert_close(torch.load(tmp_path / "alone.pt", weights_only=True), sharded["middle"])
