"""The same job file on a cluster that somebody else started, through Ray's job server, under its token."""

from __future__ import annotations

import json
import platform
import re
import secrets
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from head_for_tests import Head, cluster_environment, started_head
from serving_for_tests import wait_until
from shards_for_tests import digits_job, write_digit_shards
from terminal_for_tests import run_commands

from eagleray.config.load import dump_job
from eagleray.ports import free_ports

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster as `ray start --head` makes it, with a token."""
    options = ["--num-cpus=2", '--resources={"queue:research": 2}']
    with started_head(Head(cluster_environment(), options, forks=True)) as started:
        yield started


@pytest.fixture(scope="module")
def job_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    write_digit_shards(root / "shards")
    (root / "job.yaml").write_text(dump_job(digits_job(root / "shards", root / "work", "train.epochs=2", "data.test=null")))
    return root / "job.yaml"


def test_a_stopped_job_goes_on_where_it_was_and_then_serves(head: Head, job_path: Path) -> None:
    """`--detach` comes back once the job has passed its checks; the job's file is with it."""
    (port,) = free_ports(1)
    settings = ("--set", "train.epochs=20", "--set", "train.checkpoint_every_steps=15", "--set", f"serve.port={port}")
    options = ("--address", head.jobs_address)
    result = head.eagleray("submit", str(job_path), *options, *settings, "--name", "stopped", "--detach", "--on-finish", "serve")
    assert result.returncode == 0 and "checked: 480 pictures in 10 classes, 2 worker(s)" in result.stdout, result.stdout + result.stderr
    submission = result.stdout.split("submitted ")[1].split()[0]

    assert "RUNNING" in head.eagleray("jobs", "resubmit", submission, *options).stderr
    history = job_path.parent / "work" / "runs" / "stopped" / "history.json"
    wait_until(lambda: history.exists() and len(json.loads(history.read_text())) >= 2, 300)
    commands = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    assert len([command for command in commands if "eagleray train job.yaml --name stopped" in command]) == 1, (
        "Ray's stop finds a job's processes once: one that a shell starts a moment later would go on"
    )
    assert "stopped" in head.eagleray("jobs", "stop", submission, *options).stdout
    shown = head.eagleray("jobs", "show", submission, *options).stdout
    assert "STOPPED" in shown and "run:        stopped" in shown and "epochs: 20" in shown
    assert "epoch   2/20" in head.eagleray("jobs", "logs", submission, *options).stdout

    again = head.eagleray("jobs", "resubmit", submission, *options)
    assert again.returncode == 0 and "epoch  20/20" in again.stdout, again.stdout + again.stderr
    assert "epoch   1/20" not in again.stdout, "it has begun anew"
    address = f"http://127.0.0.1:{port}"
    assert f"endpoint {address}" in again.stdout
    with urllib.request.urlopen(f"{address}/v2/models/digits", timeout=30) as response:
        assert json.load(response)["name"] == "digits"


def test_two_users_submit_at_once_and_a_full_queue_lets_one_after_the_other(head: Head, job_path: Path, repository: Path) -> None:
    """A third one thinks better of it while waiting."""
    options = ("--address", head.jobs_address)
    names, runs = ("ada", "grace"), job_path.parent / "work" / "runs"

    def submit(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return head.eagleray("submit", str(job_path), *options, "--queue", "research", "--name", name, *more)

    def id_of(result: subprocess.CompletedProcess[str]) -> str:
        return result.stdout.split("submitted ")[1].split()[0]

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(submit, name) for name in names]
        wait_until(lambda: any((runs / name / "job.yaml").exists() or future.done() for name, future in zip(names, both, strict=True)), 300)
        third = submit("hopper", "--detach")
        assert third.returncode == 0 and "waits in queue 'research'" in third.stdout, third.stdout + third.stderr
        stopped = head.eagleray("jobs", "stop", id_of(third), *options)
        assert "ends when its turn comes" in stopped.stdout, stopped.stdout + stopped.stderr
        results = {name: future.result() for name, future in zip(names, both, strict=True)}
    for result in results.values():
        assert result.returncode == 0 and "epoch   2/2" in result.stdout, result.stdout + result.stderr
    ada = id_of(results["ada"])
    description = str(repository / "cluster" / "cluster.yaml")
    *both_shown, models, listed, logs, stopped_late, cost = run_commands(
        [
            *(["jobs", "show", id_of(result), *options] for result in results.values()),
            ["models", "list", "--root", str(job_path.parent / "work")],
            ["jobs", "list", *options],
            ["jobs", "logs", ada, *options],
            ["jobs", "stop", ada, *options],
            ["cluster", "cost", description, "--cloud", "aws", *options],
        ],
        head.environment,
    )
    spans = []
    for name, shown in zip(results, both_shown, strict=True):
        assert "SUCCEEDED" in shown and "queue:      research" in shown, shown
        ended = re.search(r"ended: +(.*)", shown)
        assert ended is not None
        began = (runs / name / "job.yaml").stat().st_mtime
        spans.append((began, datetime.strptime(ended[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()))
    assert "digits" in models and ada in listed and "epoch   1/2" in logs and "had ended before" in stopped_late
    assert re.search(rf"{ada} .*ada .*digits:\d", cost)
    assert "SUCCEEDED" in results["ada"].stdout
    again = head.eagleray("submit", str(job_path), *options, "--name", "ada")
    assert again.returncode == 1 and "already holds a run" in again.stdout and "FAILED" in again.stdout

    (_, first_ended), (second_began, _) = sorted(spans)
    assert second_began >= first_ended - 1, "two jobs of two workers each ran at once in a queue for two workers"
    deadline = time.monotonic() + 60
    while "STOPPED" not in (shown := head.eagleray("jobs", "show", id_of(third), *options).stdout):
        assert time.monotonic() < deadline, shown
    assert not (runs / "hopper").exists(), head.eagleray("jobs", "logs", id_of(third), *options).stdout


def test_a_queue_that_cannot_be_is_refused(head: Head, job_path: Path) -> None:
    options = ("--address", head.jobs_address)
    wrong = head.eagleray("submit", str(job_path), *options, "--queue", "reserch")
    assert wrong.returncode == 2 and "--queue 'reserch': this cluster has research" in wrong.stderr
    large = head.eagleray("submit", str(job_path), *options, "--queue", "research", "--set", "train.num_workers=4")
    assert large.returncode == 2 and "lets 2 workers run at a time, the job has 4" in large.stderr


def test_a_job_for_more_gpus_than_there_will_ever_be_is_refused(head: Head, job_path: Path) -> None:
    settings = ("--set", "train.use_gpu=true", "--detach")
    result = head.eagleray("submit", str(job_path), "--address", head.jobs_address, *settings)
    assert result.returncode == 1 and "needs 2 GPUs, the cluster has at most 0" in result.stdout, result.stdout


def test_a_job_on_a_bucket_that_the_cluster_cannot_reach_is_refused(head: Head, job_path: Path) -> None:
    settings = ("--set", "data.val=s3://no-such-bucket/val", "--detach")
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # of the one who submits: it is the cluster's that counts
    result = head.eagleray("submit", str(job_path), "--address", head.jobs_address, *settings, **environment)
    assert result.returncode == 1 and "s3://no-such-bucket" in result.stdout and "Traceback" not in result.stdout, result.stdout


def test_a_cluster_with_another_ray_is_refused(head: Head, job_path: Path) -> None:
    """A job server that answers like one of an older Ray, as far as a client asks before it submits."""

    class OldRay(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "2.49.1", "ray_commit": "0", "session_name": "s"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), OldRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = head.eagleray("submit", str(job_path), "--address", f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert result.returncode == 2 and "runs Ray 2.49.1, this eagleray needs 2.60" in result.stderr and result.stderr.count("\n") == 1


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
