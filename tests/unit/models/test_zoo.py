"""Every family builds, takes a training step and refuses what it does not have."""

from __future__ import annotations

import pytest
import torch

from eagleray.config.schema import ModelConfig
from eagleray.errors import ConfigError
from eagleray.models.zoo import build_model, check_model, model_names
from eagleray.training.recipe import sample_losses


@pytest.mark.parametrize(
    ("name", "params", "image_size"),
    [
        ("cnn", {"width": 8, "dropout": 0.1}, 8),
        ("cnn", {}, 33),
        ("resnet_cifar", {"depth": 8}, 16),
        ("vgg_cifar", {"width": 8}, 16),
        ("resnet18", {}, 32),
        ("mobilenet_v3_small", {}, 64),
        ("googlenet", {}, 96),
        ("vit_b_16", {}, 32),
    ],
)
def test_a_model_learns_from_one_step(name: str, params: dict[str, object], image_size: int) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, params=params), num_classes=7, image_size=image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses, logits = sample_losses(
        model.train()(torch.randn(4, 3, image_size, image_size)), torch.tensor([0, 1, 2, 6]), label_smoothing=0.1
    )
    assert logits.shape == (4, 7)
    losses.mean().backward()
    optimizer.step()
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


def test_small_pictures_keep_their_resolution_in_a_resnets_stem() -> None:
    small, large = (build_model(ModelConfig(name="resnet18"), 10, size) for size in (32, 224))
    assert small.conv1.stride == (1, 1)
    assert large.conv1.stride == (2, 2)


def test_a_users_own_function_is_a_model(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    Path(str(tmp_path), "my_models.py").write_text(
        "from torch import nn\ndef linear(num_classes, image_size, bias=True):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes, bias))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build_model(ModelConfig(name="my_models:linear", params={"bias": False}), 5, 8)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("resnet51", {}, r"not in the zoo \(did you mean 'resnet50'\?\)"),
        ("cnn", {"widht": 3}, r"no such parameter \(did you mean 'width'\?\)"),
        ("resnet_cifar", {"depth": 9}, "6n \\+ 2 layers"),
        ("nowhere:model", {}, "No module named 'nowhere'"),
    ],
)
def test_what_the_zoo_does_not_have_is_refused(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(name=name, params=params), 10, 32)


def test_check_model_builds_nothing() -> None:
    check_model(ModelConfig(name="vgg16", params={"dropout": 0.2}))
    assert "vgg16" in model_names()
