"""From no worker node to those that the work asks for, and back: Ray's autoscaler with its fake node provider, on this machine.

    uv run python -m jobs.benchmarks.autoscale [--quick] [--json PATH] [--figure PNG]

A cluster as `eagleray cluster render` describes it, with a head that takes no work and groups `train` and `serve` without a node.
A search is submitted; then a training run that serves what it has trained; then the endpoint is taken down. The table and the
figure show how many nodes each group had. Nodes are processes here, of one CPU each: what a cloud's machine takes to boot is not
in these times.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report

from eagleray.placement import GROUP_LABEL, NODE_GROUPS_VARIABLE
from eagleray.ports import free_ports

GROUPS = {"train": {"cpus": 1, "gpus": 0, "max": 2}, "serve": {"cpus": 1, "gpus": 0, "max": 1}}
IDLE_S = 10.0
START_TIMEOUT_S = 90.0
SAMPLE_S = 0.5
BINARIES = Path(sys.executable).parent


@dataclass
class Timeline:
    """Nodes per group over time, in seconds, and what happened when."""

    samples: list[tuple[float, Counter[str]]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)

    def peak(self, group: str, since: float = 0.0) -> int:
        return max((counts[group] for at, counts in self.samples if at >= since), default=0)

    def first(self, condition: Callable[[Counter[str]], bool], since: float) -> float | None:
        return next((at for at, counts in self.samples if at >= since and condition(counts)), None)

    def when(self, event: str) -> float:
        return next(at for at, text in self.events if text == event)


class GrowingCluster:
    """A head without work of its own, whose autoscaler starts and ends nodes of `GROUPS`; with a token."""

    def __init__(self) -> None:
        self._port, self._dashboard, client, agent = free_ports(4)
        self._directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
        self._options = [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        self.jobs_address = f"http://127.0.0.1:{self._dashboard}"
        self.address = f"127.0.0.1:{self._port}"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            NODE_GROUPS_VARIABLE: json.dumps(GROUPS),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._start = time.monotonic()
        self.timeline = Timeline()

    def __enter__(self) -> GrowingCluster:
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        config = Path(self._directory) / "cluster.yaml"
        config.write_text(yaml.safe_dump(_autoscaling_config(self.address, FAKE_HEAD_NODE_ID)))
        command = [
            sys.executable,
            "-m",
            "eagleray.cluster.local",
            "start",
            "--head",
            "--block",
            f"--port={self._port}",
            f"--dashboard-port={self._dashboard}",
        ]
        command += ["--num-cpus=0", "--num-gpus=0", f"--temp-dir={self._directory}", f"--autoscaling-config={config}", *self._options]
        fake = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "PYTHONPATH": str(harness.REPOSITORY),  # for the provider
        }
        with open(Path(self._directory) / "head.log", "w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment | fake, start_new_session=True)
        try:
            self._wait_until_up()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def eagleray(self, *arguments: str, timeout_s: float = 400.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "eagleray", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=self.environment, check=False)

    def run(self, *arguments: str) -> str:
        """Run a verb that must succeed; return what it prints."""
        done = self.eagleray(*arguments)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def nodes(self) -> Counter[str]:
        """Return how many nodes each group has now."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(f"{self.jobs_address}/api/v0/nodes", params={"detail": "true"}, headers=token, timeout=30).raise_for_status()
        nodes = answer.json()["data"]["result"]["result"]
        labels = [node["labels"] for node in nodes if node["state"] == "ALIVE"]
        return Counter(label[GROUP_LABEL] for label in labels if GROUP_LABEL in label)

    def actors(self) -> list[str]:
        """Return what lives on the nodes: an actor keeps its node from being idle."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(f"{self.jobs_address}/api/v0/actors", params={"detail": "true"}, headers=token, timeout=30).raise_for_status()
        rows = answer.json()["data"]["result"]["result"]
        return [f"{row['class_name']} on {row['node_id'][-5:]}" for row in rows if row["state"] != "DEAD"]

    def note(self, event: str) -> float:
        now = round(time.monotonic() - self._start, 1)
        self.timeline.events.append((now, event))
        return now

    @contextmanager
    def watched(self) -> Iterator[Timeline]:
        """Record how many nodes there are, for the block."""
        ended = threading.Event()

        def record() -> None:
            while not ended.wait(SAMPLE_S):
                self.timeline.samples.append((round(time.monotonic() - self._start, 1), self.nodes()))

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        try:
            yield self.timeline
        finally:
            ended.set()
            thread.join()

    def wait_until(self, condition: Callable[[Counter[str]], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.nodes()):
            assert time.monotonic() < deadline, f"after {timeout_s:.0f} s the nodes are {dict(self.nodes())}; actors: {self.actors()}"
            time.sleep(SAMPLE_S)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.eagleray("jobs", "list", "--address", self.jobs_address).returncode != 0:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((Path(self._directory) / "head.log").read_text()[-2000:])

    def _end(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        subprocess.run(["pkill", "-9", "-f", self._directory], check=False)  # its nodes, which have sessions of their own


def _autoscaling_config(address: str, head_id: str) -> dict[str, Any]:
    def node_type(group: str) -> dict[str, Any]:
        resources = {"CPU": GROUPS[group]["cpus"], "object_store_memory": 200_000_000}
        return {
            "resources": resources,
            "labels": {GROUP_LABEL: group},
            "node_config": {},
            "min_workers": 0,
            "max_workers": GROUPS[group]["max"],
        }

    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "max_workers": sum(int(group["max"]) for group in GROUPS.values()),
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "jobs.benchmarks.fake_nodes.FakeNodes",
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": head_id,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{group: node_type(group) for group in GROUPS},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def write_job(root: Path, num_trials: int) -> Path:
    """Ingest scikit-learn's digits below `root`, and write the quickstart's job for them; return its file."""
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.load import dump_job, load_job, with_values
    from eagleray.demo import job_path, write_digits

    (port,) = free_ports(1)
    job = with_values(
        load_job(job_path()),
        {
            "workspace": {"root": str(root / "work")},
            **{f"data.{split}": str(root / "data" / split) for split in ("train", "val", "test")},
            "tune.num_trials": num_trials,
            "tune.epochs": 4,
            "train.epochs": 3,
            "serve.port": port,
        },
    )
    with connected():
        api.ingest(f"imagefolder:{write_digits(root / 'pictures')}", str(root / "data"), job.ingest)
    (root / "job.yaml").write_text(dump_job(job))
    return root / "job.yaml"


def grow_and_shrink(cluster: GrowingCluster, job: Path, on_event: Callable[[str], object] = lambda event: None) -> None:
    """Submit a search; wait until its nodes are gone; train and serve; take the endpoint down; wait until all nodes are gone."""
    at = ("--address", cluster.jobs_address)

    def note(event: str) -> None:
        cluster.note(event)
        on_event(event)

    note("search submitted")
    cluster.run("submit", str(job), *at, "--name", "search")
    note("search ended")
    cluster.wait_until(lambda nodes: nodes.total() == 0, 120)
    note("training submitted")
    cluster.run("submit", str(job), *at, "--name", "run", "--verb", "train", "--on-finish", "serve")
    note("serving")
    cluster.wait_until(lambda nodes: nodes["train"] == 0, 120)
    note("endpoint taken down")
    cluster.run("serve", "stop", "--address", cluster.address)
    cluster.wait_until(lambda nodes: nodes.total() == 0, 120)
    note("empty")


def draw(timeline: Timeline, path: Path) -> None:
    """Draw nodes over time into a PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3))
    times = [at for at, _ in timeline.samples]
    for group, colour in (("train", "tab:blue"), ("serve", "tab:orange")):
        counts = [nodes[group] for _, nodes in timeline.samples]
        axes.step(times, counts, where="post", label=f"{group} nodes", color=colour)
        axes.fill_between(times, counts, step="post", alpha=0.2, color=colour)
    for row, (at, event) in enumerate(timeline.events):
        axes.axvline(at, color="grey", linewidth=0.8, linestyle=":")
        axes.text(at, 2.15 + 0.2 * (row % 3), f" {event}", fontsize=7, va="bottom")  # in three rows, as some come together
    axes.set(xlabel="seconds", ylabel="nodes", ylim=(0, 2.1), yticks=[0, 1, 2])
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def report_of(timeline: Timeline) -> Report:
    report = Report()
    search, ended = timeline.when("search submitted"), timeline.when("search ended")
    train, serving = timeline.when("training submitted"), timeline.when("serving")
    down, empty = timeline.when("endpoint taken down"), timeline.when("empty")

    def after(since: float, condition: Callable[[Counter[str]], bool]) -> float | None:
        at = timeline.first(condition, since)
        return None if at is None else round(at - since, 1)

    report.add("Search", seconds=ended - search, first_node_s=after(search, lambda n: n["train"] > 0),
               all_nodes_s=after(search, lambda n: n["train"] == GROUPS["train"]["max"]), gone_after_s=after(ended, lambda n: n.total() == 0))  # fmt: skip
    report.add("Training, then serving", seconds=serving - train, first_train_node_s=after(train, lambda n: n["train"] > 0),
               first_serve_node_s=after(train, lambda n: n["serve"] > 0), train_nodes_gone_after_s=after(serving, lambda n: n["train"] == 0),
               serve_node_gone_after_s=round(empty - down, 1))  # fmt: skip
    most = timeline.peak("train")
    report.judge("nodes of the search", f"{GROUPS['train']['max']}", f"{most}", most == GROUPS["train"]["max"])
    left = timeline.samples[-1][1].total()
    report.judge("nodes at the end", "0", f"{left}", left == 0)
    return report


def main() -> None:
    parser = harness.parser("autoscale", __doc__, quick="a search of two trials")
    parser.add_argument("--figure", type=Path, help="also draw the timeline into this PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as directory:
        job = write_job(Path(directory), num_trials=2 if arguments.quick else 6)
        with GrowingCluster() as cluster, cluster.watched() as timeline:
            grow_and_shrink(cluster, job)
    report = report_of(timeline)
    report.print()
    if arguments.figure:
        draw(timeline, arguments.figure)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
