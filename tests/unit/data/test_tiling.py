"""A tiled JPEG has the same pixels, and any part of it can be decoded by itself."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from eagleray.data.decode import crop_and_resize
from eagleray.data.jpeg import cut, read_header
from eagleray.data.tiling import tile
from eagleray.errors import DataError

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640x427


def encode(image: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format="JPEG", **options)
    return data.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(500, 375), (333, 501), (301, 129), (640, 427)])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 75},
        {"quality": 100, "subsampling": "4:4:4"},
        {"quality": 5, "subsampling": "4:2:2", "optimize": True},  # its tables have only the codes it needs
        {"quality": 90, "subsampling": "4:2:0", "restart_marker_blocks": 3},
    ],
)
def test_all_pixels_and_those_of_any_part_are_the_same(mode: str, size: tuple[int, int], options: dict[str, object]) -> None:
    data = encode(PHOTO.resize(size).convert(mode), **options)
    tiled = tile(data)
    header = read_header(tiled)
    assert header is not None and header.tiles_per_row >= 1
    whole = simplejpeg.decode_jpeg(data)
    assert (simplejpeg.decode_jpeg(tiled) == whole).all()
    rng = np.random.default_rng(0)
    for _ in range(10):
        width, height = int(rng.integers(1, size[0] + 1)), int(rng.integers(1, size[1] + 1))
        left, top = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
        tiles = cut(tiled, header, (left, top, width, height))
        assert tiles is not None
        part, (x, y, _, _) = tiles
        pixels = simplejpeg.decode_jpeg(part)[top - y :, left - x :][:height, :width]
        assert (pixels == whole[top : top + height, left : left + width]).all()


def test_tiles_cost_few_bytes_and_a_small_crop_takes_few_of_them() -> None:
    data = encode(PHOTO, quality=90)
    tiled = tile(data)
    assert len(tiled) < 1.03 * len(data)
    header = read_header(tiled)
    assert header is not None
    tiles = cut(tiled, header, (300, 200, 100, 100))
    assert tiles is not None and len(tiles[0]) < 0.2 * len(data)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    "data",
    [
        encode(PHOTO, progressive=True),
        encode(PHOTO.convert("CMYK")),
        encode(PHOTO, exif=turned()),
        encode(PHOTO.resize((100, 80))),
        encode(PHOTO)[:-5000],
        b"no picture",
        b"",
    ],
    ids=["progressive", "CMYK", "turned", "small", "truncated", "text", "empty"],
)
def test_what_cannot_be_tiled_stays_as_it_is(data: bytes) -> None:
    assert tile(data) is data


def test_metadata_that_does_not_turn_the_picture_is_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a camera"
    tiled = tile(encode(PHOTO, exif=exif))
    assert b"a camera" not in tiled
    header = read_header(tiled)
    assert header is not None and not header.has_exif


def test_tiling_again_changes_nothing() -> None:
    tiled = tile(encode(PHOTO))
    assert tile(tiled) == tiled


@pytest.mark.parametrize("seed", range(60))
def test_damage_gives_a_picture_or_an_error_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(tile(encode(PHOTO)))
    for place in rng.integers(200, len(data), 5):
        data[place] = int(rng.integers(256))
    tile(bytes(data))
    box = (int(rng.integers(300)), int(rng.integers(200)), 200, 200)
    with contextlib.suppress(DataError):
        assert crop_and_resize(bytes(data), (640, 427), box, 64).shape == (64, 64, 3)
