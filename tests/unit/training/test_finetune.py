"""Groups of parameters, and what is frozen when."""

from __future__ import annotations

import pytest
import torch

from eagleray.config.schema import ModelConfig, TrainingConfig
from eagleray.errors import ConfigError
from eagleray.models.layers import head_names
from eagleray.models.zoo import build_model
from eagleray.training.finetune import freeze_parts, set_train_mode, train_parts
from eagleray.training.recipe import build_optimizer

RESNET = ModelConfig(name="resnet18")


def build(**finetune: object) -> tuple[torch.nn.Module, frozenset[str], torch.optim.Optimizer]:
    model, head = build_model(RESNET, 5, 32), head_names(RESNET, 5, 32)
    config = {"optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.2}, "finetune": finetune}
    freeze_parts(model, finetune.get("freeze", []))
    return model, head, build_optimizer(model, TrainingConfig.model_validate(config), head)


def settings(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (round(group["lr"], 9), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def test_without_fine_tuning_there_are_two_groups() -> None:
    model, _, optimizer = build()
    assert len(optimizer.param_groups) == 2
    rates = settings(model, optimizer)
    assert rates["conv1.weight"] == (0.1, 0.2) and rates["bn1.weight"] == rates["fc.bias"] == (0.1, 0.0)


def test_the_learning_rate_falls_by_layer_and_the_head_has_its_own() -> None:
    model, _, optimizer = build(layer_decay=0.5, head_lr_factor=4.0)
    rates = settings(model, optimizer)
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert rates["fc.weight"] == (0.4, 0.2) and rates["fc.bias"] == (0.4, 0.0)
    assert rates["layer4.1.conv2.weight"] == (0.05, 0.2) and rates["layer4.1.bn2.weight"] == (0.05, 0.0)
    assert rates["layer4.0.conv1.weight"] == (0.025, 0.2)
    assert rates["conv1.weight"] == (round(0.1 * 0.5**9, 9), 0.2) and rates["bn1.bias"] == (round(0.1 * 0.5**9, 9), 0.0)


def test_what_is_frozen_keeps_still_and_the_groups_stay_the_same() -> None:
    model, head, optimizer = build(freeze=["conv1", "bn1", "layer1.0"], freeze_epochs=1)
    shape = [len(group["params"]) for group in optimizer.param_groups]
    train_parts(model, optimizer, head, head_only=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"fc.weight", "fc.bias"} == head
    set_train_mode(model)
    assert model.fc.training and not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))

    train_parts(model, optimizer, head, head_only=False)
    set_train_mode(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("conv1.", "bn1.", "layer1.0."))}
    assert (model.bn1.training, model.layer1[0].bn1.training, model.layer1[1].bn1.training) == (False, False, True)
    assert [len(group["params"]) for group in optimizer.param_groups] == shape


@pytest.mark.parametrize(
    ("part", "hint"), [("layer5", r"\(did you mean 'layer[1-4]'\?\)"), ("layer", "did you mean"), ("xyz", "its parts: conv1, bn1, layer1")]
)
def test_a_part_that_is_not_there_cannot_be_frozen(part: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"train.finetune.freeze: the model has no part '{part}'.*{hint}"):
        build(freeze=[part])
