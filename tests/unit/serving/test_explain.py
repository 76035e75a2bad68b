"""Heat maps: they are where the picture decides, for the class asked for, whatever the network is made of."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from eagleray.config.schema import ModelConfig
from eagleray.data.decode import encode_png
from eagleray.data.transforms import Preprocessing, eval_image, normalize
from eagleray.errors import ServingError
from eagleray.models.zoo import build_model
from eagleray.serving import explain

SIZE = 32
CROPPED = Preprocessing(image_size=SIZE, eval_resize=40)


# --- Every network ----------------------------------------------------------------------------------------------

FAMILIES = [
    ("cnn", 16, {}, 8),
    ("resnet_cifar", 16, {"params": {"depth": 8}}, 4),
    ("vgg_cifar", 16, {}, 8),
    ("resnet18", 32, {}, 4),
    ("resnet50", 64, {"stem": "standard", "blur_pool": True}, 4),
    ("googlenet", 64, {}, 4),
    pytest.param("inception_v3", 299, {}, 8, marks=pytest.mark.slow),
    ("vgg11_bn", 64, {}, 4),
    ("alexnet", 96, {}, 5),
    ("squeezenet1_1", 64, {}, 4),
    ("densenet121", 32, {}, 4),
    ("mobilenet_v2", 32, {}, 4),
    ("mobilenet_v3_small", 64, {}, 4),
    ("shufflenet_v2_x0_5", 32, {}, 4),
    ("mnasnet0_5", 64, {}, 4),
    ("regnet_y_400mf", 32, {}, 4),
    ("efficientnet_b0", 64, {}, 4),
    ("efficientnet_v2_s", 32, {}, 4),
    ("convnext_tiny", 32, {}, 4),
    ("vit_b_16", 64, {}, 4),
    ("swin_t", 64, {}, 4),
    ("swin_v2_t", 64, {}, 4),
    pytest.param("maxvit_t", 224, {}, 7, marks=pytest.mark.slow),
]
"""Architecture, side of its pictures, further options, least side of the map."""


@pytest.mark.parametrize(("name", "image_size", "options", "side"), FAMILIES)
def test_every_family_yields_a_map_with_places(name: str, image_size: int, options: dict[str, object], side: int) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({"name": name, **options}), 5, image_size).eval()
    for parameter in model.parameters():  # ViT's head starts as zeros, and then nothing speaks for anything
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    image = torch.randn(1, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    before = model(image)
    maps = [explain.heat_map(model, image, index) for index in range(5)]
    assert {heat.shape for heat in maps} == {(maps[0].shape[0],) * 2} and maps[0].shape[0] >= side
    assert all(np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1 and heat.dtype == np.float32 for heat in maps)
    hottest = [heat for heat in maps if heat.max() > 0]
    assert hottest and all(heat.max() == pytest.approx(1) and heat.min() < 1 for heat in hottest)
    torch.testing.assert_close(model(image), before, rtol=0, atol=0)  # it was only looked at


def test_a_network_without_places_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    with pytest.raises(ServingError, match="no layer of this network has places"):
        explain.heat_map(model.eval(), torch.randn(1, 3, 8, 8), 2)


# --- Where the picture decides ----------------------------------------------------------------------------------


def planted(rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Noise with an 8×8 patch on a grid, red (class 0) or blue (1) or none (2): uint8 [N, S, S, 3], classes, corners [N, 2]."""
    images = rng.integers(60, 190, (count, SIZE, SIZE, 3)).astype(np.uint8)
    targets, corners = rng.integers(0, 3, count), rng.integers(0, 4, (count, 2)) * 8
    for image, target, (top, left) in zip(images, targets, corners, strict=True):
        if target < 2:
            image[top : top + 8, left : left + 8] = ((250, 10, 10), (10, 10, 250))[target]
    return images, targets, corners


def small_vit() -> nn.Module:
    norm = partial(nn.LayerNorm, eps=1e-6)
    return VisionTransformer(
        image_size=SIZE, patch_size=4, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=3, norm_layer=norm
    )


def small_swin() -> nn.Module:
    return SwinTransformer(patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=3)


NETWORKS = {
    "average and linear": (lambda: build_model(ModelConfig(name="vgg_cifar", params={"width": 8}), 3, SIZE), 5.0),
    "flattened": (lambda: build_model(ModelConfig(name="cnn", params={"width": 8, "hidden": 32}), 3, SIZE), 5.0),
    "global attention": (small_vit, 2.0),
    # What lies in one window is mixed, and the windows are half as wide as these pictures.
    "attention in windows": (small_swin, 1.2),
}
"""Network, and by how much its maps must at least be hotter on the patch than elsewhere; 1 is chance."""


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_map_is_where_the_planted_patch_is(kind: str) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    (build, least_contrast), preprocessing = NETWORKS[kind], Preprocessing(image_size=SIZE, eval_resize=SIZE)
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        images, targets, _ = planted(rng, 64)
        loss = nn.functional.cross_entropy(model(normalize(torch.from_numpy(images), preprocessing)), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    images, targets, corners = planted(rng, 60)
    pixels = normalize(torch.from_numpy(images), preprocessing)
    assert (model(pixels).argmax(1).numpy() == targets).mean() > 0.9
    hot, cold = [], []
    for image, target, (top, left) in zip(pixels, targets, corners, strict=True):
        if target < 2:
            heat, _ = explain.spread(explain.heat_map(model, image[None], int(target)), SIZE, SIZE, preprocessing)
            patch = np.zeros((SIZE, SIZE), bool)
            patch[top : top + 8, left : left + 8] = True
            hot.append(heat[patch].mean())
            cold.append(heat[~patch].mean())
    assert np.mean(hot) > least_contrast * np.mean(cold)


def test_the_map_is_of_the_class_asked_for() -> None:
    """A network made by hand: one channel sees red, one blue, and the class is which there is more of."""
    conv = nn.Conv2d(3, 2, 4, stride=4, bias=False)
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()[(0, 1), (0, 2)] = 1.0
        head.weight.copy_(torch.eye(2))
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    image = torch.zeros(1, 3, SIZE, SIZE)
    image[0, 0, :8, :8] = 1.0  # red, top left
    image[0, 2, -8:, -8:] = 0.5  # blue, bottom right
    red, blue = (explain.heat_map(model, image, index) for index in (0, 1))
    expected = np.zeros((8, 8), np.float32)
    expected[:2, :2] = 1
    np.testing.assert_allclose(red, expected)
    np.testing.assert_allclose(blue, expected[::-1, ::-1])


# --- Over the picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (64, 64), (700, 17), (1, 1)])
def test_the_map_lies_where_the_network_saw_the_picture(height: int, width: int) -> None:
    """A mark at a place of the cropped picture and a map that is hot there have the same centre in the whole picture."""
    heat = np.zeros((8, 8), np.float32)
    heat[2, 5] = 1
    values, is_seen = explain.spread(heat, height, width, CROPPED)
    assert values.shape == is_seen.shape == (height, width) and values.min() >= 0 and not values[~is_seen].any()
    if min(height, width) < 60:
        return
    rows, columns = np.mgrid[:height, :width]
    centre = [round(float((values * axis).sum() / values.sum())) for axis in (rows, columns)]
    marked = np.zeros((height, width, 3), np.uint8)
    marked[centre[0] - 2 : centre[0] + 3, centre[1] - 2 : centre[1] + 3] = 255
    seen = eval_image(marked, CROPPED)[..., 0].astype(float)
    found = [float((seen * axis).sum() / seen.sum()) for axis in np.mgrid[:SIZE, :SIZE]]
    assert found == pytest.approx([2.5 * 4 - 0.5, 5.5 * 4 - 0.5], abs=0.8)


def test_the_overlay_colours_what_speaks_for_the_class_and_darkens_what_was_not_seen() -> None:
    rgb = np.full((60, 100, 3), 200, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[1, 1] = 1
    drawn = explain.overlay(rgb, heat, CROPPED)
    left, top, side = explain.seen_square(60, 100, CROPPED)
    hot = (round(top + side * 3 / 8), round(left + side * 3 / 8))
    assert drawn.shape == rgb.shape and drawn.dtype == np.uint8
    assert np.ptp(drawn[hot].astype(int)) > 30  # a colour on grey
    assert (drawn[30, 1] < 100).all() and (drawn[round(top + side) - 2, round(left + side) - 2] == 200).all()
    assert explain.overlay(np.zeros((1000, 4000, 3), np.uint8), heat, CROPPED).shape == (256, explain.MAX_OVERLAY_SIDE, 3)
    assert encode_png(drawn).startswith(b"\x89PNG")
