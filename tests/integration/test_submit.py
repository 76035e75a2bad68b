"""The same job file on a cluster that somebody else started, through Ray's job server, under its token."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from shards_for_tests import digits_job, write_digit_shards

from eagleray.config.load import dump_job
from eagleray.ports import free_ports

pytestmark = pytest.mark.slow

BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    jobs_address: str
    address: str
    environment: dict[str, str]

    def eagleray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "eagleray", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=self.environment | environment, check=False)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster as `ray start --head` makes it, with a token."""
    port, dashboard, client, agent = free_ports(4)
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment["PATH"] = f"{BINARIES}{os.pathsep}{environment['PATH']}"
    command = [str(BINARIES / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", "--num-cpus=2", f"--temp-dir={temp_dir}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}"]  # the default one is taken by the session's own cluster
    log_path = tmp_path_factory.mktemp("head") / "head.log"
    with open(log_path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    started = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    try:
        deadline = time.monotonic() + 90
        while started.eagleray("jobs", "list", "--address", started.jobs_address).returncode != 0:
            assert process.poll() is None and time.monotonic() < deadline, log_path.read_text()
        yield started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["pkill", "-9", "-f", temp_dir], check=False)


@pytest.fixture(scope="module")
def job_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    write_digit_shards(root / "shards")
    (root / "job.yaml").write_text(dump_job(digits_job(root / "shards", root / "work", "train.epochs=2", "data.test=null")))
    return root / "job.yaml"


def test_a_submitted_job_trains_and_registers(head: Head, job_path: Path) -> None:
    result = head.eagleray("submit", str(job_path), "--address", head.jobs_address, "--name", "submitted")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "epoch   2/2" in result.stdout and "SUCCEEDED" in result.stdout
    assert (job_path.parent / "work" / "runs" / "submitted" / "job.yaml").exists()
    models = head.eagleray("models", "list", "--root", str(job_path.parent / "work"))
    assert "digits" in models.stdout

    submission = result.stdout.split("submitted ")[1].split()[0]
    assert submission in head.eagleray("jobs", "list", "--address", head.jobs_address).stdout
    assert "epoch   1/2" in head.eagleray("jobs", "logs", submission, "--address", head.jobs_address).stdout
    assert "had ended before" in head.eagleray("jobs", "stop", submission, "--address", head.jobs_address).stdout

    again = head.eagleray("submit", str(job_path), "--address", head.jobs_address, "--name", "submitted")
    assert again.returncode == 1 and "already holds a run" in again.stdout and "FAILED" in again.stdout


def test_a_wrong_or_missing_token_is_one_clear_line(head: Head) -> None:
    wrong = head.eagleray("jobs", "list", "--address", head.jobs_address, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert wrong.returncode == 2 and "token was refused" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_a_job_that_is_not_there_is_named(head: Head) -> None:
    result = head.eagleray("jobs", "logs", "raysubmit_nowhere", "--address", head.jobs_address)
    assert result.returncode == 2 and "no job 'raysubmit_nowhere'" in result.stderr


def test_local_paths_are_refused_for_a_cluster_elsewhere(job_path: Path) -> None:
    from eagleray.cluster.submit import _with_portable_paths
    from eagleray.config.load import load_job
    from eagleray.errors import ConfigError

    with pytest.raises(ConfigError, match=r"is a local path, which the cluster at 'http://head:8265' cannot see; use an s3://"):
        _with_portable_paths(load_job(job_path), "http://head:8265")


def test_the_standard_librarys_platform_is_there_in_workers(ray_cluster: object, repository: Path) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def system() -> tuple[str, str]:
        import platform

        return platform.system(), str(platform.__file__)

    name, path = ray.get(system.remote())
    assert name == platform.system() and str(repository) not in path
