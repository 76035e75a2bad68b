"""A plan past one machine: what bounds training on 8, 64 and 512 GPUs, by a model that is checked against real runs.

    uv run python -m jobs.benchmarks.scale [--quick] [--gpu NAME] [--set KEY=VALUE] [--json PATH]

See docs/scale.md for the terms, what is measured and what is assumed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jobs.benchmarks import harness
from jobs.benchmarks.harness import Report, console
from jobs.benchmarks.pictures import NUM_CLASSES, make_pictures
from jobs.benchmarks.shuffle import ROWS_PER_GROUP
from jobs.benchmarks.simulator import Cluster, CoreCosts, Estimate, Workload, elastic, simulate, step_on_cores, with_needs_met
from jobs.benchmarks.systems.protocol import WriteTask
from torchvision.models import get_model

from eagleray.artifacts.checkpoint import dump_state
from eagleray.cluster.description import Machine, known_machines
from eagleray.data.plan import EpochPlan
from eagleray.data.shards import Manifest, ShardInfo, load_manifest
from eagleray.training.resources import share_resources

GPU_COUNTS = (8, 64, 512)
IMAGENET_PICTURES = 1_281_167
ERROR_GOAL = 0.15


@dataclass(frozen=True)
class Gpu:
    """What others say of a GPU and the nodes it comes in; nothing of it was measured for this table."""

    images_per_s: float
    images_per_s_of_8: float
    node: Machine
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    source: str


NVIDIA_TABLE = "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, mixed precision, 1 and 8 GPUs"


def gpus() -> dict[str, Gpu]:
    """Return the table of GPUs: ResNet-50 training at 224 px, links at 80 % of what their makers say."""
    p4d, p3 = known_machines()["aws"]["p4d.24xlarge"], Machine(cpus=64, memory_gb=488, gpus=8, gpu="V100", usd_per_hour=24.48)
    return {
        "A100": Gpu(
            2470, 16_621, p4d, 0.8 * 300e9, 0.8 * 50e9, f"{NVIDIA_TABLE} (DGX A100); p4d.24xlarge: NVLink 600 GB/s both ways, 400 Gbit/s"
        ),
        "V100": Gpu(
            1200, 8_322, p3, 0.8 * 150e9, 0.8 * 3.1e9, f"{NVIDIA_TABLE} (DGX-1); p3.16xlarge: NVLink 300 GB/s both ways, 25 Gbit/s"
        ),
    }


ROW_GROUP_BYTES = 2e6
ASSUMED = {
    "picture_bytes": (147_897_477_120 / IMAGENET_PICTURES, "ILSVRC2012_img_train.tar, bytes over pictures"),
    "max_batch_per_gpu": (256, "DeepLearningExamples' batch per GPU"),
    "max_global_batch": (32_768, "You et al. 2018, arXiv:1709.05011: with LARS no loss of accuracy up to 32K"),
    "hop_s": (20e-6, "a message over the network, no source: a guess"),
    "storage_bytes_per_s": (5_500 * ROW_GROUP_BYTES, "Amazon S3 guide: 5,500 GET/s per prefix, times a row group of 2 MB"),
    "upload_bytes_per_s": (90e6, "Amazon S3 guide: 85-90 MB/s per request, one request at a time"),
    "head_usd_per_hour": (known_machines()["aws"]["m7i.2xlarge"].usd_per_hour, "m7i.2xlarge, as cluster/cluster.yaml"),
}
"""Public figures and guesses by setting, each with its source; `--set` overrides them, and what was measured too."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured, of a job small enough for these cores."""

    steps_per_epoch: int
    timed_epochs: int
    rounds: int
    model: str = "resnet18"
    image_size: int = 128
    batch_size: int = 16
    workers: int = 2


FULL = Sizes(steps_per_epoch=24, timed_epochs=2, rounds=2)
QUICK = Sizes(steps_per_epoch=10, timed_epochs=1, rounds=1)


@dataclass
class Bench:
    directory: Path
    sizes: Sizes
    report: Report = field(default_factory=Report)

    def data(self, name: str, count: int) -> str:
        """Return the URI of `count` pictures as shards, made once."""
        target = self.directory / name
        if not target.exists():
            make_pictures(self.directory / f"{name}-pictures", count)
            task = WriteTask(str(self.directory / f"{name}-pictures"), str(target), count)
            harness.run(sys.executable, "jobs.benchmarks.systems.eagleray", "write", json.dumps(asdict(task)))
        return str(target)

    def step_s(self, workers: int) -> float:
        """Train with eagleray on one core per worker, in a new process; return the mean seconds of a step, without the first epoch."""
        sizes = self.sizes
        job = {
            "name": "scale",
            "workspace": {"root": tempfile.mkdtemp(dir=self.directory, prefix="workspace-")},
            "data": {
                "train": self.data("train", sizes.steps_per_epoch * sizes.batch_size * sizes.workers),
                "val": self.data("val", NUM_CLASSES),
                "image_size": sizes.image_size,
                "lanes": workers,
            },
            "model": {"name": sizes.model},
            "train": {
                "epochs": 1 + sizes.timed_epochs,
                "global_batch_size": sizes.batch_size * workers,
                "num_workers": workers,
                "use_gpu": False,
                "optimizer": {"lr": 0.05},
                "schedule": {"name": "constant", "warmup_epochs": 0},
                "label_smoothing": 0.0,
                "checkpoint_every_epochs": 1 + sizes.timed_epochs,
            },
        }
        found = harness.run(sys.executable, "jobs.benchmarks.systems.eagleray_training", json.dumps(job), str(workers))
        return statistics.mean(sizes.batch_size * workers / epoch["images_per_s"] for epoch in found["epochs"][1:])

    def core_costs(self) -> dict[str, float]:
        sizes = self.sizes
        task = {
            "model": sizes.model,
            "image_size": sizes.image_size,
            "batch_size": sizes.batch_size,
            "num_classes": NUM_CLASSES,
            "steps": 12,
        }
        torchrun = ["--standalone", f"--nproc-per-node={sizes.workers}", "-m", "jobs.benchmarks.systems.core_costs"]
        return harness.run(sys.executable, "torch.distributed.run", *torchrun, json.dumps(task))


def measure(bench: Bench) -> dict[str, float]:
    """Return what this machine can tell of the settings of a cluster: rates of decoding, planning, dumping, and Ray's tasks."""
    uri = bench.data("train", bench.sizes.steps_per_epoch * bench.sizes.batch_size * bench.sizes.workers)
    console.print("[dim]measuring: decoding, the plan, a checkpoint's copy, tasks[/]")
    decoded = harness.run(sys.executable, "jobs.benchmarks.systems.kernel_bound", json.dumps({"uri": uri, "passes": 3}))
    network = get_model("resnet50")
    gradient_bytes = 4.0 * sum(parameter.numel() for parameter in network.parameters())
    momentum = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    start = time.perf_counter()
    dumped = len(dump_state({"model": network.state_dict(), "optimizer": momentum}))
    dump_s = time.perf_counter() - start
    best = len(dump_state({"weights": network.state_dict()}))
    manifest = load_manifest(uri)
    found = {
        "images_per_s_per_core": decoded["images_per_s"] / (harness.machine()["cores"] or 1),
        "plan_s_per_picture": plan_s_per_picture(),
        "dump_bytes_per_s": dumped / dump_s,
        "tasks_per_s": harness.run(sys.executable, "jobs.benchmarks.systems.head_rate")["tasks_per_s"],
        "gradient_bytes": gradient_bytes,
        "checkpoint_bytes": float(dumped + best),
    }
    for name, value in found.items():
        bench.report.add("Measured here", setting=name, value=f"{value:.4g}")
    size = sum(shard.size_bytes for shard in manifest.shards) / sum(shard.rows for shard in manifest.shards)
    bench.report.add("Measured here", setting="bytes of a benchmark's picture in a shard", value=f"{size:.4g}")
    return found


def plan_s_per_picture(global_batch: int = 32_768) -> float:
    """Return the seconds to compute the order of a window, per picture in it, of a data set of ImageNet's size."""
    groups = [min(ROWS_PER_GROUP, IMAGENET_PICTURES - start) for start in range(0, IMAGENET_PICTURES, ROWS_PER_GROUP)]
    shard = ShardInfo(path="-", rows=IMAGENET_PICTURES, size_bytes=0, sha256="", row_group_rows=groups, class_counts={})
    plan = EpochPlan.of(Manifest(classes=[], shards=[shard], source="-"), global_batch, 512, None, seed=0)
    plan.rank_window(0, 0, 0, 512)  # what a plan keeps
    start = time.perf_counter()
    pictures = plan.rank_window(0, 1, 0, 512).sample_ids.size * 512
    return (time.perf_counter() - start) / pictures


def check(bench: Bench, images_per_s_per_core: float) -> None:
    """Predict a run of several workers from one with one worker and from costs measured by themselves, then run it."""
    console.print("[dim]check: costs of a step, each by itself[/]")
    parts = bench.core_costs()
    steps: dict[int, list[float]] = {1: [], bench.sizes.workers: []}
    for number in range(bench.sizes.rounds):
        for workers, found in steps.items():
            console.print(f"[dim]check, round {number + 1} of {bench.sizes.rounds}: {workers} worker(s)[/]")
            found.append(bench.step_s(workers))
    one, several = (statistics.median(seconds) for seconds in steps.values())
    images = bench.sizes.batch_size * bench.sizes.workers
    costs = CoreCosts(
        compute_s=parts["alone_s"],
        contention=parts["together_s"] / parts["alone_s"],
        decode_s=bench.sizes.batch_size / images_per_s_per_core,
        other_s=one - parts["alone_s"],
        allreduce_s=parts["allreduce_s"],
    )
    for name, value in asdict(costs).items():
        bench.report.add("Costs of a step on one core, s (contention: a ratio)", cost=name, value=f"{value:.4f}")
    predicted = step_on_cores(costs)
    error = several / predicted - 1  # of the rate: predicted images/s over measured, less 1
    title = f"{bench.sizes.model} at {bench.sizes.image_size} px on cores, {bench.sizes.batch_size} pictures a worker, images/s"
    bench.report.add(title, workers=1, measured=bench.sizes.batch_size / one)
    ideal = bench.sizes.workers * bench.sizes.batch_size / one
    bench.report.add(title, workers=bench.sizes.workers, measured=images / several, predicted=images / predicted, perfect_scaling=ideal)
    name = f"images/s of {bench.sizes.workers} workers, predicted against measured"
    bench.report.judge(name, f"within {ERROR_GOAL:.0%}", f"{error:+.1%}", abs(error) <= ERROR_GOAL)


def settings(measured: dict[str, float], gpu: Gpu, overrides: dict[str, float]) -> tuple[Workload, Cluster]:
    """Return the run and the cluster from what was measured, what is assumed, and what the user knows better."""
    node = gpu.node
    share = share_resources({"CPU": node.cpus, "GPU": node.gpus}, node.gpus, True).train_decode
    values: dict[str, Any] = {
        "pictures": IMAGENET_PICTURES,
        "epochs": 90,
        "row_groups": -(-IMAGENET_PICTURES // ROWS_PER_GROUP),
        "gpus_per_node": node.gpus,
        "images_per_s_per_gpu": gpu.images_per_s,
        "decode_cores_per_gpu": share.tasks * share.cpus,
        "nvlink_bytes_per_s": gpu.nvlink_bytes_per_s,
        "network_bytes_per_s": gpu.network_bytes_per_s,
        "usd_per_node_hour": node.usd_per_hour,
        **{name: value for name, (value, _) in ASSUMED.items()},
        **measured,
    }
    whole = {name for name, value in values.items() if isinstance(value, int)}
    values |= {name: int(value) if name in whole else value for name, value in overrides.items()}
    work, cluster = ({item.name: values[item.name] for item in fields(kind)} for kind in (Workload, Cluster))
    return Workload(**work), Cluster(**cluster)


def plan(report: Report, work: Workload, cluster: Cluster) -> None:
    """Add the tables: each size of cluster as it is, what it would need, as it is with that, and an elastic run."""
    found = {count: simulate(work, cluster, count) for count in GPU_COUNTS}
    for estimate in found.values():
        _add(report, "The cluster as it is", work, estimate)
    for count, estimate in found.items():
        report.add(
            "Needed, so that GPUs are the bound",
            gpus=count,
            decode_cores_per_gpu=estimate.decode_cores_per_gpu_needed,
            of_them_there=cluster.decode_cores_per_gpu,
            decode_cores_in_all=estimate.decode_cores_per_gpu_needed * count,
            storage_gb_per_s=estimate.storage_bytes_per_s_needed / 1e9,
            storage_there=cluster.storage_bytes_per_s / 1e9,
        )
    for count, estimate in found.items():
        _add(
            report, "With cores and storage as needed, at the nodes' price", work, simulate(work, with_needs_met(cluster, estimate), count)
        )
    small, large = found[GPU_COUNTS[0]], found[GPU_COUNTS[1]]
    hours, usd = elastic([(0.5, small), (0.5, large)])
    report.add("Elastic: half of the pictures on each", gpus=f"{small.gpus} and {large.gpus}", hours=hours, usd=usd)


def _add(report: Report, section: str, work: Workload, estimate: Estimate) -> None:
    report.add(
        section,
        gpus=estimate.gpus,
        batch=work.batch_per_gpu(estimate.gpus) * estimate.gpus,
        images_per_s=estimate.images_per_s,
        step_ms=1000 * estimate.step_s,
        **{resource: f"{estimate.share(resource):.1%}" for resource in estimate.waits},
        bottleneck=estimate.bottleneck,
        hours=estimate.hours,
        usd=estimate.usd,
    )


def parse_setting(text: str) -> tuple[str, float]:
    """Return the name and the number of `KEY=VALUE`. Raises ValueError if it is none, or no setting has that name."""
    name, _, value = text.partition("=")
    known = sorted(item.name for kind in (Workload, Cluster) for item in fields(kind))
    if name not in known:
        raise ValueError(f"--set {text}: no setting is named '{name}'; those that are: {', '.join(known)}")
    return name, float(value)


def main() -> None:
    parser = harness.parser("scale", __doc__, quick="one short round of the check; the plan is the same")
    parser.add_argument("--gpu", choices=gpus(), default="A100", help="a row of the table of public figures")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another figure, say images_per_s_per_gpu=3000")
    arguments = parser.parse_args()
    try:
        overrides = dict(parse_setting(text) for text in arguments.set)
    except ValueError as error:
        parser.error(str(error))
    gpu = gpus()[arguments.gpu]
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as directory:
        bench = Bench(Path(directory), QUICK if arguments.quick else FULL)
        measured = measure(bench)
        check(bench, measured["images_per_s_per_core"])
    bench.report.add("Assumed", setting=f"{arguments.gpu}: images_per_s_per_gpu", value=f"{gpu.images_per_s:.4g}", note=gpu.source)
    for name, (value, source) in ASSUMED.items():
        bench.report.add("Assumed", setting=name, value=f"{value:.4g}", note=source)
    for name, value in overrides.items():
        bench.report.add("Set by --set, in place of the above", setting=name, value=f"{value:.4g}")
    work, cluster = settings(measured, gpu, overrides)
    of_8 = simulate(work, cluster, 8).images_per_s
    published = {"published": gpu.images_per_s_of_8, "simulated": of_8, "difference": f"{of_8 / gpu.images_per_s_of_8 - 1:+.1%}"}
    bench.report.add(f"8 x {arguments.gpu}, images/s, beside what NVIDIA publishes", gpus=8, **published)
    plan(bench.report, work, cluster)
    bench.report.print()
    if arguments.quick:
        console.print(f"--quick: {QUICK.rounds} round; figures of the full run are steadier.")
    if arguments.json:
        bench.report.write(arguments.json)


if __name__ == "__main__":
    main()
