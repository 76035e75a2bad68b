"""A whole cluster on this machine, of which each part is a real server: S3, PostgreSQL, MLflow, Ray and Prometheus.

As a program (`python -m eagleray.cluster.local start --head …`) it is `ray start` with workers that are forked.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from eagleray.cluster.connect import prepare_environment
from eagleray.cluster.local_postgres import LocalPostgres
from eagleray.cluster.local_s3 import LocalS3
from eagleray.errors import ClusterError
from eagleray.ports import free_ports

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
BUCKET = "eagleray"
SETTINGS_NAME = "session.env"


@dataclass(frozen=True)
class Part:
    """A server that runs, and where."""

    name: str
    address: str


class LocalCluster:
    """Runs all parts for the block; what they store stays in `directory`.

    Attributes:
        settings: environment variables with which another process finds all of it, and may use it.

    Raises:
        ClusterError: a program is missing, or a part does not come up; says which, and what to do.
    """

    def __init__(self, directory: str | Path, num_cpus: int | None = None, on_part: Callable[[Part], None] = lambda part: None) -> None:
        self.directory = Path(directory).resolve()
        self.settings: dict[str, str] = {}
        self._on_part = on_part  # told of each part once it runs
        self._num_cpus = num_cpus or os.cpu_count() or 1
        self._stack = ExitStack()

    def __enter__(self) -> LocalCluster:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._start_storage()
            self._start_tracking(self._start_database())
            self._start_metrics(self._start_ray())
            # Its addresses and keys are of this time alone.
            self._stack.callback(write_settings(self.directory, self.settings).unlink, missing_ok=True)
        except OSError as error:
            self._stack.close()
            raise ClusterError(f"a local cluster cannot start in '{self.directory}': {error}; give another --dir") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _start_storage(self) -> None:
        store = self._stack.enter_context(LocalS3(self.directory / "s3"))
        uri = store.create_bucket(BUCKET)
        self.settings |= store.environment() | {"EAGLERAY_ROOT": f"{uri}/work"}
        self._on_part(Part("S3", store.endpoint))

    def _start_database(self) -> LocalPostgres:
        database = self._stack.enter_context(LocalPostgres(self.directory / "postgres"))
        self._on_part(Part("PostgreSQL", database.create_database("optuna")))
        return database

    def _start_tracking(self, database: LocalPostgres) -> None:
        (port,) = free_ports(1)
        address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
        command += [f"--backend-store-uri={database.create_database('mlflow')}", f"--artifacts-destination=s3://{BUCKET}/mlflow"]
        # Its job runners, for judging texts, are two more processes that nothing here asks for.
        self._start("MLflow", address, command, lambda: _answers(f"{address}/health"), MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        self.settings["MLFLOW_TRACKING_URI"] = address

    def _start_ray(self) -> Path:
        """Start Ray with a token; return where it keeps what it knows."""
        temp_dir = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need a short path
        self._stack.callback(shutil.rmtree, temp_dir, ignore_errors=True)
        port, dashboard, client, agent, metrics = free_ports(5)
        token = secrets.token_hex(32)
        self.settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "EAGLERAY_ADDRESS": f"127.0.0.1:{port}"}
        command = [sys.executable, "-m", "eagleray.cluster.local", "start", "--head", "--block", f"--num-cpus={self._num_cpus}"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--temp-dir={temp_dir}"]
        address = f"http://127.0.0.1:{dashboard}"
        self.settings["EAGLERAY_JOBS_ADDRESS"] = address
        self._start("Ray", address, command, lambda: _has_node(address, token))
        return temp_dir

    def _start_metrics(self, ray_directory: Path) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise ClusterError("Prometheus is not installed; run: sudo apt-get install prometheus (others: https://prometheus.io/download)")
        (port,) = free_ports(1)
        config = ray_directory / "session_latest" / "metrics" / "prometheus" / "prometheus.yml"
        command = [program, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
        command += [f"--storage.tsdb.path={self.directory / 'prometheus'}"]
        self._start("Prometheus", f"http://127.0.0.1:{port}", command, lambda: _answers(f"http://127.0.0.1:{port}/-/ready"))

    def _start(self, name: str, address: str, command: list[str], is_up: Callable[[], bool], **environment: str) -> None:
        log = self.directory / f"{name.lower()}.log"
        self._stack.enter_context(_running(name, command, log, _environment(self.settings) | environment, is_up))
        self._on_part(Part(name, address))


def write_settings(directory: Path, settings: Mapping[str, str]) -> Path:
    """Write the environment variables with which a second terminal finds what runs here, for its user's eyes alone; return the file."""
    path = directory / SETTINGS_NAME
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    return path


@contextmanager
def _running(name: str, command: list[str], log: Path, environment: Mapping[str, str], is_up: Callable[[], bool]) -> Iterator[None]:
    """Run a server, in a group of its own, for the block."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"{name} does not come up; see {log}")
            time.sleep(0.3)
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has not taken along
    process.wait()


def _answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, headers=headers, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _has_node(jobs_address: str, token: str) -> bool:
    """Tell whether Ray's head knows of a node: it answers before its own has joined."""
    try:
        answer = httpx.get(f"{jobs_address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=5)
        return answer.is_success and any(node["state"] == "ALIVE" for node in answer.json()["data"]["result"]["result"])
    except httpx.HTTPError:
        return False


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    return inherited | dict(settings) | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def main() -> None:
    """Be Ray's own command line, with workers that are forked."""
    from eagleray.cluster.forkserver import forked_workers

    prepare_environment()
    with forked_workers():
        from ray.scripts.scripts import cli

        cli()


if __name__ == "__main__":
    main()
