"""Training beside the bare PyTorch loop, what checkpoints cost, and the accuracy of a whole run.

    uv run python -m jobs.benchmarks.train [--quick] [--only PART] [--json PATH]

See docs/performance.md for what is measured, and how.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, console
from jobs.benchmarks.pictures import NUM_CLASSES, make_pictures
from jobs.benchmarks.systems.protocol import WriteTask, rotated

from eagleray.config.load import load_job

NUM_WORKERS = torch.cuda.device_count() or 2
BATCH_SIZE_PER_WORKER = 128 if torch.cuda.is_available() else 16
MODEL, IMAGE_SIZE = "resnet50", 224 if torch.cuda.is_available() else 128
FASHION_JOB = harness.REPOSITORY / "jobs" / "train_fashion_mnist.yaml"
FASHION_SOURCE = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    steps_per_epoch: int
    epochs: int
    """An odd number: of those after the first, every other one bears a checkpoint."""
    rounds: int


FULL = Sizes(steps_per_epoch=30, epochs=5, rounds=3)
QUICK = Sizes(steps_per_epoch=6, epochs=3, rounds=1)


@dataclass
class Bench:
    directory: Path
    sizes: Sizes
    report: Report = field(default_factory=Report)

    @property
    def global_batch_size(self) -> int:
        return BATCH_SIZE_PER_WORKER * NUM_WORKERS

    def data(self, name: str, count: int) -> str:
        """Return the URI of `count` pictures as shards, made once."""
        target = self.directory / name
        if not target.exists():
            make_pictures(self.directory / f"{name}-pictures", count)
            task = WriteTask(str(self.directory / f"{name}-pictures"), str(target), count)
            harness.run(sys.executable, "jobs.benchmarks.systems.eagleray", "write", json.dumps(asdict(task)))
        return str(target)

    def train(self) -> dict[str, Any]:
        """Train with eagleray in a new process, with a checkpoint after every second epoch."""
        job = {
            "name": "benchmark",
            "workspace": {"root": tempfile.mkdtemp(dir=self.directory, prefix="workspace-")},
            "data": {
                "train": self.data("train", self.sizes.steps_per_epoch * self.global_batch_size),
                "val": self.data("val", 2 * NUM_CLASSES),
                "image_size": IMAGE_SIZE,
                "lanes": NUM_WORKERS,
            },
            "model": {"name": MODEL},
            "train": {
                "epochs": self.sizes.epochs,
                "checkpoint_every_epochs": 2,
                "global_batch_size": self.global_batch_size,
                "num_workers": NUM_WORKERS,
                "optimizer": {"lr": 0.05},
                "schedule": {"name": "constant", "warmup_epochs": 0},
                "label_smoothing": 0.0,
            },
        }
        return harness.run(sys.executable, "jobs.benchmarks.systems.eagleray_training", json.dumps(job))

    def train_bare(self) -> dict[str, Any]:
        """Train with the bare loop, as many steps."""
        task = {
            "model": MODEL,
            "image_size": IMAGE_SIZE,
            "batch_size": BATCH_SIZE_PER_WORKER,
            "num_classes": NUM_CLASSES,
            "steps": self.sizes.steps_per_epoch * self.sizes.epochs,
        }
        torchrun = ["--standalone", f"--nproc-per-node={NUM_WORKERS}", "-m", "jobs.benchmarks.systems.bare_ddp"]
        return harness.run(sys.executable, "torch.distributed.run", *torchrun, json.dumps(task))


@dataclass(frozen=True)
class Turn:
    """One process.

    Attributes:
        images_per_s: over all steps, from when the first batch is there.
        first_step_s: from the start of the process.
        data_wait_fraction: share of the time after the first batch that was spent waiting for others.
        checkpoint_cost: by how much epochs beside which a checkpoint is written are slower than others, a fraction.
    """

    images_per_s: float
    first_step_s: float
    data_wait_fraction: float | None = None
    checkpoint_cost: float | None = None


def _turn(bench: Bench, run: Callable[[], dict[str, Any]]) -> Turn:
    started = time.time()
    found = run()
    if "epochs" not in found:
        return Turn(found["images_per_s"], found["first_step_ended"] - started)
    epochs, first = found["epochs"], found["epochs"][0]
    pictures = bench.sizes.steps_per_epoch * bench.global_batch_size
    seconds = [pictures / epoch["images_per_s"] for epoch in epochs]
    trained_s = sum(seconds) - first["first_batch_s"]
    waited_s = sum(epoch["data_wait_fraction"] * s for epoch, s in zip(epochs, seconds, strict=True)) - first["first_batch_s"]
    # An epoch reports at its end how long it took.
    first_step_s = first["reported"] - first["epoch_s"] + first["first_batch_s"] + seconds[-1] / bench.sizes.steps_per_epoch - started
    bears, free = (statistics.mean(seconds[number::2]) for number in (2, 1))  # of those after the first
    return Turn(pictures * len(epochs) / trained_s, first_step_s, waited_s / trained_s, bears / free - 1)


def _in_rounds(bench: Bench, title: str, runs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for number in range(bench.sizes.rounds):
        for name, run in rotated(list(runs.items()), number):
            console.print(f"[dim]{title}, round {number + 1} of {bench.sizes.rounds}: {name}[/]")
            turns[name].append(_turn(bench, run))
    return turns


def measure_throughput(bench: Bench) -> None:
    """Images per second of the bare loop and of eagleray, streamed; and by how much a checkpoint slows down the epoch beside which it is written."""
    bench.data("train", bench.sizes.steps_per_epoch * bench.global_batch_size)
    bench.data("val", 2 * NUM_CLASSES)
    ours, bare = "eagleray", "bare PyTorch DDP"
    turns = _in_rounds(bench, "throughput", {bare: bench.train_bare, ours: bench.train})
    _add(bench, f"{MODEL} at {IMAGE_SIZE} px, {NUM_WORKERS} workers, {BATCH_SIZE_PER_WORKER} pictures each", turns)
    ratio = _rate(turns[ours]) / _rate(turns[bare])
    bench.report.judge("images/s of the bare loop's", "at least 0.90", f"{ratio:.2f}", ratio >= 0.9)
    costs = [turn.checkpoint_cost for turn in turns[ours] if turn.checkpoint_cost is not None]
    cost = statistics.median(costs)
    name = f"cost of a checkpoint beside {bench.sizes.steps_per_epoch} steps"
    spread = f"{cost:.1%} ({min(costs):.1%} to {max(costs):.1%})"
    bench.report.judge(name, "under 2 % of the step time", spread, cost < 0.02)


def measure_accuracy(bench: Bench) -> None:
    """A whole run on Fashion-MNIST with the job file as it is: test top-1 of the epoch that is best in validation, and minutes."""
    if not FASHION_SOURCE.exists():
        bench.report.add("Fashion-MNIST", system="eagleray", note="left out: sudo apt-get install dataset-fashion-mnist")
        return
    workspace = bench.directory / "fashion"
    job = load_job(
        FASHION_JOB, [f"workspace.root={workspace}", *(f"data.{split}={workspace}/data/{split}" for split in ("train", "val", "test"))]
    )
    console.print("[dim]Fashion-MNIST: ingest[/]")
    _ingest_fashion(workspace / "data")
    console.print("[dim]Fashion-MNIST: training[/]")
    start = time.time()
    found = harness.run(
        sys.executable, "jobs.benchmarks.systems.eagleray_training", json.dumps(job.model_dump(mode="json")), timeout_s=3600
    )
    minutes = (time.time() - start) / 60
    top1 = found["metrics"]["test_top1"]
    last = found["epochs"][-1]
    bench.report.add(
        "Fashion-MNIST",
        system="eagleray",
        epochs=len(found["epochs"]),
        minutes=minutes,
        images_per_s=statistics.median(epoch["images_per_s"] for epoch in found["epochs"]),
        val_top1=last["val_top1"],
        test_top1=top1,
    )
    bench.report.judge("Fashion-MNIST, test top-1", "at least 93.5 %", f"{top1:.2%}", top1 >= 0.935)
    bench.report.judge("Fashion-MNIST, time", f"at most 20 minutes on {os.cpu_count()} cores", f"{minutes:.1f} minutes", minutes <= 20)


def _ingest_fashion(target: Path) -> None:
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.schema import IngestConfig

    with connected():
        api.ingest(f"idx:{FASHION_SOURCE}", str(target), IngestConfig(split={"val": 0.05}))


def _add(bench: Bench, section: str, turns: dict[str, list[Turn]]) -> None:
    for name, done in turns.items():
        waits = [turn.data_wait_fraction for turn in done if turn.data_wait_fraction is not None]
        rates = [turn.images_per_s for turn in done]
        bench.report.add(
            section,
            system=name,
            images_per_s=_rate(done),
            range=f"{min(rates):.1f}-{max(rates):.1f}",
            waiting_for_data=f"{statistics.median(waits):.1%}" if waits else None,
            first_step_s=statistics.median(turn.first_step_s for turn in done),
        )


def _rate(turns: list[Turn]) -> float:
    return statistics.median(turn.images_per_s for turn in turns)


PARTS: dict[str, Callable[[Bench], None]] = {
    "throughput": measure_throughput,
    "accuracy": measure_accuracy,
}
QUICK_PARTS = ("throughput",)


def main() -> None:
    parser = harness.parser("train", __doc__, quick="one short round of the throughput and nothing else")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, help=f"of the throughput; by default {FULL.rounds}")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else list(QUICK_PARTS if arguments.quick else PARTS)
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as directory:
        sizes = QUICK if arguments.quick else FULL
        bench = Bench(Path(directory), replace(sizes, rounds=arguments.rounds or sizes.rounds))
        for part in parts:
            PARTS[part](bench)
    bench.report.print()
    if arguments.quick:
        console.print(f"--quick: {bench.sizes.rounds} round; figures of the full run are steadier.")
    if arguments.json:
        bench.report.write(arguments.json)


if __name__ == "__main__":
    main()
