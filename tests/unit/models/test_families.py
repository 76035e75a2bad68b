"""Every family of networks: it is built, learns, and comes back the same from a checkpoint and from a package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagleray.artifacts.checkpoint import load_state, save_state
from eagleray.artifacts.package import ModelCard, load_package, save_package
from eagleray.config.schema import ModelConfig, TrainingConfig
from eagleray.data.transforms import Preprocessing
from eagleray.errors import ConfigError
from eagleray.models.layers import head_names, layer_depths
from eagleray.models.weights import restore_weights
from eagleray.models.zoo import build_model, check_input
from eagleray.training.recipe import build_optimizer, sample_losses

CLASSES = ["ant", "bee", "cat", "dog", "eel"]
SLOW = pytest.mark.slow

FAMILIES = [
    ("cnn", 8, {}),
    ("resnet_cifar", 8, {"params": {"depth": 8}}),
    ("vgg_cifar", 8, {}),
    ("resnet18", 16, {}),
    ("resnet18", 64, {"stem": "standard", "blur_pool": True}),
    pytest.param("resnet50", 16, {"blur_pool": True}, marks=SLOW),
    pytest.param("resnext50_32x4d", 16, {}, marks=SLOW),
    pytest.param("wide_resnet50_2", 16, {}, marks=SLOW),
    ("googlenet", 32, {}),
    pytest.param("inception_v3", 299, {}, marks=SLOW),
    pytest.param("vgg11_bn", 32, {}, marks=SLOW),
    pytest.param("alexnet", 64, {}, marks=SLOW),
    ("squeezenet1_1", 32, {}),
    ("densenet121", 16, {}),
    ("mobilenet_v2", 16, {}),
    ("mobilenet_v3_small", 16, {}),
    ("shufflenet_v2_x0_5", 16, {}),
    ("mnasnet0_5", 32, {}),
    ("regnet_y_400mf", 16, {}),
    ("efficientnet_b0", 32, {}),
    pytest.param("efficientnet_v2_s", 32, {}, marks=SLOW),
    pytest.param("convnext_tiny", 16, {}, marks=SLOW),
    pytest.param("vit_b_16", 16, {}, marks=SLOW),
    pytest.param("swin_t", 16, {}, marks=SLOW),
    pytest.param("maxvit_t", 224, {}, marks=SLOW),
]
"""Architecture, side of small pictures, further options; a norm over less than 2×2 of two pictures can explode."""


@pytest.mark.parametrize(("name", "image_size", "options"), FAMILIES)
def test_a_network_learns_and_comes_back_as_it_was(name: str, image_size: int, options: dict[str, object], tmp_path: Path) -> None:
    config = ModelConfig.model_validate({"name": name, **options})
    check_input(config, len(CLASSES), image_size)
    torch.manual_seed(0)
    model = build_model(config, len(CLASSES), image_size)
    images, targets = torch.randn(2, 3, image_size, image_size), torch.tensor([1, 4])
    before = [parameter.detach().clone() for parameter in model.parameters()]

    head = head_names(config, len(CLASSES), image_size)
    optimizer = build_optimizer(model, TrainingConfig.model_validate({"optimizer": {"lr": 1e-3}}), head)
    for _ in range(2):
        losses, logits = sample_losses(model.train()(images), targets, label_smoothing=0.1)
        assert logits.shape == (2, 5) and losses.isfinite().all()
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()
    unchanged = [key for (key, after), old in zip(model.named_parameters(), before, strict=True) if torch.equal(after, old)]
    assert len(unchanged) < len(before) / 2, f"{len(unchanged)} of {len(before)} parameters have not changed: {unchanged[:5]}"

    with torch.inference_mode():
        expected = model.eval()(images)
    assert expected.isfinite().all()
    save_state(tmp_path, {"weights": model.state_dict()})
    restored = build_model(config, len(CLASSES), image_size)
    restore_weights(restored, load_state(tmp_path)["weights"])
    card = ModelCard(
        name="pets",
        model=config,
        classes=CLASSES,
        preprocessing=Preprocessing(image_size=image_size, eval_resize=image_size),
        metrics={},
        run_name="run",
        data_digest="0" * 64,
        job={},
        code_version="0",
    )
    save_package(str(tmp_path / "package"), model.state_dict(), card)
    for again in (restored, load_package(str(tmp_path / "package"))[1]):
        with torch.inference_mode():
            torch.testing.assert_close(again.eval()(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")])
def test_a_vgg_takes_small_pictures(name: str) -> None:
    check_input(ModelConfig(name=name), 5, 32)


@pytest.mark.parametrize(
    ("name", "image_size", "reason"), [("alexnet", 32, "too small"), ("inception_v3", 96, "too small"), ("maxvit_t", 64, "partition")]
)
def test_pictures_that_are_too_small_for_a_network_are_refused(name: str, image_size: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.* data.image_size {image_size} px.*{reason}"):
        check_input(ModelConfig(name=name), 5, image_size)


@pytest.mark.parametrize(
    ("name", "options"), [("cnn", {}), ("resnet_cifar", {"params": {"depth": 8}}), ("vgg_cifar", {}), ("resnet18", {"blur_pool": True})]
)
def test_a_network_can_be_exported(name: str, options: dict[str, object]) -> None:
    model = build_model(ModelConfig.model_validate({"name": name, **options}), 5, 16).eval()
    images = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize(
    ("name", "num_layers"), [("resnet50", 17), ("vit_b_16", 13), ("convnext_tiny", 22), ("efficientnet_b0", 18), ("cnn", 3)]
)
def test_layers_are_counted_in_blocks_from_the_head_down(name: str, num_layers: int) -> None:
    """ResNet-50: a stem and 16 blocks; ViT-B: patches and 12 blocks, as in BEiT."""
    config = ModelConfig(name=name)
    model, head = build_model(config, 5, 32), head_names(config, 5, 32)
    depths = layer_depths(model, head)
    names = [key for key, _ in model.named_parameters()]
    assert list(depths) == names
    assert depths[names[0]] == num_layers and set(depths.values()) == set(range(num_layers + 1))
    assert {key for key, depth in depths.items() if depth == 0} == head and len(head) == 2
