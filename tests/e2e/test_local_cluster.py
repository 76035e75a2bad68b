"""`eagleray cluster local up`: all of a cluster on this machine, up and down again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from conftest import require_debian, require_debian_file
from integration.shards_for_tests import digits_job, write_digit_shards

from eagleray.config.load import dump_job

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "MLFLOW_"))}


@pytest.fixture
def folder() -> Iterator[Path]:
    require_debian("prometheus", "prometheus")
    require_debian_file(Path("/usr/lib/postgresql"), "postgresql")
    path = Path(tempfile.mkdtemp(prefix="local-", dir="/tmp"))
    path.chmod(0o755)  # where tests run as root, PostgreSQL does not
    yield path
    shutil.rmtree(path)


class Up:
    """The command, from when it says that all is up until Ctrl-C."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "output.txt"
        command = [sys.executable, "-m", "eagleray", "cluster", "local", "up", "--dir", str(folder / "cluster"), "--num-cpus", "2"]
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        deadline = time.monotonic() + 300
        while "Ctrl-C stops all of it" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)
        lines = self.log.read_text().splitlines()
        self.addresses = {line.split()[0]: line.split()[1] for line in lines if "://" in line}
        settings = (folder / "cluster" / "session.env").read_text().splitlines()
        self.settings = dict(line.split("=", 1) for line in settings)

    def eagleray(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "eagleray", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | self.settings, timeout=300, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def end(self, number: int = signal.SIGINT) -> None:
        """Ask it to end, as Ctrl-C does; nothing that was started may be left."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        assert self.process.wait(120) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)


def test_all_parts_work_together_and_what_they_store_stays(folder: Path) -> None:
    write_digit_shards(folder / "shards")
    (folder / "job.yaml").write_text(dump_job(digits_job(folder / "shards", folder / "work", "train.epochs=1", "data.test=null")))
    with Up(folder) as up:
        assert list(up.addresses) == ["S3", "PostgreSQL", "MLflow", "Ray", "Prometheus"]
        assert (folder / "cluster" / "session.env").stat().st_mode & 0o077 == 0
        status = up.eagleray("cluster", "status")
        assert re.search(r"head +1 +0 of 2", status), status
        with psycopg.connect(up.addresses["PostgreSQL"]) as connection:
            connection.execute("CREATE TABLE kept (number integer)")
        workspace = {"root": up.settings["EAGLERAY_ROOT"], "tracking_uri": up.settings["MLFLOW_TRACKING_URI"]}
        settings = [word for key, value in workspace.items() for word in ("--set", f"workspace.{key}={value}")]
        submitted = up.eagleray("submit", str(folder / "job.yaml"), *settings, "--name", "run")
        assert "epoch   1/1" in submitted
        assert "run" in up.eagleray("runs", "list")
        query = {"query": "ray_node_cpu_count"}
        deadline = time.monotonic() + 90
        while not (found := httpx.get(f"{up.addresses['Prometheus']}/api/v1/query", params=query).json()["data"]["result"]):
            assert time.monotonic() < deadline, "Prometheus has not found Ray"
            time.sleep(1)
        assert float(found[0]["value"][1]) == os.cpu_count()
        assert httpx.get(f"{up.addresses['Ray']}/api/jobs/").status_code == 401, "it lets anybody in"
        up.end()
    assert not (folder / "cluster" / "session.env").exists()

    with Up(folder) as up:
        with psycopg.connect(up.addresses["PostgreSQL"]) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        assert re.search(r"digits +1\b", up.eagleray("models", "list")), "the registry is MLflow's, the weights are on S3"
        up.end(signal.SIGTERM)


def test_what_cannot_start_is_named_and_takes_the_others_along(folder: Path) -> None:
    """PostgreSQL's folder is a file; the store was up by then."""
    (folder / "cluster").mkdir()
    (folder / "cluster" / "postgres").write_text("")
    command = [sys.executable, "-m", "eagleray", "cluster", "local", "up", "--dir", str(folder / "cluster")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert result.returncode == 2 and "postgres" in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or [])]
