from __future__ import annotations

import socket

import pytest

from eagleray.errors import ServingError
from eagleray.ports import check_port_free, free_ports


def test_a_port_that_another_program_holds_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServingError, match=rf"port {port} on 127.0.0.1 cannot be used .*choose another"):
            check_port_free("127.0.0.1", port)


def test_free_ports_are_free_and_differ() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        check_port_free("127.0.0.1", port)
