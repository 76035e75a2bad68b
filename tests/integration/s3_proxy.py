"""An HTTP proxy in front of an S3 store that misbehaves when told to; otherwise it passes everything on.

The Host header is passed on as the client sent it, so that the signature holds.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

CHUNK_BYTES = 64_000

_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}

_ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied."),
}

Kind = Literal[
    "slow_down",
    "internal_error",
    "expired",
    "denied",
    "drop",  # the connection breaks in the middle of the body
    "lose_answer",  # the store does it, but the client hears nothing of it
    "slow",  # a part of the body at a time, `bytes_per_s`
    "mute",  # no answer, for ever
    "stall",  # half of the body, then nothing, for ever
    "truncate",  # half of the body as if it were the whole
    "flip",  # one byte in the middle is another
]


@dataclass
class Fault:
    """What happens to requests for keys that match; `hits` counts them."""

    kind: Kind
    key: str = ""
    method: str = "GET"
    times: float = float("inf")
    """So many requests are hit, then none."""
    after: int = 0
    """So many requests that match pass first."""
    fraction: float = 1.0
    access_key: str = ""
    """Only requests signed with it."""
    bytes_per_s: int = 100_000
    hits: int = 0
    _seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def strikes(self, method: str, path: str, authorization: str) -> bool:
        if method != self.method or not re.search(self.key, path) or self.access_key not in authorization:
            return False
        self._seen += 1
        if self._seen <= self.after or self.hits >= self.times or self._random.random() >= self.fraction:
            return False
        self.hits += 1
        return True


class S3Proxy:
    """Passes requests on to `upstream` for the block."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.requests = 0
        self.unanswered = 0
        """Requests that found no store behind this proxy."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("_Handler", (_Handler,), {"proxy": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[Fault]:
        """Let `fault` happen within the block."""
        with self._lock:
            self._faults.append(fault)
        try:
            yield fault
        finally:
            with self._lock:
                self._faults.remove(fault)

    def strike(self, method: str, path: str, authorization: str) -> Fault | None:
        with self._lock:
            self.requests += 1
            return next((fault for fault in self._faults if fault.strikes(method, path, authorization)), None)

    def __enter__(self) -> S3Proxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    proxy: S3Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        with suppress(ConnectionError):
            body = self._body()
            fault = self.proxy.strike(self.command, self.path, self.headers.get("Authorization", ""))
            kind = fault.kind if fault else None
            if kind in _ANSWERS:
                self._answer(*_ANSWERS[kind])
            else:
                self._forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        connection = HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_HEADERS | {"expect"}:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
        except (OSError, HTTPException):
            # A store that is down resets connections; so does this one.
            self.proxy.unanswered += 1
            self.close_connection = True
            return
        finally:
            connection.close()
        if fault is not None and fault.kind == "lose_answer":
            self.close_connection = True
            return
        if fault is not None and fault.kind == "truncate":
            data = data[: len(data) // 2]
        if fault is not None and fault.kind == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        if fault is not None and fault.kind == "mute":
            self.proxy.stopped.wait()
            self.close_connection = True
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        if response.status not in (204, 304):
            # The answer to HEAD gives the length of what it leaves out.
            self.send_header("Content-Length", response.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self._send(data, fault)

    def _send(self, data: bytes, fault: Fault | None) -> None:
        half = data[: len(data) // 2]
        match fault.kind if fault else None:
            case "drop":
                self.wfile.write(half)
                self.close_connection = True
            case "stall":
                self.wfile.write(half)
                self.proxy.stopped.wait()
                self.close_connection = True
            case "slow":
                assert fault is not None
                step = max(1, fault.bytes_per_s // 10)
                for start in range(0, len(data), step):
                    self.wfile.write(data[start : start + step])
                    time.sleep(0.1)
            case _:
                self.wfile.write(data)

    def _answer(self, status: int, code: str, message: str) -> None:
        data = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
