"""The head goes and another one comes, with what Redis keeps: nodes stay, and an endpoint answers all the while."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import require_debian
from head_for_tests import Head, cluster_environment, kill, started_head
from serving_for_tests import constant_load, free_port, package, predict, wait_until
from shards_for_tests import digits_job, write_digit_shards

from eagleray.artifacts.registry import Registry
from eagleray.config.load import dump_job
from eagleray.config.schema import WorkspaceConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A Redis server's `host:port`."""
    program, port = require_debian("redis-server", "redis-server"), free_port()
    with open(tmp_path / "redis.log", "wb") as log:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
        process = subprocess.Popen([program, *options], stdout=log, stderr=log)
    try:
        wait_until(lambda: _listens(port))
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_endpoint_answers_while_the_head_is_away_and_the_new_one_knows_it(redis: str, tmp_path: Path) -> None:
    registry = Registry(WorkspaceConfig(root=str(tmp_path / "work")))
    registry.register("digits", package(f"{registry.workspace.models_uri}/digits-1", 1), "", {})
    port, node_port = free_port(), free_port()
    environment = cluster_environment(RAY_REDIS_ADDRESS=redis, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(node_port))
    head = Head(environment, options=["--num-cpus=0"], forks=True)
    with started_head(head):
        head.add_node("--num-cpus=2")
        options = ("--address", head.address, "--root", registry.workspace.root)
        deployed = head.eagleray("serve", "deploy", "digits:1", "--port", str(port), *options)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr

        with httpx.Client(base_url=f"http://127.0.0.1:{node_port}", timeout=60) as client:
            wait_until(lambda: _answers(client))
            with constant_load(client) as results:
                wait_until(lambda: len(results) > 100)
                kill(head.nodes[0])
                before = len(results)
                time.sleep(5)
                away = len(results) - before
                head.start()
                status = head.eagleray("serve", "status", "--address", head.address)
                wait_until(lambda: len(results) > before + away + 100)
            assert predict(client, "afterwards")["version"] == 1
        assert away > 20, "it did not answer while the head was away"
        assert {code for code, _ in results} == {200}, [result for result in results if result[0] != 200][:3]
        assert status.returncode == 0 and "digits" in status.stdout, status.stdout + status.stderr

        write_digit_shards(tmp_path / "shards")
        job = digits_job(tmp_path / "shards", tmp_path / "work", "train.epochs=1", "train.num_workers=1", "data.test=null")
        (tmp_path / "job.yaml").write_text(dump_job(job))
        trained = head.eagleray("submit", str(tmp_path / "job.yaml"), "--address", head.jobs_address, "--name", "after")
        assert trained.returncode == 0 and "registered digits:2" in trained.stdout, trained.stdout + trained.stderr


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v2/health/ready").status_code == 200
    except httpx.HTTPError:
        return False
