"""A cluster of its own beside the session's, as `ray start` makes one, whose nodes can be killed as a power cut would."""

from __future__ import annotations

import http
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from eagleray.ports import free_ports

BINARIES = Path(sys.executable).parent
START_S = 180.0
WITH_FORKED_WORKERS = [sys.executable, "-m", "eagleray.cluster.local"]


def cluster_environment(**more: str) -> dict[str, str]:
    """Return an environment with a token of its own, and nothing of the session's cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return environment | {"PATH": f"{BINARIES}{os.pathsep}{environment['PATH']}"} | more


@dataclass
class Head:
    """A head and its nodes; `environment` is also that of those who use it."""

    environment: dict[str, str]
    options: list[str] = field(default_factory=lambda: ["--num-cpus=2"])
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    """Of the control plane, job server, Ray client and agent: the session's own cluster has the default ones."""

    forks: bool = False
    """Whether workers are forked, as on a Ray that eagleray starts: it takes a fraction of the time."""

    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    temp_dir: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
    """Ray's sockets need a short path."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def jobs_address(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def eagleray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this cluster; where a node has ended by itself, what it said is in the report of the test."""
        if any(node.poll() not in (None, -signal.SIGKILL) for node in self.nodes):
            print((self.temp_dir / "nodes.log").read_text())
        command = [sys.executable, "-m", "eagleray", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, env=self.environment | environment, check=False)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the head; return once its job server answers."""
        port, dashboard, client, agent = self.ports
        options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        options += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={self.temp_dir}"]
        process = self._start_node("--head", *options, *self.options)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert process.poll() is None and time.monotonic() < deadline, (self.temp_dir / "nodes.log").read_text()
            time.sleep(0.5)
        return process

    def _answers(self) -> bool:
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.jobs_address}/api/version", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == http.HTTPStatus.OK)
        except OSError:
            return False

    def add_node(self, *options: str) -> subprocess.Popen[bytes]:
        return self._start_node(f"--address={self.address}", f"--dashboard-agent-listen-port={free_ports(1)[0]}", *options)

    def _start_node(self, *options: str) -> subprocess.Popen[bytes]:
        command = [*(WITH_FORKED_WORKERS if self.forks else [str(BINARIES / "ray")]), "start", "--block", "--disable-usage-stats", *options]
        with open(self.temp_dir / "nodes.log", "ab") as log:
            self.nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True))
        return self.nodes[-1]


def kill(node: subprocess.Popen[bytes]) -> None:
    """End a node with all that runs on it, at once."""
    if node.poll() is None:
        processes = psutil.Process(node.pid).children(recursive=True)
        for process in [psutil.Process(node.pid), *processes]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)
    node.wait()


@contextmanager
def started_head(head: Head) -> Iterator[Head]:
    try:
        head.start()
        yield head
    finally:
        for node in head.nodes:
            kill(node)
        subprocess.run(["pkill", "-9", "-f", str(head.temp_dir)], check=False)
        shutil.rmtree(head.temp_dir, ignore_errors=True)
