"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from eagleray.errors import ServingError

_CANDIDATES = range(20_000, 32_000)
"""Below the ports that the system hands out to clients, so that a port found free stays free."""


def check_port_free(host: str, port: int) -> None:
    """Raise ServingError where `port` cannot be listened on; names it and says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another (--port, or serve.port in the job file), "
                "or end the program that holds it"
            ) from None


def free_ports(count: int) -> list[int]:
    """Return `count` ports on loopback that nobody listens on."""
    ports: list[int] = []
    candidates = iter(random.sample(_CANDIDATES, len(_CANDIDATES)))
    while len(ports) < count:
        with socket.socket() as probe, suppress(OSError):
            port = next(candidates)
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports
