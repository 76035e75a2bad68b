"""What a request may be: so many bytes, within so much time, and pictures that are pictures. The rest is refused with a reason."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request

    from eagleray.config.schema import ServingConfig

REQUEST_PICTURES = 4
"""A multipart request or a tensor may hold as many bytes as this many of the largest pictures."""

_DETECT_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32


class Refusal(Exception):
    """A request that is answered with an error status and its reason."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers


async def read_body(request: Request, limit_bytes: int, timeout_s: float, remedy: str = "") -> bytes:
    """Return the whole body; see `body_chunks`."""
    return b"".join([chunk async for chunk in body_chunks(request, limit_bytes, timeout_s, remedy)])


async def body_chunks(request: Request, limit_bytes: int, timeout_s: float, remedy: str = "") -> AsyncGenerator[bytes]:
    """Yield the body's chunks, decompressed where it says that it is compressed.

    Args:
        limit_bytes: for the body as it is sent, and for what it decompresses to.
        timeout_s: for all of it; who sends more slowly is let go.
        remedy: what the client can do about a body that is too large.

    Raises:
        Refusal: 408 not complete in time, 413 too large (as soon as that is known), 415 an unknown compression, 400 a damaged one.
    """
    # The rest of a body that is refused is never read: the connection ends with the answer.
    too_large = Refusal(413, f"the body has more than {limit_bytes} bytes, the limit{remedy}", {"Connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit_bytes:
        raise too_large
    unpack = _decompressor(request.headers.get("content-encoding", "identity").strip().lower())
    stream, until = request.stream(), asyncio.get_running_loop().time() + timeout_s
    sent = received = 0
    while True:
        try:
            async with asyncio.timeout_at(until):
                chunk = await anext(stream)
            unpacked = unpack.decompress(chunk, limit_bytes - received + 1)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise Refusal(408, f"the body was not complete after {timeout_s:g} s", {"Connection": "close"}) from None
        except zlib.error as error:
            raise Refusal(400, f"the body cannot be decompressed: {error}") from None
        sent += len(chunk)
        received += len(unpacked)
        if max(sent, received) > limit_bytes:
            raise too_large
        yield unpacked
    if not unpack.eof:
        raise Refusal(400, "the body cannot be decompressed: it is truncated")


class _Identity:
    """A body that is not compressed, in the form of a `zlib` decompressor."""

    eof = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return data


def _decompressor(encoding: str) -> _Identity | zlib._Decompress:
    if encoding in ("", "identity"):
        return _Identity()
    if encoding in ("gzip", "deflate"):
        return zlib.decompressobj(_DETECT_GZIP_OR_ZLIB)
    raise Refusal(415, f"Content-Encoding '{encoding}' is not understood; use gzip or deflate, or do not compress")


def check_picture(picture: bytes, which: str, config: ServingConfig) -> None:
    """Refuse what is no encoded picture; `which` is what the reason calls it."""
    if not picture:
        raise Refusal(400, f"{which} is empty; send a JPEG, PNG or WebP picture")
    if len(picture) > config.max_image_bytes:
        raise Refusal(413, f"{which} has {len(picture)} bytes, more than the limit of {config.max_image_bytes}")
    is_picture = picture.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (picture[:4] == b"RIFF" and picture[8:12] == b"WEBP")
    if not is_picture:
        raise Refusal(415, f"{which} is not a JPEG, PNG or WebP picture")
