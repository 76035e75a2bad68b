"""Giving a JPEG restart markers, without loss, so that a crop can be decoded by itself (see `jpeg`).

Between two restart markers the first DC coefficient of each colour is coded in full, not as a difference, and
the bits end on a whole byte. So every DC difference is decoded and coded again, with the standard's own
table since the picture's may lack the larger ones; the codes of AC coefficients, nearly all the bits, are
copied. Done once, at ingest; compiled by Numba, which streams and servers need not import.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from eagleray.data.decode import exif_orientation
from eagleray.data.jpeg import END, FRAMES, RESTART_INTERVAL, SCAN, START, JpegHeader, read_header

MIN_TILE_WIDTH = 48
"""Pixels; narrower tiles would save little more and cost more bytes."""

MIN_SIDE = 128
"""Pixels; smaller pictures are decoded as a whole."""

_HUFFMAN_TABLES = 0xC4
_KEPT_SEGMENTS = (0xE0, 0xEE, 0xDB)  # JFIF, Adobe's (it tells the colour space), quantisation tables

# ITU-T T.81, tables K.3 and K.4: number of codes of each length 1..16; the values are the categories 0..11.
_DC_COUNTS = (
    (0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0),
    (0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0),
)
_DC_VALUES = tuple(range(12))


@dataclass(frozen=True)
class _Table:
    """A Huffman table: number of codes of each length 1..16, and their values in the order of the codes."""

    counts: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class _Scan:
    """What is needed to read the compressed data; `dc`, `ac` and `blocks` (per unit) have an entry per colour."""

    kept: bytes
    frame: bytes
    selectors: bytes
    dc: list[int]
    ac: list[int]
    blocks: list[int]
    tables: dict[tuple[int, int], _Table]


def tile(data: bytes) -> bytes:
    """Return a JPEG as a tiled one of exactly the same pixels, without its metadata; anything else as it is.

    Left alone are pictures that are small, not JPEGs, progressive, CMYK, turned by EXIF, or damaged.
    """
    header = read_header(data)
    if header is None or min(header.width, header.height) < MIN_SIDE or (header.has_exif and exif_orientation(data) != 1):
        return data
    scan = _read_scan(data)
    if scan is None:
        return data
    interval = _restart_interval(header)
    compressed = _transcode(data, header, scan, interval)
    if compressed is None:
        return data
    tables = b"".join(_table_segment(0, index, _Table(_DC_COUNTS[min(index, 1)], _DC_VALUES)) for index in sorted(set(scan.dc)))
    tables += b"".join(_table_segment(1, index, scan.tables[1, index]) for index in sorted(set(scan.ac)))
    restarts = _segment(RESTART_INTERVAL, interval.to_bytes(2, "big"))
    return b"".join((START, scan.kept, scan.frame, tables, restarts, scan.selectors, compressed, END))


def _restart_interval(header: JpegHeader) -> int:
    """Return the fewest units that are a tile wide enough and of which a row is a multiple."""
    enough = -(-MIN_TILE_WIDTH // header.block_width)
    return next((n for n in range(enough, header.columns // 2 + 1) if header.columns % n == 0), header.columns)


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """Return (marker, start, end) of each segment up to the first scan's header; empty where they are damaged."""
    place, found = 2, []
    while data[:2] == START and place + 4 <= len(data) and data[place] == 0xFF:
        marker, end = data[place + 1], place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        found.append((marker, place, end))
        if marker == SCAN:
            return found
        place = end
    return []


def _read_scan(data: bytes) -> _Scan | None:
    tables: dict[tuple[int, int], _Table] = {}
    kept, frame, selectors = [], b"", b""
    for marker, start, end in _segments(data):
        if marker in FRAMES:
            frame = data[start:end]
        elif marker == SCAN:
            selectors = data[start:end]
        elif marker == _HUFFMAN_TABLES:
            tables |= _read_tables(data[start + 4 : end])
        elif marker in _KEPT_SEGMENTS:
            kept.append(data[start:end])
    colors = frame[9]
    if len(frame) < 10 + 3 * colors or len(selectors) < 8 + 2 * colors:
        return None
    chosen = [selectors[6 + 2 * i] for i in range(colors)]
    dc, ac = [choice >> 4 for choice in chosen], [choice & 15 for choice in chosen]
    in_frame_order = [selectors[5 + 2 * i] == frame[10 + 3 * i] for i in range(colors)]
    if not all(in_frame_order) or any((0, i) not in tables for i in dc) or any((1, i) not in tables for i in ac):
        return None
    factors = [frame[11 + 3 * i] for i in range(colors)] if colors == 3 else [0x11]
    blocks = [(f >> 4) * (f & 15) for f in factors]
    return _Scan(b"".join(kept), frame, selectors, dc, ac, blocks, tables)


def _read_tables(body: bytes) -> dict[tuple[int, int], _Table]:
    tables, place = {}, 0
    while place + 17 <= len(body):
        kind, counts = body[place], tuple(body[place + 1 : place + 17])
        values = tuple(body[place + 17 : place + 17 + sum(counts)])
        place += 17 + sum(counts)
        if len(values) == sum(counts):
            tables[kind >> 4, kind & 15] = _Table(counts, values)
    return tables


def _segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body


def _table_segment(kind: int, index: int, table: _Table) -> bytes:
    return _segment(_HUFFMAN_TABLES, bytes((kind << 4 | index, *table.counts, *table.values)))


def _lookup(table: _Table) -> NDArray[np.uint16]:
    """Return uint16 [65536]: for each 16 bits, length << 8 | value of the code they start with; 0 for no code."""
    lengths = np.repeat(np.arange(1, 17), table.counts)
    entries = (lengths << 8 | np.array(table.values)).astype(np.uint16)
    lookup = np.zeros(65536, np.uint16)
    spread = np.repeat(entries, 1 << (16 - lengths))[:65536]
    lookup[: len(spread)] = spread
    return lookup


def _codes(table: _Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the code and its length for each value 0..11 of a DC table (T.81, C.2)."""
    codes, lengths, code = np.zeros(12, np.int64), np.zeros(12, np.int64), 0
    values = iter(table.values)
    for length, count in enumerate(table.counts, start=1):
        for _ in range(count):
            value = next(values)
            codes[value], lengths[value] = code, length
            code += 1
        code <<= 1
    return codes, lengths


def _transcode(data: bytes, header: JpegHeader, scan: _Scan, interval: int) -> bytes | None:
    """Return the compressed data with a restart marker after every `interval` units; None where it is damaged."""
    dc = np.stack([_lookup(scan.tables[0, index]) for index in scan.dc])
    ac = np.stack([_lookup(scan.tables[1, index]) for index in scan.ac])
    codes = [_codes(_Table(_DC_COUNTS[min(index, 1)], _DC_VALUES)) for index in scan.dc]
    compressed = np.frombuffer(data, np.uint8)[header.scan :]
    units = header.columns * header.rows
    # A block has two bits or more, and a new DC code is longer by 18 bits at most; each byte may be escaped.
    blocks = min(units * sum(scan.blocks), 4 * len(compressed))
    out = np.empty(2 * (len(compressed) + 3 * blocks) + 8 * (blocks // interval + 1), np.uint8)
    size = _copy_units(
        compressed,
        dc,
        ac,
        np.array(scan.blocks),
        np.stack([code for code, _ in codes]),
        np.stack([length for _, length in codes]),
        units,
        header.restart_interval,
        interval,
        out,
    )
    return out[:size].tobytes() if size > 0 else None


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _put(out: NDArray[np.uint8], size: int, byte: np.uint8) -> int:
    """Write a byte at `size`, escaped if it could be taken for a marker; return the size then."""
    out[size] = byte
    if byte == 0xFF:
        out[size + 1] = 0
        return size + 2
    return size + 1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _put_last(out: NDArray[np.uint8], size: int, pending: np.uint64, num_pending: int) -> int:
    """Write the last 0..7 bits of a tile, filled up with ones."""
    if num_pending == 0:
        return size
    return _put(out, size, np.uint8((pending << np.uint64(8 - num_pending)) | np.uint64((1 << (8 - num_pending)) - 1)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _copy_units(  # noqa: PLR0912, PLR0915 - one loop over the bits
    source: NDArray[np.uint8],
    dc: NDArray[np.uint16],
    ac: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    codes: NDArray[np.int64],
    code_lengths: NDArray[np.int64],
    units: int,
    old_interval: int,
    interval: int,
    out: NDArray[np.uint8],
) -> int:
    """Copy coded units from `source` to `out`; return the bytes written, or -1 where `source` is not what it should be.

    Args:
        source: uint8, the compressed data from the first unit on.
        dc, ac: uint16 [colors, 65536], see `_lookup`.
        blocks: int64 [colors], of each colour in a unit.
        codes, code_lengths: int64 [colors, 12], of the DC table to write with.
        old_interval, interval: units between restart markers in `source` (0: none) and in `out`.
    """
    colors = len(blocks)
    place, size = 0, 0
    bits, num_bits, padding = np.uint64(0), 0, 0  # read and not used yet; `padding` counts those made up behind the end
    pending, num_pending = np.uint64(0), 0  # to be written
    read, written = np.zeros(colors, np.int64), np.zeros(colors, np.int64)  # last DC coefficient
    restarts = 0
    for unit in range(units):
        if unit and old_interval and unit % old_interval == 0:
            bits, num_bits, padding = np.uint64(0), 0, 0
            if place + 1 >= len(source) or source[place] != 0xFF or source[place + 1] & 0xF8 != 0xD0:
                return -1
            place += 2
            read[:] = 0
        if unit and unit % interval == 0:
            size = _put_last(out, size, pending, num_pending)
            pending, num_pending = np.uint64(0), 0
            out[size], out[size + 1] = 0xFF, 0xD0 + restarts % 8
            size += 2
            restarts += 1
            written[:] = 0
        for color in range(colors):
            for _ in range(blocks[color]):
                k = 0
                while k < 64:
                    while num_bits < 32:
                        byte = np.uint8(0)
                        if place + 1 < len(source) and not (source[place] == 0xFF and source[place + 1] != 0):
                            byte = source[place]
                            place += 2 if byte == 0xFF else 1
                        else:
                            padding += 8
                        bits = (bits << np.uint64(8)) | np.uint64(byte)
                        num_bits += 8
                    entry = (dc if k == 0 else ac)[color, np.int64((bits >> np.uint64(num_bits - 16)) & np.uint64(0xFFFF))]
                    length, value = int(entry >> 8), int(entry & 0xFF)
                    if length == 0:
                        return -1
                    extra = value if k == 0 else value & 15
                    if k == 0:
                        if extra > 11:
                            return -1
                        amount = int((bits >> np.uint64(num_bits - length - extra)) & np.uint64((1 << extra) - 1))
                        if extra and amount < 1 << (extra - 1):
                            amount -= (1 << extra) - 1
                        read[color] += amount
                        change = read[color] - written[color]
                        written[color] = read[color]
                        category, rest = 0, abs(change)
                        while rest:
                            category += 1
                            rest >>= 1
                        if category > 11:
                            return -1
                        new_length = int(code_lengths[color, category]) + category
                        new_bits = np.uint64(
                            (codes[color, category] << category) | (change if change >= 0 else change + (1 << category) - 1)
                        )
                        k = 1
                    else:
                        new_length = length + extra
                        new_bits = (bits >> np.uint64(num_bits - new_length)) & np.uint64((1 << new_length) - 1)
                        run = value >> 4
                        if extra:
                            k += run + 1
                        elif run == 15:
                            k += 16
                        else:
                            k = 64
                    num_bits -= length + extra
                    if num_bits < padding:
                        return -1  # used bits behind the end
                    pending = (pending << np.uint64(new_length)) | new_bits
                    num_pending += new_length
                    while num_pending >= 8:
                        size = _put(out, size, np.uint8((pending >> np.uint64(num_pending - 8)) & np.uint64(0xFF)))
                        num_pending -= 8
    return _put_last(out, size, pending, num_pending)
