"""ImageNet-like pictures without a network: 500×375 JPEGs of 50-110 KB from the photographs in scikit-learn and scikit-image."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 500, 375
NUM_CLASSES = 20
MAX_DISTINCT = 2_000
"""Beyond this many, a picture is a hard link to an earlier one: other name, same bytes."""


def make_pictures(directory: Path, count: int) -> None:
    """Write `count` JPEGs into one sub-folder of `directory` per class; the same ones each time."""
    for label in range(NUM_CLASSES):
        (directory / f"class-{label:02d}").mkdir(parents=True, exist_ok=True)
    distinct = min(count, MAX_DISTINCT)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_write, [_path(directory, i) for i in range(distinct)], range(distinct), chunksize=50))
    for i in range(distinct, count):
        os.link(_path(directory, i % distinct), _path(directory, i))


def link_pictures(source: Path, num_source: int, directory: Path, count: int) -> None:
    """Fill `directory` with `count` hard links to the `num_source` pictures (a multiple of the classes) in `source`."""
    for label in range(NUM_CLASSES):
        (directory / f"class-{label:02d}").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        os.link(_path(source, i % num_source), _path(directory, i))


def _path(directory: Path, i: int) -> Path:
    return directory / f"class-{i % NUM_CLASSES:02d}" / f"{i:06d}.jpg"


def _write(path: Path, seed: int) -> None:
    path.write_bytes(encode_picture(seed))


def encode_picture(seed: int) -> bytes:
    """Return a random part of a photograph, 500×375 pixels, with a camera's noise, as JPEG."""
    rng = np.random.default_rng(seed)
    photographs = _photographs()
    source = photographs[int(rng.integers(len(photographs)))]
    height, width = source.shape[:2]
    part_width = int(min(width, height * WIDTH / HEIGHT) * rng.uniform(0.7, 1.0))
    part_height = part_width * HEIGHT // WIDTH
    left, top = int(rng.integers(width - part_width + 1)), int(rng.integers(height - part_height + 1))
    part = cv2.resize(source[top : top + part_height, left : left + part_width], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    noise = rng.normal(0.0, 4.0, part.shape)
    noisy = np.clip(part * rng.uniform(0.7, 1.1) + noise, 0, 255).astype(np.uint8)
    picture = noisy[:, ::-1] if rng.random() < 0.5 else noisy
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(92, 97))])[1])


def photograph_of(seed: int) -> int:
    """Return the number of the photograph that `encode_picture` cuts this picture from."""
    return int(np.random.default_rng(seed).integers(len(_photographs())))


_cache: list[NDArray[np.uint8]] = []


def _photographs() -> list[NDArray[np.uint8]]:
    if not _cache:
        from skimage import data
        from sklearn.datasets import load_sample_images

        _cache.extend(load_sample_images().images)
        _cache.extend([data.astronaut(), data.coffee(), data.chelsea(), data.rocket()])
    return _cache
