"""A cloud's metadata service, as far as it speaks of spot nodes; the real ones are only on their clouds' machines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata(ThreadingHTTPServer):
    """AWS's IMDSv2 (`spot/instance-action`, a token is asked for) and Google Cloud's `instance/preempted`."""

    deadline: float | None = None
    """When this machine goes, in seconds since the epoch."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        is_asked_well = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(*((200, "a-token") if is_asked_well else (400, "")))

    def do_GET(self) -> None:
        deadline = self.server.deadline
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
                self._answer(401, "")
            elif deadline is None:
                self._answer(404, "")
            else:
                self._answer(
                    200, json.dumps({"action": "terminate", "time": f"{datetime.fromtimestamp(deadline, UTC):%Y-%m-%dT%H:%M:%SZ}"})
                )
        elif self.path == "/computeMetadata/v1/instance/preempted":
            is_asked_well = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if is_asked_well else 403, "FALSE" if deadline is None else "TRUE")
        else:
            self._answer(404, "")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def metadata_service() -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
