"""The head's state is in Redis: the head goes as if its plug were pulled, and a new one takes over."""

from __future__ import annotations

import json
import secrets
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import require_debian
from head_for_tests import Head, cluster_environment, kill, started_head
from serving_for_tests import package, picture, wait_until
from shards_for_tests import digits_job

from eagleray.artifacts.registry import Registry
from eagleray.config.load import dump_job
from eagleray.ports import free_ports

pytestmark = pytest.mark.slow


@contextmanager
def redis_server(folder: Path, password: str) -> Iterator[str]:
    """Run a Redis that writes all it is told to disk; yields its address."""
    (port,) = free_ports(1)
    folder.mkdir()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "requirepass": password, "appendonly": "yes", "save": ""}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    server = subprocess.Popen([require_debian("redis-server", "redis-server"), *flags], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def steady_requests(address: str) -> Iterator[list[int]]:
    """Ask ten times a second; yields the growing list of status codes, 0 where there was no answer."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=30.0) as client:
            while not stop.wait(0.1):
                try:
                    statuses.append(client.post(f"{address}/predict/digits", content=picture()).status_code)
                except httpx.HTTPError:
                    statuses.append(0)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()


def test_a_new_head_takes_over_while_requests_are_answered(tmp_path: Path) -> None:
    """What serves is on another node, and goes on; the new head knows of it, and changes it."""
    password = secrets.token_hex(16)
    head_port, node_port = free_ports(2)
    job = digits_job(tmp_path / "shards", tmp_path / "work", "serve.backend=torch-fp32", f"serve.port={head_port}")
    (tmp_path / "job.yaml").write_text(dump_job(job))
    registry = Registry(job.workspace)
    for seed in (1, 2):
        registry.register("digits", package(f"{registry.workspace.models_uri}/digits-{seed}", seed), "", {})
    on_node = f"http://127.0.0.1:{node_port}"

    with redis_server(tmp_path / "redis", password) as redis:
        # Both nodes are on one machine, so that the node's proxy needs a port of its own.
        environment = cluster_environment(RAY_REDIS_ADDRESS=redis, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(node_port))
        head = Head(environment, ["--num-cpus=0", f"--redis-password={password}"], forks=True)

        def eagleray(*arguments: str) -> str:
            done = head.eagleray(*arguments)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        def deploy(reference: str) -> None:
            eagleray("serve", "deploy", reference, "--job", str(tmp_path / "job.yaml"), "--address", head.address)

        def served_version() -> int:
            return int(httpx.post(f"{on_node}/predict/digits", content=picture(), timeout=30).json()["version"])

        with started_head(head):
            head.add_node("--num-cpus=2")
            deploy("digits:1")
            with steady_requests(on_node) as statuses:
                wait_until(lambda: len(statuses) > 10)
                kill(head.nodes[0])
                began = len(statuses)
                wait_until(lambda: len(statuses) > began + 20)
                # On a machine of its own the new head would not take the node that is still there for a head.
                (head.temp_dir / "ray_current_cluster").unlink()
                head.start()
                eagleray("serve", "status", "--address", head.address, "--json", str(tmp_path / "status.json"))
            assert set(statuses) == {200}
            status = json.loads((tmp_path / "status.json").read_text())
            assert status["models"]["digits"]["variants"]["champion"]["state"] == "RUNNING"
            deploy("digits:2")
            wait_until(lambda: served_version() == 2)
