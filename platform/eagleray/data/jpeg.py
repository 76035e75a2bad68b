"""The parts of a JPEG file: what is needed to decode no more of a picture than a crop shows.

A *tiled* JPEG is an ordinary one that has a restart marker after every few blocks of a row (see `tiling`),
so that its rows of blocks fall into tiles whose bytes stand alone. Those of a crop, under a header
that gives their size, are a smaller JPEG, which any decoder decodes to the very pixels that the whole has
there. (ITU-T T.81 has the format: B.1.1 and B.2 the segments, E.1.4 the restart markers.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

START = b"\xff\xd8"
END = b"\xff\xd9"
RESTART = 0xD0
BASELINE_FRAMES = (0xC0, 0xC1)
FRAMES = (*BASELINE_FRAMES, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
APP1 = 0xE1
RESTART_INTERVAL = 0xDD
SCAN = 0xDA


Encoded = bytes | memoryview
"""A picture as it is stored."""

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


@dataclass(frozen=True)
class JpegHeader:
    """Of a JPEG whose rows of blocks can be told apart: sequential, 8 bits, grey or three colours in one scan.

    Attributes:
        frame: place of the frame header (SOF) in the file, in bytes.
        scan: place of the first byte of compressed data.
        width, height: in pixels.
        block_width, block_height: pixels of a minimum coded unit (MCU).
        restart_interval: units between restart markers; 0 without any.
        has_exif: EXIF may turn the picture.
    """

    frame: int
    scan: int
    width: int
    height: int
    block_width: int
    block_height: int
    restart_interval: int
    has_exif: bool

    @property
    def columns(self) -> int:
        """Units in a row."""
        return -(-self.width // self.block_width)

    @property
    def rows(self) -> int:
        return -(-self.height // self.block_height)

    @cached_property
    def tiles_per_row(self) -> int:
        """0 where rows are not whole tiles."""
        interval = self.restart_interval
        return self.columns // interval if interval and self.columns % interval == 0 else 0


def read_header(data: Encoded) -> JpegHeader | None:
    """Return the header of a JPEG; None where it is of another kind (progressive, CMYK, …) or damaged."""
    if data[:2] != START:
        return None
    place, frame, restart_interval, has_exif = 2, 0, 0, False
    width = height = block_width = block_height = 0
    while data[place : place + 1] == b"\xff" and place + 9 < len(data):
        marker = data[place + 1]
        body = place + 4
        if marker in FRAMES:
            colors = data[body + 5]
            if marker not in BASELINE_FRAMES or data[body] != 8 or colors not in (1, 3):
                return None
            frame = place
            height, width = int.from_bytes(data[body + 1 : body + 3], "big"), int.from_bytes(data[body + 3 : body + 5], "big")
            # A scan of one colour has units of one block whatever the sampling factors say.
            factors = [data[body + 7 + 3 * i] for i in range(colors)] if colors == 3 else [0x11]
            block_width, block_height = 8 * max(f >> 4 for f in factors), 8 * max(f & 15 for f in factors)
        elif marker == RESTART_INTERVAL:
            restart_interval = int.from_bytes(data[body : body + 2], "big")
        elif marker == SCAN:
            if not (frame and width and height and block_width and block_height) or data[body] != data[frame + 9]:
                return None
            scan = place + 2 + int.from_bytes(data[place + 2 : body], "big")
            return JpegHeader(frame, scan, width, height, block_width, block_height, restart_interval, has_exif)
        elif marker == APP1:
            has_exif |= data[body : body + 4] == b"Exif"
        place += 2 + int.from_bytes(data[place + 2 : body], "big")
    return None


def cut(data: Encoded, header: JpegHeader, box: Box) -> tuple[bytes, Box] | None:
    """Return the tiles of a tiled JPEG that cover `box`, as a JPEG of their own.

    Returns:
        The smaller JPEG, and the box of the whole picture that it shows; None where the restart markers are
        not those that the header promises.
    """
    left, top, width, height = box
    per_row, rows = header.tiles_per_row, header.rows
    starts = _tile_starts(data, header)
    if len(starts) != per_row * rows + 1:
        return None
    tile_width, tile_height = header.restart_interval * header.block_width, header.block_height
    # One pixel more on each side: smooth upsampling of colours looks at neighbours.
    first_column, last_column = max(left - 1, 0) // tile_width, min(-(-(left + width + 1) // tile_width), per_row)
    first_row, last_row = max(top - 1, 0) // tile_height, min(-(-(top + height + 1) // tile_height), rows)

    firsts = np.arange(first_row, last_row) * per_row + first_column
    wanted = last_column - first_column
    row_starts, row_ends = starts[firsts].tolist(), starts[firsts + wanted].tolist()
    compressed = bytearray().join([data[start:end] for start, end in zip(row_starts, row_ends, strict=True)])
    # Restart markers are numbered, modulo 8, from the first tile on.
    ends = np.cumsum((starts[1:] - starts[:-1])[firsts[:, None] + np.arange(wanted)].ravel())
    pixels = np.frombuffer(compressed, np.uint8)
    pixels[ends - 1] = RESTART + _COUNT[: len(ends)]
    compressed[-2:] = END

    left, top = first_column * tile_width, first_row * tile_height
    width, height = min(last_column * tile_width, header.width) - left, min(last_row * tile_height, header.height) - top
    return with_size(data[: header.scan], header, width, height) + compressed, (left, top, width, height)


def with_size(data: Encoded, header: JpegHeader, width: int, height: int) -> bytes:
    """Return a JPEG, or its beginning, with another size in its header."""
    place = header.frame + 5
    return b"".join((data[:place], height.to_bytes(2, "big"), width.to_bytes(2, "big"), data[place + 4 :]))


_COUNT = (np.arange(65536) % 8).astype(np.uint8)


def _tile_starts(data: Encoded, header: JpegHeader) -> NDArray[np.int64]:
    """Return the place of each tile's first byte, and of the byte behind the last tile's end marker."""
    whole = np.frombuffer(data, np.uint8)
    escapes = np.flatnonzero(whole[header.scan : -2] == 0xFF) + header.scan
    restarts = escapes[(whole[escapes + 1] & 0xF8) == RESTART] + 2
    return np.concatenate(([header.scan], restarts, [len(data)]))
