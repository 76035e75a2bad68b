"""Decoders on one core: bytes of a JPEG → a crop of 224 × 224, flipped or not. Run by `jobs.benchmarks.kernels`.

Every kernel gets the same crops: those that `decode_train` draws for a picture's number.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from jobs.benchmarks.systems.protocol import IMAGE_SIZE, answer, rotated
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from eagleray.config.schema import AugmentConfig
from eagleray.data.decode import image_size
from eagleray.data.tiling import tile
from eagleray.data.transforms import decode_train, random_resized_crop

Pixels = NDArray[np.uint8]
AUGMENT = AugmentConfig()
SIDE = (IMAGE_SIZE, IMAGE_SIZE)


@dataclass(frozen=True)
class Picture:
    """`box` is (left, top, width, height) in pixels; `number` is the seed from which it and the flip were drawn.

    `tiled` is what ingest makes of `data`.
    """

    number: int
    data: bytes
    tiled: bytes
    size: tuple[int, int]
    box: tuple[int, int, int, int]
    is_flipped: bool

    @classmethod
    def of(cls, number: int, data: bytes) -> Picture:
        assert AUGMENT.crop_scale is not None
        size, rng = image_size(data), np.random.default_rng(number)
        box = random_resized_crop(size, AUGMENT.crop_scale, AUGMENT.crop_ratio, rng)
        return cls(number, data, tile(data), size, box, bool(rng.random() < AUGMENT.flip))


def eagleray_tiled(picture: Picture) -> Pixels:
    """Draws its crop itself, which is in its time and in no other's."""
    return decode_train(picture.tiled, picture.size, AUGMENT, IMAGE_SIZE, np.random.default_rng(picture.number))


def eagleray_untiled(picture: Picture) -> Pixels:
    return decode_train(picture.data, picture.size, AUGMENT, IMAGE_SIZE, np.random.default_rng(picture.number))


def pillow(picture: Picture) -> Pixels:
    return _finish_pillow(Image.open(io.BytesIO(picture.data)).convert("RGB"), picture, 1.0)


def pillow_draft(picture: Picture) -> Pixels:
    """Decode at 1/2, 1/4 or 1/8 where the crop is large enough."""
    image = Image.open(io.BytesIO(picture.data))
    width, height = image.size
    image.draft("RGB", (-(-width * IMAGE_SIZE // picture.box[2]), -(-height * IMAGE_SIZE // picture.box[3])))
    return _finish_pillow(image.convert("RGB"), picture, image.size[0] / width)


def _finish_pillow(image: Image.Image, picture: Picture, scale: float) -> Pixels:
    left, top, width, height = (round(edge * scale) for edge in picture.box)
    image = image.crop((left, top, left + width, top + height)).resize(SIDE, Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if picture.is_flipped else image)


def torchvision(picture: Picture) -> Pixels:
    left, top, width, height = picture.box
    image = decode_jpeg(torch.frombuffer(bytearray(picture.data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    image = functional.resized_crop(image, top, left, height, width, list(SIDE), antialias=True)
    return (functional.horizontal_flip(image) if picture.is_flipped else image).permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


def opencv(picture: Picture) -> Pixels:
    return _finish_opencv(cv2.cvtColor(_imdecode(picture, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), picture, 1)


def opencv_reduced(picture: Picture) -> Pixels:
    """Decode at 1/2, 1/4 or 1/8 where the crop is large enough."""
    flags = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2, 1: cv2.IMREAD_COLOR}
    reduction = next((r for r in flags if min(picture.box[2:]) >= r * IMAGE_SIZE), 1)
    return _finish_opencv(cv2.cvtColor(_imdecode(picture, flags[reduction]), cv2.COLOR_BGR2RGB), picture, reduction)


def _imdecode(picture: Picture, flag: int) -> Pixels:
    return cv2.imdecode(np.frombuffer(picture.data, np.uint8), flag)  # type: ignore[return-value]


def simplejpeg_full(picture: Picture) -> Pixels:
    return _finish_opencv(simplejpeg.decode_jpeg(picture.data), picture, 1)


def pyturbojpeg() -> Callable[[Picture], Pixels]:
    from turbojpeg import TJPF_RGB, TurboJPEG

    decoder = TurboJPEG()
    return lambda picture: _finish_opencv(decoder.decode(picture.data, pixel_format=TJPF_RGB), picture, 1)


def _finish_opencv(image: Pixels, picture: Picture, reduction: int) -> Pixels:
    """Crop, resize with OpenCV's area average (its antialiasing) or, enlarging, bilinearly, and flip."""
    left, top, width, height = (round(edge / reduction) for edge in picture.box)
    is_smaller = width > IMAGE_SIZE or height > IMAGE_SIZE
    crop = image[top : top + height, left : left + width]
    resized = cv2.resize(crop, SIDE, interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR)
    return cv2.flip(resized, 1) if picture.is_flipped else resized  # type: ignore[return-value]


def available_kernels() -> tuple[dict[str, Callable[[Picture], Pixels]], dict[str, str]]:
    """Return the kernels by name, and why others are missing."""
    kernels: dict[str, Callable[[Picture], Pixels]] = {
        "Pillow": pillow,
        "Pillow with draft": pillow_draft,
        "torchvision": torchvision,
        "OpenCV": opencv,
        "OpenCV, reduced": opencv_reduced,
        "simplejpeg": simplejpeg_full,
        "eagleray, tiled at ingest": eagleray_tiled,
        "eagleray, not tiled": eagleray_untiled,
    }
    try:
        kernels["PyTurboJPEG"] = pyturbojpeg()
    except ImportError:
        return kernels, {"PyTurboJPEG": "the package PyTurboJPEG is not installed"}
    except (OSError, RuntimeError):
        return kernels, {"PyTurboJPEG": "needs the library libturbojpeg: `sudo apt-get install libturbojpeg0`"}
    return kernels, {}


def main(directory: str, count: int, rounds: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    paths = sorted(Path(directory).rglob("*.jpg"), key=lambda path: path.name)[:count]
    pictures = [Picture.of(number, path.read_bytes()) for number, path in enumerate(paths)]
    kernels, missing = available_kernels()
    reference = [torchvision(picture).astype(np.int16) for picture in pictures]
    rows: list[dict[str, Any]] = []
    rates: dict[str, list[float]] = {name: [] for name in kernels}
    for number in range(rounds):
        for name in rotated(list(kernels), number):
            rates[name].append(_images_per_s(kernels[name], pictures))
    for name, kernel in kernels.items():
        differences = [np.abs(kernel(picture).astype(np.int16) - want).mean() for picture, want in zip(pictures, reference, strict=True)]
        rows.append({"system": name, "rates": rates[name], "difference": float(np.mean(differences))})
    answer({"rows": rows, "missing": missing})


def _images_per_s(kernel: Callable[[Picture], Pixels], pictures: list[Picture]) -> float:
    start = time.perf_counter()
    for picture in pictures:
        kernel(picture)
    return len(pictures) / (time.perf_counter() - start)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
