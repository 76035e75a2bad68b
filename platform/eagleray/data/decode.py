"""From encoded bytes to pixels: the hot kernel of the stream, shared with serving.

JPEG, PNG and WebP; greyscale, palette, CMYK and 16-bit pictures become RGB; alpha is dropped; EXIF
orientation is applied.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
from numpy.typing import NDArray

from eagleray.errors import DataError

DEFAULT_MAX_PIXELS = 178_956_970  # as Pillow's decompression-bomb warning

MIN_OVERSAMPLING = 1.5
"""Pixels that the decoder leaves for each one wanted, per side: the crop's edges fall on whole pixels of the reduced picture."""

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def image_size(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) in pixels as displayed, from the header alone.

    Raises:
        DataError: not a JPEG, PNG or WebP, or more than `max_pixels` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
                # Of a PNG without it, Pillow would decode the whole picture in search of it.
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    except UnidentifiedImageError:
        raise DataError("not a JPEG, PNG or WebP picture") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {2 * DEFAULT_MAX_PIXELS} pixels, the limit is {max_pixels}") from None
    except DataError:
        raise
    except Exception as error:
        # Pillow's parsers raise many kinds of error on hostile headers; each means the same here.
        raise DataError(f"damaged header ({error})") from None
    return (height, width) if orientation in _TURNED else (width, height)


def decode_rgb(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a picture nobody has looked at yet.

    Returns:
        uint8 [H, W, 3], RGB, as displayed.

    Raises:
        DataError: not a picture, truncated, or more than `max_pixels` pixels.
    """
    image_size(data, max_pixels)
    return decode_trusted(data)


def decode_trusted(data: bytes, reduction: int = 1) -> NDArray[np.uint8]:
    """Decode a picture whose header was checked at ingest, at 1/`reduction` of its size (1, 2, 4, 8).

    JPEGs are reduced within the decoder (DCT scaling), which saves most of the work.

    Returns:
        uint8 [ceil(H / reduction), ceil(W / reduction), 3], RGB.

    Raises:
        DataError: damaged or truncated.
    """
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]:
        raise DataError("truncated JPEG (no end marker)")  # OpenCV would fill the rest with grey
    flag = _DECODE_FLAGS[reduction]
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error as error:
        raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:100]})") from None
    if image is None:
        raise DataError("cannot be decoded (damaged or truncated)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


_DECODE_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def crop_and_resize(data: bytes, size: tuple[int, int], box: tuple[int, int, int, int], target: int) -> NDArray[np.uint8]:
    """Decode only as finely as needed and return `box` of the picture as a square.

    Args:
        data: encoded bytes.
        size: (width, height) of the picture in pixels, as displayed.
        box: (left, top, width, height) of the crop in pixels.
        target: side of the result in pixels.

    Returns:
        uint8 [target, target, 3], RGB.

    Raises:
        DataError: damaged or truncated.
    """
    left, top, width, height = box
    reduction = _reduction(min(width, height), target)
    image = decode_trusted(data, reduction)
    # The decoder rounds sizes up, so the true factor is taken from the result.
    x, y = image.shape[1] / size[0], image.shape[0] / size[1]
    crop = image[_span(top * y, height * y, image.shape[0]), _span(left * x, width * x, image.shape[1])]
    return resize(crop, target, target)


def resize(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to [height, width, 3]: area average when shrinking, bilinear when growing."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    shrinking = width * height < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)  # type: ignore[return-value]


def _reduction(crop_side: int, target: int) -> int:
    return max((r for r in _DECODE_FLAGS if crop_side >= r * target * MIN_OVERSAMPLING), default=1)


def _span(start: float, length: float, limit: int) -> slice:
    first = min(round(start), limit - 1)
    return slice(first, max(first + 1, min(round(start + length), limit)))
