"""Random changes of a training picture's shape and colour, as torchvision makes them, without torch.

Given the same draw, the pixels are those of `torchvision.transforms.v2` on a Pillow picture, bit for
bit; the draws have its distribution. As there, what is turned or moved is interpolated to the nearest
pixel, and what comes into sight is black.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from eagleray.config.schema import AugmentConfig, ColorJitterConfig, PolicyConfig

Change = tuple[str, float]
"""Name of an operation and its signed magnitude."""

LEVELS = 31
"""Magnitudes between an operation's weakest and strongest."""

_ERASED_SHARE = (0.02, 0.33)
_ERASED_RATIO = (0.3, 3.3)


def alter(image: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> None:
    """Apply policy and colour jitter to `image`, uint8 [S, S, 3], in place."""
    changes = draw_policy(config.policy, image.shape[0], rng) if config.policy is not None else []
    if config.color_jitter is not None:
        changes += draw_jitter(config.color_jitter, rng)
    if changes:
        picture = Image.fromarray(image)
        for name, magnitude in changes:
            picture = OPERATIONS[name](picture, magnitude)
        image[:] = np.asarray(picture)


def draw_policy(policy: PolicyConfig, size: int, rng: np.random.Generator) -> list[Change]:
    """Draw what `policy` does to one picture of `size` x `size` pixels."""
    if policy.name == "trivialaugment":
        return [_draw_change(_TRIVIALAUGMENT, int(rng.integers(LEVELS)), rng)]
    return [_draw_change(_randaugment(size), policy.magnitude, rng) for _ in range(policy.num_ops)]


def draw_jitter(jitter: ColorJitterConfig, rng: np.random.Generator) -> list[Change]:
    """Draw changes of colour as `ColorJitter` does, in random order."""
    strengths = {"Brightness": jitter.brightness, "Contrast": jitter.contrast, "Color": jitter.saturation, "Hue": jitter.hue}
    changes = [(name, rng.uniform(-min(strength, 1.0), strength)) for name, strength in strengths.items() if strength]
    return [changes[place] for place in rng.permutation(len(changes))]


def erase(image: NDArray[np.uint8], colour: tuple[int, ...], rng: np.random.Generator) -> None:
    """Fill a random rectangle of `image`, uint8 [H, W, 3], in place."""
    box = draw_erased_box((image.shape[1], image.shape[0]), rng)
    if box is not None:
        left, top, width, height = box
        image[top : top + height, left : left + width] = colour


def draw_erased_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Draw a rectangle as torchvision's `RandomErasing` does (same distribution).

    Args:
        size: (width, height) of the picture in pixels.

    Returns:
        (left, top, width, height) in pixels, or None where ten draws did not fit into the picture.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*_ERASED_SHARE)
        ratio = math.exp(rng.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        w, h = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if w < width and h < height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    return None


def _draw_change(space: dict[str, tuple[float, float] | None], level: int, rng: np.random.Generator) -> Change:
    name = list(space)[rng.integers(len(space))]
    ends = space[name]
    if ends is None:
        return name, 0.0
    magnitude = _magnitude(*ends, level)
    return name, -magnitude if name in _SIGNED and rng.random() < 0.5 else magnitude


def _magnitude(first: float, last: float, level: int) -> float:
    """Return element `level` of `torch.linspace(first, last, LEVELS)`.

    With its rounding: float32, from the nearer end, multiplied and added in one. Where a magnitude becomes
    a whole number of pixels or levels, the last bit decides which.
    """
    first, last = float(np.float32(first)), float(np.float32(last))
    step = float(np.float32(np.float32(last - first) / (LEVELS - 1)))
    value = first + step * level if level < LEVELS // 2 else last - step * (LEVELS - 1 - level)
    return float(np.float32(value))


def _randaugment(size: int) -> dict[str, tuple[float, float] | None]:
    """Return the magnitudes of `RandAugment` at the lowest and the highest level; None: there is none."""
    return {
        "Identity": None,
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150 / 331 * size),
        "TranslateY": (0.0, 150 / 331 * size),
        "Rotate": (0.0, 30.0),
        "Brightness": (0.0, 0.9),
        "Color": (0.0, 0.9),
        "Contrast": (0.0, 0.9),
        "Sharpness": (0.0, 0.9),
        "Posterize": (8.0, 4.0),
        "Solarize": (1.0, 0.0),
        "AutoContrast": None,
        "Equalize": None,
    }


# As `TrivialAugmentWide`.
_TRIVIALAUGMENT: dict[str, tuple[float, float] | None] = {
    "Identity": None,
    "ShearX": (0.0, 0.99),
    "ShearY": (0.0, 0.99),
    "TranslateX": (0.0, 32.0),
    "TranslateY": (0.0, 32.0),
    "Rotate": (0.0, 135.0),
    "Brightness": (0.0, 0.99),
    "Color": (0.0, 0.99),
    "Contrast": (0.0, 0.99),
    "Sharpness": (0.0, 0.99),
    "Posterize": (8.0, 2.0),
    "Solarize": (1.0, 0.0),
    "AutoContrast": None,
    "Equalize": None,
}

_SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _shift_hue(image: Image.Image, share: float) -> Image.Image:
    shift = int(share * 255)
    turned = [(hue + shift) % 256 for hue in range(256)]
    return image.convert("HSV").point([*turned, *range(256), *range(256)]).convert("RGB")


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, slope: _affine(image, 1, slope, 0, 0, 1, 0),
    "ShearY": lambda image, slope: _affine(image, 1, 0, 0, slope, 1, 0),
    "TranslateX": lambda image, pixels: _affine(image, 1, 0, -int(pixels), 0, 1, 0),
    "TranslateY": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, -int(pixels)),
    "Rotate": lambda image, degrees: image.rotate(degrees),
    "Brightness": lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change),
    "Color": lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    "Contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    "Sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
    "Posterize": lambda image, bits: ImageOps.posterize(image, round(bits)),
    "Solarize": lambda image, share: ImageOps.solarize(image, 255 * share),  # type: ignore[arg-type]  # Pillow only compares with it
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Hue": _shift_hue,
}
"""What a magnitude means: a slope, pixels, degrees, a change of a factor of 1, bits kept, a share of the range."""
