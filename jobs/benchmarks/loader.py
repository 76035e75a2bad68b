"""The data plane beside its peers, all in one run: throughput, first batch, memory, scale, shuffling, ingest.

    uv run python -m jobs.benchmarks.loader [--quick] [--only PART] [--json PATH] [--dir DIR]

See docs/performance.md for what is measured, and how.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, TurnError, console
from jobs.benchmarks.pictures import link_pictures, make_pictures
from jobs.benchmarks.shuffle import measure_orders
from jobs.benchmarks.systems.protocol import NUM_WORKERS, ReadTask, WriteTask, rotated

from eagleray import storage
from eagleray.cluster.local_s3 import LocalS3

LOCAL, S3 = "local files", "S3"


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Attributes:
        module: its module in `jobs.benchmarks.systems`.
        form: what it reads: `pictures`, or its own form, named as the module.
        packages: what its environment gets beside torch, torchvision and Pillow in our versions; empty for ourselves.
        decoder: None where the benchmark takes the faster one.
    """

    name: str
    module: str
    form: str
    packages: tuple[str, ...] = ()
    decoder: str | None = None
    note: str = ""

    @property
    def is_peer(self) -> bool:
        return bool(self.packages)


EAGLERAY = System("eagleray", "eagleray", "eagleray", note="own decoder; keeps a local copy of what it reads from S3")
SYSTEMS = (
    EAGLERAY,
    System("torch DataLoader, PIL", "torch_dataloader", "pictures", ("boto3",), "pil"),
    System("torch DataLoader, torchvision", "torch_dataloader", "pictures", ("boto3",), "torchvision"),
    System("WebDataset", "webdataset", "webdataset", ("webdataset", "boto3")),
    System(
        "LitData", "litdata", "litdata", ("litdata",), "torchvision", "its own decoder setting; keeps a local copy of what it reads from S3"
    ),
    System(
        "MosaicML Streaming",
        "mosaicml_streaming",
        "mosaicml_streaming",
        ("mosaicml-streaming>=0.13",),
        note="keeps a local copy of what it reads from S3",
    ),
    System("Ray Data", "ray_data", "pictures", (f"ray[data,train]=={harness.version('ray')}",), "pil", "read_images decodes with PIL"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; timed epochs are made a multiple of the worker processes (see `ReadTask`).

    Attributes:
        own_timed_epochs: of eagleray, whose stream has several windows in work at a time, each of them one of these epochs or
            half of one: over few epochs it would count how many windows happened to be ready.
    """

    count: int
    rounds: int
    timed_epochs: int
    own_timed_epochs: int
    ingest_count: int
    ingest_rounds: int
    memory_counts: tuple[int, int]
    scaling_counts: tuple[int, ...]
    scaling_rounds: int
    storages: tuple[str, ...]


FULL = Sizes(2_000, 3, 4, 16, 10_000, 2, (2_000, 20_000), (2_000, 10_000, 50_000), 2, (LOCAL, S3))
QUICK = Sizes(1_000, 1, 2, 24, 1_000, 1, (1_000, 4_000), (1_000, 4_000), 1, (LOCAL,))


@dataclass
class Bench:
    """A run: its data under `directory`, the systems' environments, and what was found."""

    directory: Path
    sizes: Sizes
    report: Report = field(default_factory=Report)
    pythons: dict[str, Path | str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    faster_decoder: str = "torchvision"
    bucket_uri: str = ""

    def prepare(self) -> None:
        """Make the peers' environments; what cannot be installed is left out, and its row says why."""
        common = [f"{package}=={harness.version(package)}" for package in ("torch", "torchvision", "pillow")]
        self.pythons[EAGLERAY.module] = sys.executable
        for system in SYSTEMS:
            if system.module in self.pythons or not system.is_peer:
                continue
            console.print(f"[dim]environment: {system.module}[/]")
            try:
                python = harness.make_environment(system.module, [*common, *system.packages])
            except TurnError as error:
                self.unusable |= {other.name: str(error) for other in SYSTEMS if other.module == system.module}
                continue
            self.pythons[system.module] = python
            names = [package.split("=")[0].split(">")[0].split("[")[0] for package in (*common, *system.packages)]
            self.report.versions[system.module] = harness.installed_versions(python, names)
        if "torch_dataloader" in self.pythons:
            found = harness.run(self.pythons["torch_dataloader"], "jobs.benchmarks.systems.transform", str(self.pictures(self.sizes.count)))
            self.faster_decoder = found["faster"]

    def usable(self) -> list[System]:
        return [system for system in SYSTEMS if system.name not in self.unusable]

    def pictures(self, count: int) -> Path:
        """Return a folder of `count` pictures; made once."""
        directory = self.directory / f"pictures-{count}"
        if not directory.exists():
            console.print(f"[dim]{count:,} pictures[/]")
            with _published(directory) as temporary:
                if count <= self.sizes.count:
                    make_pictures(temporary, count)
                else:
                    link_pictures(self.pictures(self.sizes.count), self.sizes.count, temporary, count)
        return directory

    def data(self, system: System, storage_name: str, count: int) -> str:
        """Return the URI of `count` pictures in the form that `system` reads; written and uploaded once."""
        path = self.pictures(count) if system.form == "pictures" else self.directory / f"{system.form}-{count}"
        if not path.exists():
            with _published(path) as temporary:
                self.write(system, count, temporary)
        if storage_name == LOCAL:
            return str(path)
        uri = storage.join(self.bucket_uri, path.name)
        if not storage.exists(uri):
            _upload(path, uri)
        return uri

    def write(self, system: System, count: int, target: Path) -> float:
        """Write `count` pictures in the system's own form; return the seconds it took."""
        task = WriteTask(str(self.pictures(count)), str(target), count)
        return float(self._run(system, "write", task)["seconds"])

    def read(
        self, system: System, storage_name: str, count: int, timed_epochs: int, *, shuffle: bool = True, measure_memory: bool = False
    ) -> Turn:
        """Let a system go through its data once untimed and `timed_epochs` times timed, in a new process.

        Raises:
            TurnError: it failed, or our own did not give every picture once an epoch.
        """
        uri = self.data(system, storage_name, count)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="cache-") as cache_dir:
            task = ReadTask(uri, count, -(-timed_epochs // NUM_WORKERS) * NUM_WORKERS, cache_dir, self.decoder(system), shuffle)
            started = time.time()
            found = self._run(system, "read", task, measure_memory=measure_memory)
        turn = Turn(count, found["first_epoch_ended"] - started, found["epochs"], found.get("peak_memory"))
        if not system.is_peer and turn.miscounts():
            raise SystemExit(f"eagleray did not give each of {count} pictures once an epoch: {turn.miscounts()}")
        return turn

    def decoder(self, system: System) -> str:
        return system.decoder or self.faster_decoder

    def _run(self, system: System, verb: str, task: ReadTask | WriteTask, *, measure_memory: bool = False) -> dict[str, Any]:
        module = f"jobs.benchmarks.systems.{system.module}"
        return harness.run(self.pythons[system.module], module, verb, json.dumps(asdict(task)), measure_memory=measure_memory)


def _upload(directory: Path, uri: str) -> None:
    """Copy files and nothing else: `storage.copy_tree` also makes empty objects for folders, which peers take for data."""
    import boto3

    client, place = boto3.client("s3"), urlsplit(uri)
    files = [path for path in directory.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        prefix = place.path.lstrip("/")
        list(pool.map(lambda path: client.upload_file(str(path), place.netloc, f"{prefix}/{path.relative_to(directory)}"), files))


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Give a place to write to, which becomes `path` only if all went well."""
    temporary = path.with_name(f"{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    temporary.rename(path)


@dataclass(frozen=True)
class Turn:
    """What one process did: `epochs` are those of `protocol.Epoch`, the first of them untimed."""

    count: int
    first_epoch_s: float
    epochs: list[dict[str, float]]
    peak_memory: int | None

    @property
    def images_per_s(self) -> float:
        """Different pictures per second over all timed epochs."""
        timed = self.epochs[1:]
        return sum(epoch["distinct"] for epoch in timed) / sum(epoch["seconds"] for epoch in timed)

    @property
    def first_batches_s(self) -> list[float]:
        return [epoch["first_batch_s"] for epoch in self.epochs[1:]]

    def miscounts(self) -> str:
        """Say what is missing and what came twice, in the worst epoch; empty if every picture came once."""
        missing = max(self.count - epoch["distinct"] for epoch in self.epochs)
        repeated = max(epoch["delivered"] - epoch["distinct"] for epoch in self.epochs)
        return f"leaves out {missing:.0f} and repeats {repeated:.0f} of {self.count} pictures" if missing or repeated else ""


Job = tuple[System, str, Callable[[], None]]
"""(whose, what is told beside its name, what to do)."""


def in_rounds(title: str, rounds: int, jobs: list[Job]) -> dict[tuple[str, str], str]:
    """Do every job once a round, beginning with another one each time.

    Returns:
        (system, place) → why it failed; it is left out from then on.
    """
    failures: dict[tuple[str, str], str] = {}
    for number in range(rounds):
        for system, place, job in rotated(jobs, number):
            if (system.name, place) in failures:
                continue
            console.print(f"[dim]{title}, round {number + 1} of {rounds}: {system.name}, {place}[/]")
            try:
                job()
            except TurnError as error:
                if not system.is_peer:
                    raise SystemExit(f"eagleray: {error}") from None
                failures[system.name, place] = str(error)
    return failures


def measure_loader(bench: Bench) -> None:
    """Throughput of every system on both storages, beside what the bare kernel can do."""
    sizes = bench.sizes
    turns: dict[tuple[str, str], list[Turn]] = {}
    bounds: list[float] = []

    def measure_bound() -> None:
        task = {"uri": bench.data(EAGLERAY, LOCAL, sizes.count), "passes": sizes.timed_epochs}
        bounds.append(harness.run(sys.executable, "jobs.benchmarks.systems.kernel_bound", json.dumps(task))["images_per_s"])

    def measure(system: System, place: str) -> None:
        timed_epochs = sizes.timed_epochs if system.is_peer else sizes.own_timed_epochs
        turns.setdefault((system.name, place), []).append(bench.read(system, place, sizes.count, timed_epochs))

    jobs = [(system, place, lambda s=system, p=place: measure(s, p)) for place in sizes.storages for system in bench.usable()]
    failures = in_rounds("throughput", sizes.rounds, [(EAGLERAY, "bare kernel", measure_bound), *jobs])

    bound = statistics.median(bounds)
    bench.report.add(
        "Throughput",
        system=f"bound: bare kernel on {NUM_WORKERS} cores",
        storage="in memory",
        images_per_s=bound,
        range=_range(bounds),
        of_bound=1.0,
    )
    for place in sizes.storages:
        done_here = {name: done for (name, where), done in turns.items() if where == place and (name, place) not in failures}
        rates = {name: _median(done, "images_per_s") for name, done in done_here.items()}
        peers = {name: rate for name, rate in rates.items() if name != EAGLERAY.name}
        best = max(peers, key=lambda name: peers[name]) if peers else None
        for system in SYSTEMS:
            done = done_here.get(system.name)
            if done is None:
                reason = bench.unusable.get(system.name) or failures[system.name, place]
                bench.report.add("Throughput", system=system.name, storage=place, note=reason)
                continue
            bench.report.add(
                "Throughput",
                system=system.name,
                storage=place,
                images_per_s=rates[system.name],
                range=_range([turn.images_per_s for turn in done]),
                times_best_peer=rates[system.name] / peers[best] if best else None,
                of_bound=rates[system.name] / bound,
                first_batch_s=statistics.median(seconds for turn in done for seconds in turn.first_batches_s),
                first_epoch_with_start_s=_median(done, "first_epoch_s"),
                decoder="own" if not system.is_peer else bench.decoder(system),
                note="; ".join(filter(None, [system.note, next(filter(None, (turn.miscounts() for turn in done)), "")])),
            )
        ours = rates[EAGLERAY.name]
        if best:
            ratio = ours / peers[best]
            bench.report.judge(f"throughput, {place}", "at least 1.3 × the best peer", f"{ratio:.2f} × {best}", ratio >= 1.3)
        bench.report.judge(f"share of the bound, {place}", "at least 85 %", f"{ours / bound:.1%}", ours / bound >= 0.85)
        slowest = max(seconds for turn in turns[EAGLERAY.name, place] for seconds in turn.first_batches_s)
        bench.report.judge(f"first batch from the second epoch on, {place}", "at most 1 s, every time", f"{slowest:.2f} s", slowest <= 1.0)


def measure_ingest(bench: Bench) -> None:
    """From a folder of pictures to each system's own form, on the local disk."""
    count, rates = bench.sizes.ingest_count, dict[str, list[float]]()

    def measure(system: System) -> None:
        kept = bench.directory / f"{system.form}-{count}"
        target = kept.with_name(f"{kept.name}.again")
        shutil.rmtree(target, ignore_errors=True)
        rates.setdefault(system.name, []).append(count / bench.write(system, count, target))
        if kept.exists():
            shutil.rmtree(target)
        else:
            target.rename(kept)

    bench.pictures(count)
    jobs = [(system, LOCAL, lambda s=system: measure(s)) for system in bench.usable() if system.form != "pictures"]
    failures = in_rounds("ingest", bench.sizes.ingest_rounds, jobs)
    for system in SYSTEMS:
        if system.form == "pictures":
            continue
        reason = bench.unusable.get(system.name) or failures.get((system.name, LOCAL))
        if reason is not None:
            bench.report.add("Ingest", system=system.name, note=reason)
            continue
        note = "copies the files unseen" if system.is_peer else "decodes every picture once, to refuse what cannot be read"
        found = rates[system.name]
        bench.report.add(
            "Ingest", system=system.name, pictures=count, images_per_s=statistics.median(found), range=_range(found), note=note
        )


def measure_memory(bench: Bench) -> None:
    """Peak memory of the whole tree of processes; ours with a small and a large data set, as many pictures seen of either."""
    small, large = bench.sizes.memory_counts
    peaks = {}
    for count, epochs in ((small, large // small * NUM_WORKERS), (large, NUM_WORKERS)):
        console.print(f"[dim]memory: eagleray, {count:,} pictures[/]")
        turn = bench.read(EAGLERAY, LOCAL, count, epochs, measure_memory=True)
        assert turn.peak_memory is not None
        peaks[count] = turn.peak_memory
        bench.report.add("Memory", system=EAGLERAY.name, pictures=count, peak_mb=turn.peak_memory / 1e6)
    for system in bench.usable():
        if not system.is_peer:
            continue
        console.print(f"[dim]memory: {system.name}, {small:,} pictures[/]")
        try:
            turn = bench.read(system, LOCAL, small, NUM_WORKERS, measure_memory=True)
        except TurnError as error:
            bench.report.add("Memory", system=system.name, pictures=small, note=str(error))
            continue
        assert turn.peak_memory is not None
        bench.report.add("Memory", system=system.name, pictures=small, peak_mb=turn.peak_memory / 1e6)
    growth = peaks[large] / peaks[small] - 1
    bench.report.judge(f"memory for {large:,} pictures against {small:,}", "within 10 %", f"{growth:+.1%}", abs(growth) <= 0.1)


def measure_scaling(bench: Bench) -> None:
    """Cost per picture at several sizes of the data set; equally many pictures are timed at each."""
    counts = bench.sizes.scaling_counts
    turns: dict[int, list[Turn]] = {count: [] for count in counts}

    def measure(count: int) -> None:
        turns[count].append(bench.read(EAGLERAY, LOCAL, count, max(counts) * NUM_WORKERS // count))

    jobs = [(EAGLERAY, f"{count:,} pictures", lambda c=count: measure(c)) for count in counts]
    in_rounds("scale", bench.sizes.scaling_rounds, jobs)
    costs = {count: 1e6 / _median(turns[count], "images_per_s") for count in counts}
    for count, cost in costs.items():
        rates = [turn.images_per_s for turn in turns[count]]
        bench.report.add("Scale", system=EAGLERAY.name, pictures=count, us_per_picture=cost, images_per_s=1e6 / cost, range=_range(rates))
    growth = max(costs.values()) / min(costs.values()) - 1
    bench.report.judge(
        f"cost per picture from {min(counts):,} to {max(counts):,}", "flat within 10 %", f"{growth:.1%} apart", growth <= 0.1
    )


def measure_shuffle(bench: Bench) -> None:
    """What shuffling costs, and how well it mixes."""
    sizes = bench.sizes
    turns: dict[tuple[str, bool], list[Turn]] = {}

    def measure(place: str, shuffle: bool) -> None:
        turn = bench.read(EAGLERAY, place, sizes.count, sizes.own_timed_epochs, shuffle=shuffle)
        turns.setdefault((place, shuffle), []).append(turn)

    jobs = [
        (EAGLERAY, f"{place}, {'shuffled' if shuffle else 'unshuffled'}", lambda p=place, s=shuffle: measure(p, s))
        for place in sizes.storages
        for shuffle in (True, False)
    ]
    in_rounds("shuffling", sizes.rounds, jobs)
    for place in sizes.storages:
        rates = {shuffle: _median(turns[place, shuffle], "images_per_s") for shuffle in (True, False)}
        for shuffle, rate in rates.items():
            name = "eagleray, shuffled" if shuffle else "eagleray, unshuffled"
            found = [turn.images_per_s for turn in turns[place, shuffle]]
            bench.report.add("Cost of shuffling", system=name, storage=place, images_per_s=rate, range=_range(found))
        ratio = rates[True] / rates[False]
        bench.report.judge(f"shuffled against unshuffled, {place}", "at least 90 %", f"{ratio:.1%}", ratio >= 0.9)
    orders = measure_orders()
    full = orders["full shuffle"]
    for name, found in orders.items():
        bench.report.add(
            "Mixing, 1,281,167 pictures of 1,000 classes, batches of 1,024",
            system=name,
            neighbour_distance=found.neighbour_distance,
            of_full_shuffle=found.neighbour_distance / full.neighbour_distance,
            class_distance_of_a_batch=found.class_distance,
        )


PARTS: dict[str, Callable[[Bench], None]] = {
    "loader": measure_loader,
    "ingest": measure_ingest,
    "memory": measure_memory,
    "scaling": measure_scaling,
    "shuffle": measure_shuffle,
}
ON_S3 = ("loader", "shuffle")
QUICK_PARTS = ("loader", "shuffle")


def _median(turns: list[Turn], figure: str) -> float:
    return statistics.median(getattr(turn, figure) for turn in turns)


def _range(values: list[float]) -> str:
    return f"{min(values):,.0f}-{max(values):,.0f}" if len(values) > 1 else "one turn"


@contextmanager
def _store(directory: Path, is_needed: bool) -> Iterator[str]:
    """Run an empty S3 store for the block and give a bucket's URI; our environment, and so every process's, finds it."""
    if not is_needed:
        yield ""
        return
    shutil.rmtree(directory, ignore_errors=True)
    with LocalS3(directory) as server:
        os.environ.update(server.environment())
        yield server.create_bucket("benchmark")


def main() -> None:
    parser = harness.parser("loader", __doc__, quick="throughput and shuffling alone: 1,000 pictures, local files, one round")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--dir", type=Path, help="keep the pictures and data sets there, and use those that are there")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    parts = [arguments.only] if arguments.only else list(QUICK_PARTS if arguments.quick else PARTS)
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as temporary:
        directory = (arguments.dir or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        bench = Bench(directory, sizes)
        with _store(directory / "s3", S3 in sizes.storages and any(part in ON_S3 for part in parts)) as bench.bucket_uri:
            bench.prepare()
            for part in parts:
                PARTS[part](bench)
    bench.report.print()
    if arguments.quick:
        console.print(f"--quick: {QUICK.count} pictures and {QUICK.rounds} round; figures of the full run are steadier.")
    if arguments.json:
        bench.report.write(arguments.json)


if __name__ == "__main__":
    main()
