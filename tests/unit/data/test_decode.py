"""Every kind of picture becomes what a person would expect, and a broken one an error with its reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from eagleray.config.schema import AugmentConfig
from eagleray.data.decode import check_size, crop_and_resize, decode_rgb, image_size
from eagleray.data.transforms import Preprocessing, decode_train, eval_image, normalize, random_resized_crop
from eagleray.errors import DataError

PHOTO = load_sample_image("china.jpg")  # uint8 [427, 640, 3]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """Mean absolute difference in levels of 0..255."""
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("JPEG", {"quality": 95}, 2.5), ("PNG", {}, 0), ("WEBP", {"quality": 95}, 3.0), ("WEBP", {"lossless": True}, 0)],
)
def test_formats(kind: str, options: dict[str, object], tolerance: float) -> None:
    data = encode(Image.fromarray(PHOTO), kind, **options)
    assert image_size(data) == (640, 427)
    assert difference(decode_rgb(data), PHOTO) <= tolerance


def test_grey_and_palette_and_alpha_and_cmyk_become_rgb() -> None:
    photo = Image.fromarray(PHOTO)
    grey = decode_rgb(encode(photo.convert("L"), "JPEG", quality=95))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert difference(decode_rgb(encode(photo.convert("P"), "PNG")), np.asarray(photo.convert("P").convert("RGB"))) == 0
    rgba = photo.copy()
    rgba.putalpha(255)
    assert difference(decode_rgb(encode(rgba, "PNG")), PHOTO) == 0
    assert difference(decode_rgb(encode(photo.convert("CMYK"), "JPEG", quality=95)), PHOTO) < 6


def test_a_photograph_taken_upright_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to display
    data = encode(Image.fromarray(PHOTO), "JPEG", quality=95, exif=exif)
    assert image_size(data) == (427, 640)
    assert difference(decode_rgb(data), np.rot90(PHOTO, -1)) < 2.5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG, PNG or WebP"),
        (b"hello, this is text", "not a JPEG, PNG or WebP"),
        (encode(Image.fromarray(PHOTO), "GIF"), "not a JPEG, PNG or WebP"),
        (encode(Image.fromarray(PHOTO), "JPEG")[:5000], "truncated JPEG"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode_rgb(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    idat = zlib.compress(b"\0" * 1000)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", len(idat)) + b"IDAT" + idat + struct.pack(">I", zlib.crc32(b"IDAT" + idat))
    with pytest.raises(DataError, match="pixels, the limit is"):
        decode_rgb(bomb)


@pytest.mark.parametrize("orientation", [None, 6])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_another_size_than_the_shard_says_is_refused(kind: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encode(Image.fromarray(PHOTO), kind, exif=exif)
    shown, turned = ((640, 427), (427, 640)) if orientation is None else ((427, 640), (640, 427))
    assert image_size(data) == shown
    check_size(data, shown)
    for size in (turned, (640, 426), (1, 1)):
        with pytest.raises(DataError, match=f"{shown[0]}x{shown[1]} pixels, the shard says {size[0]}x{size[1]}"):
            check_size(data, size)
    with pytest.raises(DataError):
        check_size(data[:18], shown)


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (100, 50, 300, 300), (17, 33, 61, 80)])
def test_decoding_only_what_a_crop_needs_gives_nearly_the_same_pixels(box: tuple[int, int, int, int]) -> None:
    """Within 5 levels (of 255) on average of cropping and antialiased resizing the whole picture."""
    data = encode(Image.fromarray(PHOTO), "JPEG", quality=95)
    left, top, width, height = box
    whole = Image.fromarray(decode_rgb(data)).crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BILINEAR)
    assert difference(crop_and_resize(data, (640, 427), box, 64), np.asarray(whole)) < 5.0


def test_crops_have_torchvisions_distribution() -> None:
    """Kolmogorov-Smirnov on area and aspect of 4,000 crops each."""
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import v2

    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    ours = np.array([random_resized_crop((500, 375), scale, ratio, rng) for _ in range(4000)])
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(224, scale=scale, ratio=ratio)
    picture = torch.empty(3, 375, 500)
    theirs = np.array([[p[k] for k in ("left", "top", "width", "height")] for p in (transform.make_params([picture]) for _ in range(4000))])
    for name, value in (
        ("area", lambda c: c[:, 2] * c[:, 3]),
        ("aspect", lambda c: c[:, 2] / c[:, 3]),
        ("left", lambda c: c[:, 0]),
        ("top", lambda c: c[:, 1]),
    ):
        assert ks_2samp(value(ours), value(theirs)).pvalue > 0.001, name


def test_a_sample_looks_the_same_whoever_decodes_it() -> None:
    data = encode(Image.fromarray(PHOTO), "JPEG")
    looks = [decode_train(data, (640, 427), AugmentConfig(), 64, np.random.default_rng([1, 2, sample])) for sample in (5, 5, 6)]
    assert (looks[0] == looks[1]).all()
    assert (looks[0] != looks[2]).any()


def test_evaluation_keeps_the_centre() -> None:
    prepared = eval_image(PHOTO, Preprocessing(image_size=64, eval_resize=72))
    scaled = Image.fromarray(PHOTO).resize((108, 72), Image.Resampling.BOX)
    assert prepared.shape == (64, 64, 3)
    assert difference(prepared, np.asarray(scaled)[4:68, 22:86]) < 4


def test_normalize_is_torchvisions() -> None:
    import torch
    from torchvision.transforms.v2 import functional as F

    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    preprocessing = Preprocessing(image_size=8, eval_resize=8)
    expected = F.normalize(pixels.permute(0, 3, 1, 2).float() / 255, list(preprocessing.mean), list(preprocessing.std))
    result = normalize(pixels, preprocessing)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)
