"""Blur pooling: where it is put, that it blurs, and that trained weights of the plain network fit."""

from __future__ import annotations

import pytest
import torch

from eagleray.config.schema import ModelConfig
from eagleray.errors import ConfigError
from eagleray.models.zoo import build_model, check_model


def test_a_blurred_resnet_has_the_parameters_and_shapes_of_the_plain_one() -> None:
    plain, blurred = (build_model(ModelConfig(name="resnet18", stem="standard", blur_pool=blur), 5, 64).eval() for blur in (False, True))
    blurred.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert not torch.allclose(plain(images), blurred(images))
    shapes: dict[bool, list[torch.Size]] = {False: [], True: []}
    for is_blurred, model in ((False, plain), (True, blurred)):
        for stage in (model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(lambda module, inputs, output, key=is_blurred: shapes[key].append(output.shape))
        model(images)
    assert shapes[True] == shapes[False] and shapes[True][0] == (2, 64, 16, 16)
    # Three stages begin with a strided 3×3 and a strided 1×1 convolution each; the first layer and the max-pool come before.
    kinds = [type(module).__name__ for module in blurred.modules()]
    assert kinds.count("_BlurConv2d") == 6 and kinds.count("_Blur") == 7


def test_max_pooling_hardly_changes_when_the_picture_moves_by_a_pixel() -> None:
    """What blurring is for (Zhang 2019, figure 2); a pulse every four pixels, the edges left out."""
    plain, blurred = (build_model(ModelConfig(name="resnet18", stem="standard", blur_pool=blur), 5, 224).maxpool for blur in (False, True))
    pulses = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(8).expand(1, 1, 32, 32)
    changes = [(pool(pulses) - pool(pulses.roll(1, dims=3)))[0, 0, 2:-2, 2:-2].abs().max().item() for pool in (plain, blurred)]
    assert changes == [1.0, 0.25]


@pytest.mark.parametrize("name", ["vgg11_bn", "cnn", "mobilenet_v2", "densenet121"])
def test_blur_pool_is_refused_where_it_does_not_apply(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.blur_pool: '{name}' is no ResNet"):
        check_model(ModelConfig(name=name, blur_pool=True))


def test_a_stem_is_chosen_or_refused() -> None:
    for size, stem, stride in ((64, "auto", 1), (65, "auto", 2), (64, "standard", 2), (224, "small", 1)):
        assert build_model(ModelConfig(name="efficientnet_b0", stem=stem), 5, size).features[0][0].stride == (stride, stride)
    with pytest.raises(ConfigError, match="no small stem for 'vgg11'"):
        check_model(ModelConfig(name="vgg11", stem="small"))
