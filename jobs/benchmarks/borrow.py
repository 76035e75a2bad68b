"""Serving takes a worker from a training run while many ask, and gives it back: latency, and who has what, over time.

    uv run python -m jobs.benchmarks.borrow [--quick] [--json PATH] [--figure PNG]

One Ray of one logical CPU on this machine, which an elastic run of two workers and the first replicas of an endpoint fill. Traffic
rises, and Ray Serve asks for a replica for which there is no room. Both networks wait as if for a device of their own
(`jobs.benchmarks.waiting`), so that it is seen who gets room and when, not how fast two cores compute.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp
import numpy as np
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, console
from jobs.benchmarks.load import Tally, ask
from jobs.benchmarks.servers.eagleray import MODEL, register

from eagleray import api
from eagleray.cluster.connect import connected
from eagleray.config.load import dump_job, load_job, with_values
from eagleray.config.schema import JobConfig, ModelConfig, ServingConfig
from eagleray.demo import job_path, write_digits
from eagleray.ports import free_ports
from eagleray.serving.deployment import NAME as CLASSIFIER

STEP_S = 0.2
"""Of training, as if on a device of its own."""

PICTURE_S = 0.05
"""Of serving: a replica answers at most 20 requests per second."""

MAX_REPLICAS = 3
TARGET_S = 1.0
"""What the 99th percentile of latency is to stay below."""

WINDOW_S = 5.0
"""Of a point in the figure."""


@dataclass(frozen=True)
class Traffic:
    """Requests per second: `low`, rising to `high` within `rise_s`, that for `high_s`, then `low` again."""

    low: float = 6.0
    high: float = 40.0
    calm_s: float = 20.0
    rise_s: float = 170.0
    high_s: float = 40.0
    after_s: float = 80.0

    def rate(self, at: float) -> float:
        risen = min(max((at - self.calm_s) / self.rise_s, 0.0), 1.0) if at < self.calm_s + self.rise_s + self.high_s else 0.0
        return self.low + risen * (self.high - self.low)

    @property
    def seconds(self) -> float:
        return self.calm_s + self.rise_s + self.high_s + self.after_s


@dataclass
class Timeline:
    """What happened when, in seconds since the traffic began."""

    starts: float = field(default_factory=time.perf_counter)
    answers: list[tuple[float, float]] = field(default_factory=list)
    """(asked at, seconds to the answer)."""
    failures: list[tuple[float, str]] = field(default_factory=list)
    replicas: list[tuple[float, int]] = field(default_factory=list)
    workers: list[tuple[float, int]] = field(default_factory=list)

    def now(self) -> float:
        return time.perf_counter() - self.starts

    def p99(self, since: float, until: float) -> float:
        found = [seconds for at, seconds in self.answers if since <= at < until]
        return float(np.percentile(found, 99)) if found else float("nan")

    def workers_at(self, at: float) -> int:
        return [number for when, number in self.workers if when <= at][-1]


class _Recorded(Tally):
    """A tally that also says when each request was due."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__(0.0, float("inf"))
        self._timeline = timeline

    def add(self, asked: float, failure: str | None) -> None:
        at = asked - self._timeline.starts
        if failure is None:
            self._timeline.answers.append((at, time.perf_counter() - asked))
        else:
            self._timeline.failures.append((at, failure))


async def send(url: str, picture: bytes, traffic: Traffic, timeline: Timeline) -> None:
    """Ask at the traffic's rate, whether or not the requests before are answered."""
    tally = _Recorded(timeline)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        due = 0.0
        while due < traffic.seconds:
            await asyncio.sleep(max(0.0, due - timeline.now()))
            group.create_task(ask(session, url, picture, tally, timeline.starts + due))
            due += 1 / traffic.rate(due)


def write_job(root: Path) -> JobConfig:
    """Ingest scikit-learn's digits below `root`; return an elastic run on them that outlasts the traffic."""
    job = with_values(
        load_job(job_path()),
        {
            "workspace": {"root": str(root / "work")},
            **{f"data.{split}": str(root / "data" / split) for split in ("train", "val", "test")},
            "model": {"name": "jobs.benchmarks.waiting:cnn", "params": {"step_s": STEP_S}},
            "train.num_workers": {"min": 1, "max": 2},
            "train.epochs": 1000,
        },
    )
    api.ingest(f"imagefolder:{write_digits(root / 'pictures')}", str(root / "data"), job.ingest)
    return job


def serve(job: JobConfig) -> str:
    """Serve a network that takes `PICTURE_S` for each picture; return where it is asked."""
    config = ModelConfig(name="jobs.benchmarks.waiting:cnn", params={"eval_s": PICTURE_S})
    version = register(job.workspace, config, num_classes=10, image_size=32)
    (port,) = free_ports(1)
    options = {
        "port": port,
        "num_replicas": {"min": 1, "max": MAX_REPLICAS, "idle_s": 15},
        "max_batch_size": 1,
        "backend": "torch-fp32",
    }
    address = api.serve(job.workspace, {"champion": f"{MODEL}:{version}"}, ServingConfig.model_validate(options))
    return f"{address}/predict/{MODEL}"


@contextmanager
def counted_replicas(timeline: Timeline) -> Iterator[None]:
    """Record, for the block, how many replicas answer."""
    from ray import serve as ray_serve

    ended = threading.Event()

    def record() -> None:
        while not ended.wait(0.5):
            deployments = [app.deployments for app in ray_serve.status().applications.values()]
            states = [found[CLASSIFIER].replica_states for found in deployments if CLASSIFIER in found]
            timeline.replicas.append((timeline.now(), sum(count for state in states for name, count in state.items() if name == "RUNNING")))

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def training(job: JobConfig, address: str, timeline: Timeline) -> Iterator[None]:
    """Run `eagleray train` for the block, which begins with its first epoch; record how many workers it goes on with."""
    job_file = Path(job.workspace.root) / "job.yaml"
    job_file.write_text(dump_job(job))
    command = [sys.executable, "-m", "eagleray", "train", str(job_file), "--address", address, "--name", "lender"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    said: list[str] = []

    def listen() -> None:
        for line in lines:
            if found := re.search(r"going on after step \d+ on (\d+) worker", line):
                timeline.workers.append((timeline.now(), int(found[1])))
                console.print(f"[dim]{timeline.now():.0f} s: {line.strip()}[/]")

    for line in lines:
        said.append(line)
        if re.match(r"epoch +1/", line):
            break
    else:
        raise RuntimeError(f"the run ended before its first epoch: {''.join(said[-10:])}")
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=120)
        thread.join()


def measure(root: Path, address: str, traffic: Traffic) -> Timeline:
    """Train, and send the traffic beside it."""
    timeline = Timeline()
    job = write_job(root)
    url = serve(job)
    picture = next((root / "pictures").rglob("*.png")).read_bytes()
    with training(job, address, timeline):
        timeline.starts = time.perf_counter()
        timeline.workers.append((0.0, 2))
        with counted_replicas(timeline):
            asyncio.run(send(url, picture, traffic, timeline))
    api.serve_stop(None)
    return timeline


def report_of(timeline: Timeline, traffic: Traffic) -> Report:
    report = Report()
    risen, fallen = traffic.calm_s + traffic.rise_s, traffic.calm_s + traffic.rise_s + traffic.high_s
    given = next((at for at, number in timeline.workers if number == 1), float("nan"))
    taken = next((at for at, number in timeline.workers if number == 2 and at > fallen), float("nan"))
    for name, since, until in (
        ("few ask", 0.0, traffic.calm_s),
        ("more and more ask", traffic.calm_s, risen),
        ("many ask", risen, fallen),
        ("few ask again", fallen, traffic.seconds),
    ):
        report.add(
            "Latency",
            phase=name,
            requests_per_s=f"{traffic.rate(since):.0f} to {traffic.rate(until - 0.1):.0f}",
            p99_ms=round(timeline.p99(since, until) * 1000),
            failed=str(dict(Counter(failure for at, failure in timeline.failures if since <= at < until)) or 0),
            replicas=max((count for at, count in timeline.replicas if since <= at < until), default=0),
            workers=min(timeline.workers_at(since), timeline.workers_at(until)),
        )
    report.add("The run", one_worker_from_s=round(given, 1), two_again_after_s=round(taken - fallen, 1))
    p99 = timeline.p99(0.0, traffic.seconds)
    report.judge("p99 of all requests", f"at most {TARGET_S:g} s", f"{p99:.2f} s", p99 <= TARGET_S)
    report.judge("failed requests", "none", f"{len(timeline.failures)}", not timeline.failures)
    numbers = [number for _, number in timeline.workers]
    report.judge("workers of the run", "2, then 1, then 2", ", ".join(map(str, numbers)), numbers == [2, 1, 2])
    return report


def draw(timeline: Timeline, traffic: Traffic, path: Path) -> None:
    """Draw latency, replicas and workers over time into a PNG."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, figsize=(9, 4.5), sharex=True)
    edges = np.arange(0.0, traffic.seconds + WINDOW_S, WINDOW_S)
    above.plot(edges[:-1] + WINDOW_S / 2, [timeline.p99(*pair) for pair in pairwise(edges)], color="tab:red", label="p99, seconds")
    above.axhline(TARGET_S, color="tab:red", linewidth=0.8, linestyle=":")
    above.set(ylabel="p99, seconds", ylim=(0, None))
    rates = above.twinx()
    rates.plot(edges, [traffic.rate(at) for at in edges], color="grey", linewidth=0.8)
    rates.set(ylabel="requests per second", ylim=(0, None))
    for name, points, colour in (("replicas", timeline.replicas, "tab:orange"), ("workers", timeline.workers, "tab:blue")):
        times, counts = zip(*[*points, (traffic.seconds, points[-1][1])], strict=True)
        below.step(times, counts, where="post", label=name, color=colour)
    below.set(xlabel="seconds", yticks=range(MAX_REPLICAS + 1), ylim=(0, MAX_REPLICAS + 0.2))
    below.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = harness.parser("borrow", __doc__, quick="traffic that rises sooner, and stays up for a shorter time")
    parser.add_argument("--figure", type=Path, help="also draw latency, replicas and workers into this PNG")
    arguments = parser.parse_args()
    traffic = Traffic(calm_s=10, rise_s=120, high_s=20) if arguments.quick else Traffic()
    os.environ["PYTHONPATH"] = str(harness.REPOSITORY)  # workers and replicas look there for `jobs`
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as directory, connected(num_cpus=1) as connection:
        timeline = measure(Path(directory), connection.address, traffic)
    report = report_of(timeline, traffic)
    report.print()
    if arguments.figure:
        draw(timeline, traffic, arguments.figure)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
