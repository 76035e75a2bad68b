"""Serving beside its peers: answers per second and their latency, and a soak with a swap and a kill.

    uv run python -m jobs.benchmarks.serve [--quick] [--only PART] [--json PATH]

See docs/performance.md for what is measured, and how.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import httpx
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, TurnError, console
from jobs.benchmarks.load import LoadTask
from jobs.benchmarks.pictures import make_pictures
from jobs.benchmarks.servers.common import TASK, ServeTask
from jobs.benchmarks.servers.trained import TrainTask
from jobs.benchmarks.systems.protocol import rotated

START_TIMEOUT_S = 180.0
NUM_PICTURES = 64
OURS = "eagleray"
OURS_INT8 = "eagleray, int8 allowed"
TORCH = ("torch", "torchvision", "pillow")


@dataclass(frozen=True)
class Regime:
    """What is served to whom."""

    name: str
    task: ServeTask
    picture_size: tuple[int, int] | None
    """Width and height that the pictures are scaled to; None: as they are, 500 × 375."""

    goal: float
    """Requests per second at 8 and 32 clients, as a multiple of the best peer's."""


LARGE = Regime("ResNet-18 at 224 px, where the model is the bound", ServeTask("resnet18", 224, 1000, 0), None, 1.5)
SMALL = Regime("a small CNN at 32 px, where the framework is the bound", ServeTask("cnn", 32, 10, 0), (40, 40), 1.0)


@dataclass(frozen=True)
class Server:
    """A system that is measured; `requirements` are installed in an environment of its own."""

    name: str
    module: str
    requirements: tuple[str, ...] | None = None
    path: str = "/predict"
    form_field: str | None = None
    """Where pictures are sent as a form's file rather than as the body."""
    backend: str = "auto"
    int8_agreement: float | None = None
    """Where given: a trained network, of which int8 may change so few answers; in the first regime alone."""
    placement: str = "auto"
    """Another one: in the second regime alone."""


SERVERS = (
    Server(OURS, "eagleray", path="/predict/benchmark"),
    Server(OURS_INT8, "eagleray", path="/predict/benchmark", int8_agreement=0.98),
    Server("eagleray, torch-fp32", "eagleray", path="/predict/benchmark", backend="torch-fp32"),
    Server("eagleray, replicas alone", "eagleray", path="/predict/benchmark", placement="replicas"),
    Server("bare FastAPI", "bare_fastapi", ("fastapi", "uvicorn[standard]")),
    Server("LitServe", "lit_serve", ("litserve", "python-multipart"), form_field="content"),
    Server("BentoML", "bento", ("bentoml",), form_field="images"),
    Server("Ray Serve", "ray_serve", ("ray[serve]",)),
)


@dataclass(frozen=True)
class Sizes:
    clients: tuple[int, ...]
    seconds: float
    rounds: int
    soak_s: float
    servers: tuple[Server, ...]


FULL = Sizes((1, 8, 32), 8.0, 3, 600.0, SERVERS)
QUICK = Sizes((1, 8), 4.0, 1, 60.0, SERVERS[:5])


@dataclass
class Bench:
    directory: Path
    sizes: Sizes
    report: Report = field(default_factory=Report)

    @cached_property
    def trained(self) -> str:
        """Folder of the first regime's network as a package, trained."""
        target = self.directory / "trained"
        task = TrainTask(LARGE.task.network, LARGE.task.image_size, LARGE.task.num_classes, str(target))
        console.print(f"[dim]training {task.network}, so that int8 has something to change[/]")
        found = harness.run(sys.executable, "jobs.benchmarks.servers.trained", json.dumps(asdict(task)))
        self.report.add(f"What int8 changes, {LARGE.name}", **found)
        return str(target)

    def task(self, regime: Regime, server: Server) -> ServeTask:
        is_trained = server.int8_agreement is not None
        return replace(
            regime.task,
            port=_free_port(),
            backend=server.backend,
            placement=server.placement,
            package=self.trained if is_trained else None,
            int8_agreement=server.int8_agreement,
        )

    def bodies(self, regime: Regime, form_field: str | None) -> tuple[list[str], dict[str, str]]:
        """Return files with the requests' bodies, and their headers."""
        pictures = self.directory / "pictures"
        if not pictures.exists():
            make_pictures(pictures, NUM_PICTURES)
        size = "full" if regime.picture_size is None else f"{regime.picture_size[0]}"
        target = self.directory / f"bodies-{size}-{form_field}"
        boundary = "eagleray-benchmark"
        if not target.exists():
            target.mkdir()
            for number, path in enumerate(sorted(pictures.rglob("*.jpg"))):
                jpeg = path.read_bytes() if regime.picture_size is None else _scaled(path, regime.picture_size)
                (target / f"{number}").write_bytes(jpeg if form_field is None else _form(jpeg, form_field, boundary))
        kind = "image/jpeg" if form_field is None else f"multipart/form-data; boundary={boundary}"
        return [str(path) for path in sorted(target.iterdir())], {"Content-Type": kind}


def _scaled(path: Path, size: tuple[int, int]) -> bytes:
    picture = cv2.resize(cv2.imread(str(path)), size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", picture)[1].tobytes())


def _form(jpeg: bytes, name: str, boundary: str) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="picture.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + jpeg + f"\r\n--{boundary}--\r\n".encode()


# --- Beside the peers -------------------------------------------------------------------------------------------


def measure_peers(bench: Bench) -> None:
    """Closed loop in both regimes, each server alone on the machine, servers in turns."""
    for regime in (LARGE, SMALL):
        servers = [
            server for server in bench.sizes.servers if (server.placement == "auto" if regime is LARGE else server.int8_agreement is None)
        ]
        found: dict[str, dict[int, list[dict[str, Any]]]] = {server.name: {} for server in servers}
        notes: dict[str, str] = {}
        for number in range(bench.sizes.rounds):
            for server in rotated(servers, number):
                console.print(f"[dim]{regime.name}, round {number + 1} of {bench.sizes.rounds}: {server.name}[/]")
                try:
                    with serving(bench, regime, server) as load:
                        for clients in bench.sizes.clients:
                            found[server.name].setdefault(clients, []).append(load(clients))
                except TurnError as error:
                    notes[server.name] = str(error)
        _add(bench, regime, found, notes)
        _judge(bench, regime, found)


@contextmanager
def serving(bench: Bench, regime: Regime, server: Server) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Start a server, wait until it answers; gives what asks it with so many clients. Raises TurnError."""
    python = _python(bench, server)
    to_do = bench.task(regime, server)
    bodies, headers = bench.bodies(regime, server.form_field)
    url = f"http://127.0.0.1:{to_do.port}{server.path}"

    def load(clients: int) -> dict[str, Any]:
        task = LoadTask(url, bodies, headers, clients, bench.sizes.seconds)
        found = harness.run(sys.executable, "jobs.benchmarks.load", json.dumps(asdict(task)))
        if found["failures"]:
            raise TurnError(f"requests failed with {clients} clients: {found['failures']}")
        return found

    with harness.process(python, f"jobs.benchmarks.servers.{server.module}", {TASK: json.dumps(asdict(to_do))}) as running:
        _wait_for_answer(running, url, Path(bodies[0]).read_bytes(), headers)
        yield load


def _python(bench: Bench, server: Server) -> Path | str:
    if server.requirements is None:
        return sys.executable
    own = [f"{package}=={harness.version(package)}" for package in TORCH]
    requirements = [f"{name}=={harness.version('ray')}" if name.startswith("ray") else name for name in server.requirements]
    python = harness.make_environment(server.module, [*own, *requirements])
    packages = [name.partition("[")[0] for name in server.requirements]
    bench.report.versions[server.name] = harness.installed_versions(python, packages)
    return python


def _wait_for_answer(running: harness.Running, url: str, body: bytes, headers: dict[str, str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    last = "nothing answered"
    while time.monotonic() < deadline:
        if running.has_ended():
            raise TurnError(f"ended: {running.last_line()}")
        try:
            response = httpx.post(url, content=body, headers=headers, timeout=30)
            if response.status_code == 200:
                return
            last = f"{response.status_code} {response.text[:200]}"
        except httpx.HTTPError as error:
            last = repr(error)
        time.sleep(0.2)
    raise TurnError(f"no answer within {START_TIMEOUT_S:.0f} s: {last}; {running.last_line()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _add(bench: Bench, regime: Regime, found: dict[str, dict[int, list[dict[str, Any]]]], notes: dict[str, str]) -> None:
    int8 = [server for server in bench.sizes.servers if server.name == OURS_INT8 and found.get(server.name)]
    tasks = [regime.task, *(bench.task(regime, server) for server in int8)]
    bounds: dict[str, dict[str, float]] = {}
    for task in tasks:
        bounds |= harness.run(sys.executable, "jobs.benchmarks.servers.model_bound", environment={TASK: json.dumps(asdict(task))})[
            "images_per_s"
        ]
    for clients in bench.sizes.clients:
        best = max((_rate(runs.get(clients)) for name, runs in found.items() if not name.startswith(OURS)), default=0.0)
        for name, runs in found.items():
            turns = runs.get(clients, [])
            rates = [turn["requests_per_s"] for turn in turns]
            bench.report.add(
                regime.name,
                clients=clients,
                system=name,
                requests_per_s=_rate(turns),
                range=f"{min(rates):.1f}-{max(rates):.1f}" if rates else "",
                times_best_peer=_rate(turns) / best if best else None,
                p50_ms=statistics.median(turn["p50_ms"] for turn in turns) if turns else None,
                p99_ms=statistics.median(turn["p99_ms"] for turn in turns) if turns else None,
                note=notes.get(name),
            )
        for name, rates_by_size in bounds.items():
            size = str(min(clients, 32))
            bench.report.add(
                regime.name, clients=clients, system=f"bound: {name} alone, batches of {size}", requests_per_s=rates_by_size[size]
            )


def _judge(bench: Bench, regime: Regime, found: dict[str, dict[int, list[dict[str, Any]]]]) -> None:
    peers = {name: runs for name, runs in found.items() if not name.startswith(OURS)}
    for clients in bench.sizes.clients[1:]:
        best = max(peers, key=lambda name: _rate(peers[name].get(clients)))
        if not (peer := _rate(peers[best].get(clients))):
            continue
        for name in (OURS, OURS_INT8):
            if name in found:
                ratio = _rate(found[name].get(clients)) / peer
                wanted = f"at least {regime.goal} × the best peer"
                bench.report.judge(
                    f"{regime.task.network}, {clients} clients: {name}", wanted, f"{ratio:.2f} × {best}", ratio >= regime.goal
                )
    ours, bare = found[OURS].get(1), found["bare FastAPI"].get(1)
    if regime is SMALL and ours and bare:
        added = statistics.median(turn["p50_ms"] for turn in ours) - statistics.median(turn["p50_ms"] for turn in bare)
        bench.report.judge("cnn, p50 at 1 client", "at most 2 ms above bare FastAPI's", f"{added:+.1f} ms", added <= 2)


def _rate(turns: list[dict[str, Any]] | None) -> float:
    return statistics.median(turn["requests_per_s"] for turn in turns) if turns else 0.0


# --- Soak -------------------------------------------------------------------------------------------------------


def measure_soak(bench: Bench) -> None:
    """80 % of capacity for a while, in which a version is swapped and a replica killed: no error, flat memory."""
    server = SERVERS[0]
    to_do = replace(LARGE.task, port=_free_port())
    bodies, headers = bench.bodies(LARGE, None)
    url = f"http://127.0.0.1:{to_do.port}{server.path}"
    variables = {TASK: json.dumps(asdict(to_do))}
    with harness.process(sys.executable, "jobs.benchmarks.servers.eagleray_soak", variables) as running:
        _wait_for_answer(running, url, Path(bodies[0]).read_bytes(), headers)
        capacity = harness.run(sys.executable, "jobs.benchmarks.load", json.dumps(asdict(LoadTask(url, bodies, headers, 32, 10.0))))
        rate = 0.8 * capacity["requests_per_s"]
        console.print(f"[dim]soak: {rate:.0f} requests/s for {bench.sizes.soak_s:.0f} s[/]")
        memory = harness.MemorySampler(running.pid, interval_s=2.0)
        running.tell(str(bench.sizes.soak_s))  # it swaps the version at one third, and kills a replica at two thirds
        task = LoadTask(url, bodies, headers, 10_000, bench.sizes.soak_s, rate=rate)
        found = harness.run(sys.executable, "jobs.benchmarks.load", json.dumps(asdict(task)), timeout_s=bench.sizes.soak_s + 120)
        growth = _growth(memory.stop())
        events = [event["event"] for event in running.told()]
    failed = sum(found["failures"].values())
    bench.report.add(
        f"Soak, {LARGE.name}",
        system=OURS,
        requests_per_s=found["requests_per_s"],
        capacity=capacity["requests_per_s"],
        answers=found["answers"],
        failures=str(found["failures"] or 0),
        p50_ms=found["p50_ms"],
        p99_ms=found["p99_ms"],
        memory_growth=f"{growth:+.1%}",
        note="; ".join(events),
    )
    bench.report.judge("soak, failed requests", "none", f"{failed} of {failed + found['answers']}", failed == 0 and len(events) == 2)
    bench.report.judge("soak, memory, last fifth against second", "at most 5 % more", f"{growth:+.1%}", growth <= 0.05)


def _growth(samples: list[int]) -> float:
    """Return by how much the median of the last fifth is above that of the second one."""
    fifth = max(1, len(samples) // 5)
    return statistics.median(samples[-fifth:]) / statistics.median(samples[fifth : 2 * fifth]) - 1


PARTS: dict[str, Callable[[Bench], None]] = {"peers": measure_peers, "soak": measure_soak}


def main() -> None:
    parser = harness.parser("serve", __doc__, quick="one short round with two peers' rows, and no soak")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, help=f"of each server; by default {FULL.rounds}")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else ["peers"] if arguments.quick else list(PARTS)
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as directory:
        sizes = QUICK if arguments.quick else FULL
        bench = Bench(Path(directory), replace(sizes, rounds=arguments.rounds or sizes.rounds))
        for part in parts:
            PARTS[part](bench)
    bench.report.print()
    if arguments.json:
        bench.report.write(arguments.json)


if __name__ == "__main__":
    main()
