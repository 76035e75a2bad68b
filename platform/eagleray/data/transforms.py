"""What happens to a picture between its bytes and the model: shared by training and serving.

Random training changes are a pure function of the generator they are given, so that a sample looks
the same whichever worker decodes it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from eagleray.config.schema import AugmentConfig, DataConfig, Section
from eagleray.data.augment import alter, erase
from eagleray.data.decode import check_size, crop_and_resize, decode_trusted, resize
from eagleray.data.jpeg import Encoded

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""Within 0.01 of zero once normalised."""


class Preprocessing(Section):
    """How a picture is brought to the model at evaluation and serving; travels with the weights."""

    image_size: int
    """Side of the square given to the model, in pixels."""

    eval_resize: int
    """Shorter side before the centre crop, in pixels."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Of RGB values in 0..1."""

    @classmethod
    def of(cls, data: DataConfig) -> Preprocessing:
        return cls(image_size=data.image_size, eval_resize=data.resolved_eval_resize)


def eval_image(rgb: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side and crop the centre.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        uint8 [S, S, 3] with S = `preprocessing.image_size`.
    """
    height, width = rgb.shape[:2]
    scale = preprocessing.eval_resize / min(height, width)
    size = preprocessing.image_size
    resized = resize(rgb, max(size, round(width * scale)), max(size, round(height * scale)))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def decode_eval(data: Encoded, size: tuple[int, int], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode a picture of a shard for evaluation.

    Args:
        size: (width, height) in pixels by the shard.

    Returns:
        uint8 [S, S, 3] with S = `preprocessing.image_size`.

    Raises:
        DataError: damaged, truncated, or of another size.
    """
    check_size(data, size)
    return eval_image(decode_trusted(data), preprocessing)


def decode_train(
    data: Encoded,
    size: tuple[int, int],
    augment: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode a picture of a shard and change it at random: crop, flips, policy, colour jitter, erasing.

    Args:
        data: encoded bytes.
        size: (width, height) in pixels.
        rng: the sample's own generator.
        out: uint8 [S, S, 3] to write the result to.

    Returns:
        uint8 [S, S, 3] with S = `image_size`.

    Raises:
        DataError: damaged or truncated.
    """
    box = (0, 0, *size) if augment.crop_scale is None else random_resized_crop(size, augment.crop_scale, augment.crop_ratio, rng)
    image = crop_and_resize(data, size, box, image_size, out)
    if rng.random() < augment.flip:
        cv2.flip(image, 1, dst=image)
    if rng.random() < augment.vertical_flip:
        cv2.flip(image, 0, dst=image)
    alter(image, augment, rng)
    if rng.random() < augment.erase:
        erase(image, _MEAN_COLOUR, rng)
    return image


def random_resized_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's `RandomResizedCrop.get_params` does (same distribution).

    Args:
        size: (width, height) of the picture in pixels.
        scale: range of the crop's share of the area.
        ratio: range of width / height.

    Returns:
        (left, top, width, height) in pixels.
    """
    width, height = size
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, *logs))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    # The picture is too long or too flat for the ratio: the largest centred crop that is allowed.
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw what `rng.uniform` would, in a third of its time."""
    return low + (high - low) * rng.random()


def normalize(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Turn pixels into the model's input, on the device where they are.

    Args:
        images: uint8 [N, S, S, 3], or float32 in the same range.

    Returns:
        float32 [N, 3, S, S] in channels-last memory, normalised by mean and standard deviation.
    """
    import torch

    # Not in place: exporters would see the constants as they are afterwards, and multiply once more.
    mean = torch.tensor(preprocessing.mean, device=images.device) * 255
    std = torch.tensor(preprocessing.std, device=images.device) * 255
    # NHWC in memory seen as NCHW is channels-last already; no copy is made.
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)
