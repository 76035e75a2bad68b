"""From encoded bytes to pixels: the hot kernel of the stream, shared with serving.

JPEG, PNG and WebP; greyscale, palette, CMYK and 16-bit pictures become RGB; alpha is dropped; EXIF
orientation is applied. Shards may also hold raw pixels, see `encode_raw`.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from eagleray.data.jpeg import Box, Encoded, cut, read_header, with_size
from eagleray.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MAX_PIXELS = 178_956_970  # as Pillow's decompression-bomb warning

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def image_size(data: Encoded, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) in pixels as displayed, from the header alone.

    Raises:
        DataError: not a JPEG, PNG, WebP or raw picture, or more than `max_pixels` pixels.
    """
    if is_raw(data):
        return _raw_size(data, max_pixels)
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
                orientation = _orientation(image)
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


def exif_orientation(data: Encoded) -> int:
    """Return how EXIF says that a picture is turned or mirrored, 1 (not at all) to 8; 1 too where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except Exception:
        return 1


def _orientation(image: Image.Image) -> int:
    # Of a PNG without it, Pillow would decode the whole picture in search of it.
    return int(image.getexif().get(_EXIF_ORIENTATION, 1)) if "exif" in image.info else 1


def decode_rgb(data: Encoded, max_pixels: int = DEFAULT_MAX_PIXELS, *, allow_raw: bool = False) -> NDArray[np.uint8]:
    """Decode a picture nobody has looked at yet.

    Args:
        allow_raw: also take raw pixels, which are eagleray's own and nothing that a client sends.

    Returns:
        uint8 [H, W, 3], RGB, as displayed.

    Raises:
        DataError: not a picture, truncated, or more than `max_pixels` pixels.
    """
    if is_raw(data) and not allow_raw:
        raise DataError("not a JPEG, PNG or WebP picture")
    image_size(data, max_pixels)
    return decode_trusted(data)


def decode_trusted(data: Encoded) -> NDArray[np.uint8]:
    """Decode a picture whose header was checked at ingest.

    Returns:
        uint8 [H, W, 3], RGB, as displayed.

    Raises:
        DataError: damaged or truncated.
    """
    return decode_raw(data) if is_raw(data) else _decode_opencv(data, reduction=1)


_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_RAW_MAGIC = b"\x93RAW"
_RAW_HEADER = struct.Struct("<4sIII")

SMALL_BYTES = 4096
"""Up to this size pictures are small: ingest unpacks PNGs whose pixels fit, and workers on CPUs decode such pictures themselves."""


def encode_raw(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels as bytes that say what they are, for pictures too small to gain from JPEG or PNG.

    The format: the magic bytes 93 52 41 57 ("\\x93RAW"); height, width and channels as little-endian uint32; the
    pixels row by row, channels last.

    Args:
        pixels: uint8 [H, W] (grey), [H, W, 1] (grey) or [H, W, 3] (RGB).
    """
    height, width, channels = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    return _RAW_HEADER.pack(_RAW_MAGIC, height, width, channels) + pixels.tobytes()


def encode_png(rgb: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] as PNG; quickly rather than small."""
    return cv2.imencode(".png", rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def without_equal_channels(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a grey picture, uint8 [H, W, 3], as [H, W]; another one as it is."""
    grey = rgb[:, :, 0]
    return grey if (rgb == grey[:, :, None]).all() else rgb


def is_raw(data: Encoded) -> bool:
    return data[:4] == _RAW_MAGIC


def is_png(data: Encoded) -> bool:
    return bytes(data[:8]) == _PNG_START[:8]


def decode_raw(data: Encoded) -> NDArray[np.uint8]:
    """Return the pixels of `encode_raw` as RGB, uint8 [H, W, 3]. Raises DataError if they do not fit the header."""
    width, height = _raw_size(data, DEFAULT_MAX_PIXELS)
    pixels = np.frombuffer(data, np.uint8, offset=_RAW_HEADER.size).reshape(height, width, -1)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _raw_size(data: Encoded, max_pixels: int) -> tuple[int, int]:
    if len(data) < _RAW_HEADER.size:
        raise DataError("truncated raw pixels")
    _, height, width, channels = _RAW_HEADER.unpack_from(data)
    if height * width > max_pixels:
        raise DataError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if not height or not width or channels not in (1, 3) or len(data) - _RAW_HEADER.size != height * width * channels:
        raise DataError(f"damaged raw pixels ({len(data) - _RAW_HEADER.size} bytes for {width}x{height}x{channels})")
    return width, height


def check_size(data: Encoded, size: tuple[int, int]) -> None:
    """Compare a picture's header with the (width, height) that a shard says, before anything of it is decoded.

    Raises:
        DataError: they differ; the picture may be a decompression bomb.
    """
    _compare_size(_png_size(data) or image_size(data), size)


def _png_size(data: Encoded) -> tuple[int, int] | None:
    """Return what the header of a PNG says, in a fraction of Pillow's time; None of other pictures, and where EXIF may turn it.

    The header is the first chunk: its size, type, and width and height in pixels as big-endian uint32 (W3C, PNG 3rd edition, 11.2.1).
    """
    whole = bytes(data)
    if not whole.startswith(_PNG_START) or b"eXIf" in whole or len(whole) < len(_PNG_START) + 8:
        return None
    width, height = struct.unpack_from(">II", whole, len(_PNG_START))
    return width, height


def _compare_size(found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise DataError(f"{found[0]}x{found[1]} pixels, the shard says {expected[0]}x{expected[1]}")


def crop_and_resize(data: Encoded, size: tuple[int, int], box: Box, target: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Return `box` of a picture as a square, decoding only what it needs.

    Of a tiled JPEG (see `tiling`) only the tiles under the box are decoded, of another one all down to the
    box's last row; both at half, a quarter or an eighth of their size (DCT scaling) where the box has
    twice, four or eight times the pixels wanted; the box's edges then move to a multiple of 2, 4 or 8 pixels.

    Args:
        data: encoded bytes of a picture that was checked at ingest.
        size: (width, height) of the picture in pixels, as displayed.
        box: (left, top, width, height) of the crop in pixels.
        target: side of the result in pixels.
        out: uint8 [target, target, 3] to write the result to.

    Returns:
        uint8 [target, target, 3], RGB.

    Raises:
        DataError: damaged or truncated.
    """
    left, top, width, height = box
    if is_raw(data):
        return resize(decode_raw(data)[top : top + height, left : left + width], target, target, out)
    reduction = max((r for r in _OPENCV_FLAGS if min(width, height) >= r * target), default=1)
    image, x, y = _decode_part(data, size, box, reduction)
    rows = _span(top - y, height, reduction, image.shape[0])
    columns = _span(left - x, width, reduction, image.shape[1])
    return resize(image[rows, columns], target, target, out)


def resize(image: NDArray[np.uint8], width: int, height: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to [height, width, 3], close to bilinear with antialiasing as Pillow and torchvision do it.

    Shrinking by r, antialiased bilinear averages with a triangle of half-width r, whose variance is
    r²/6. The same variance comes from a short binomial-like filter of variance (r² - 1)/6 before plain
    bilinear interpolation (a triangle of half-width 1). It is cheaper than OpenCV's area average and no
    further from torchvision's pixels (`jobs/benchmarks/kernels.py`).
    """
    shrink_x, shrink_y = image.shape[1] / width, image.shape[0] / height
    if max(shrink_x, shrink_y) > _MAX_FILTERED_SHRINK:
        return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
    if max(shrink_x, shrink_y) > 1:
        image = cv2.sepFilter2D(image, -1, _smoothing(shrink_x), _smoothing(shrink_y), borderType=cv2.BORDER_REPLICATE)  # type: ignore[assignment]
    return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


_MAX_FILTERED_SHRINK = 3.0

_OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def _smoothing(shrink: float) -> NDArray[np.float64]:
    """Return a symmetric filter of variance (shrink² - 1) / 6: three-tap filters [a, 1 - 2a, a], each of variance 2a <= 1/2."""
    variance = max(shrink * shrink - 1, 0.0) / 6
    filters = max(1, math.ceil(2 * variance))
    a = variance / filters / 2
    kernel = np.ones(1)
    for _ in range(filters):
        kernel = np.convolve(kernel, [a, 1 - 2 * a, a])
    return kernel


def _span(start: int, length: int, reduction: int, limit: int) -> slice:
    first = min(round(start / reduction), limit - 1)
    return slice(first, max(first + 1, min(round((start + length) / reduction), limit)))


def _decode_part(data: Encoded, size: tuple[int, int], box: Box, reduction: int) -> tuple[NDArray[np.uint8], int, int]:
    """Decode at least `box` of a picture, at 1/`reduction` of its size; also return the place (left, top) of the first pixel."""
    header = read_header(data)
    if header is None or header.has_exif:
        check_size(data, size)
        return _decode_opencv(data, reduction), 0, 0
    _compare_size((header.width, header.height), size)
    _check_end(data)
    if header.tiles_per_row:
        tiles = cut(data, header, box)
        if tiles is None:
            raise DataError("cannot be decoded (restart markers are missing)")
        part, (left, top, width, height) = tiles
        return _decode_jpeg(part, width, height, reduction, is_whole=True), left, top
    # Nothing below the rows of blocks that the crop touches is decoded when the header gives the picture as
    # so high only. Smooth upsampling of colours looks one row further.
    bottom = box[1] + box[3] + 1
    height = min(header.height, -(-bottom // header.block_height) * header.block_height)
    return _decode_jpeg(with_size(data, header, header.width, height), header.width, height, reduction, is_whole=False), 0, 0


def _decode_jpeg(data: Encoded, width: int, height: int, reduction: int, *, is_whole: bool) -> NDArray[np.uint8]:
    """Decode a JPEG; of one that is not whole, data may be left over, for which warnings of damage have to be ignored."""
    try:
        return simplejpeg.decode_jpeg(  # type: ignore[no-any-return]
            data, min_height=-(-height // reduction), min_width=-(-width // reduction), min_factor=reduction, strict=is_whole
        )
    except ValueError as error:
        raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:100]})") from None


def _decode_opencv(data: Encoded, reduction: int) -> NDArray[np.uint8]:
    if data[:2] == b"\xff\xd8":
        _check_end(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _OPENCV_FLAGS[reduction])
    except cv2.error as error:
        raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:100]})") from None
    if image is None:
        raise DataError("cannot be decoded (damaged or truncated)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def _check_end(data: Encoded) -> None:
    if b"\xff\xd9" not in bytes(data[-64:]):
        raise DataError("truncated JPEG (no end marker)")  # decoders would fill the rest with grey
