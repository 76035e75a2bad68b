"""`eagleray quickstart`: the platform's main job, from pictures to an A/B-tested endpoint, on one machine.

It uses the public verbs alone, so it also shows how to use them from Python.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray import api, storage
from eagleray.config.load import load_job, with_values
from eagleray.errors import ConfigError, DataError
from eagleray.ports import check_port_free

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

    from eagleray.artifacts.registry import ModelVersion
    from eagleray.config.schema import JobConfig
    from eagleray.tuning.search import SearchResult, TrialResult

BUCKET = "quickstart"
VARIANTS = ("champion", "challenger")


class Stages:
    """Prints and times the stages of the way."""

    def __init__(self, console: Console, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console
        self._total = total

    @contextmanager
    def __call__(self, name: str, title: str) -> Iterator[None]:
        self._console.print(f"\n[bold]{len(self.seconds) + 1}/{self._total} {title}[/]")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self._console.print(f"[dim]  {self.seconds[name]:.1f} s[/]")


def run_quickstart(
    console: Console,
    *,
    data: str | None,
    directory: Path | None,
    use_s3: bool,
    address: str | None,
    port: int,
    stay: bool,
    json_path: Path | None,
    overrides: list[str],
) -> dict[str, Any]:
    """Go the whole way and return the summary; serve on until Ctrl-C if `stay`.

    Args:
        data: folder with one sub-folder of pictures per class; None: scikit-learn's handwritten digits.
        directory: a folder that does not exist yet or is empty; None: a new one named after the time.

    Raises:
        EagleRayError: the input cannot be used; nothing is left half-written.
    """
    from eagleray.cli import TrialsProgress, epoch_line, wait_for_interrupt
    from eagleray.cluster.connect import check_address, connected

    started = time.perf_counter()
    check_port_free("127.0.0.1", port)
    if address is not None:
        check_address(address)
    root = _new_directory(directory)
    store_uri = f"s3://{BUCKET}" if use_s3 else str(root)
    data_uri = storage.join(store_uri, "data")
    job = _build_job(root, store_uri, data, port=port, overrides=overrides)
    stages = Stages(console, total=7)
    with ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        with stages("prepare", "pictures and storage"):
            pictures = data if data is not None else str(write_digits(root / "pictures"))
            if use_s3:
                _start_s3(stack, root)
            console.print(f"  pictures {pictures}\n  shards   {data_uri}\n  runs     {job.workspace.runs_uri}")
        with stages("ray", "Ray"):
            cluster = stack.enter_context(connected(address, needs=api.TRAINING_LIBRARIES))
            console.print(
                f"  {'started on this machine' if cluster.is_local else 'joined'} at {cluster.address}; full logs in {cluster.log_dir}"
            )
            session = _write_session(root, job, cluster.address, use_s3)
        with stages("ingest", "ingest: pictures → shards and manifest"):
            manifests = api.ingest(pictures, data_uri, job.ingest, seed=job.seed)
            for split, manifest in manifests.items():
                console.print(
                    f"  {split:<6} {manifest.num_rows:>6,} pictures, {len(manifest.classes)} classes, {len(manifest.shards)} shard(s), {manifest.num_refused} refused"
                )
        title = f"tune: {job.tune.num_trials if job.tune else 0} trials, Ray Tune + Optuna, ASHA"
        with stages("tune", title), TrialsProgress(console, job.tune) as progress:
            search = api.tune(job, on_trial=progress.update)
        with stages("train", f"train: the winner, {search.best.family}, by DDP on {job.train.max_workers} workers"):
            trained = api.train(search.job, alias="champion", on_epoch=lambda m: console.print("  " + epoch_line(m, job.train.epochs)))
        with stages("register", "register: champion and challenger"):
            runner_up = _runner_up(search)
            challenger = api.register_trial(search, runner_up, alias="challenger")
            for alias, version in zip(VARIANTS, (trained.version, challenger), strict=True):
                console.print(
                    f"  {alias:<10} {version.reference}  {version.tags['architecture']}  held-out top-1 {100 * float(version.tags['test_top1']):.1f} %"
                )
        from eagleray.serving import endpoint

        with stages("serve", "serve: A/B test over HTTP, the held-out pictures as client requests"):
            references = {"champion": trained.version.reference, "challenger": challenger.reference}
            url = api.serve(job.workspace, references, job.serve)
            stack.callback(endpoint.shutdown)
            results = _send_held_out(url, job, manifests["test"].classes)
            report = api.ab_status(job.workspace, job.name, address=None)
        summary = _summary(
            stages, time.perf_counter() - started, search, trained.version, challenger, results, url, root, trained.training.run_uri
        )
        if json_path is not None:
            storage.write_bytes(str(json_path), (json.dumps(summary, indent=2) + "\n").encode())
        _print_summary(console, summary, report, job, manifests["test"].classes)
        if stay:
            console.print(f"\nServing until Ctrl-C. Settings for a second terminal: set -a; . {session}")
            wait_for_interrupt()
            console.print("stopping …")
    return summary


def write_digits(directory: Path) -> Path:
    """Write scikit-learn's 1,797 handwritten digits (8×8 grey, UCI) as PNG files, one folder per digit."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = directory / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return directory


def _new_directory(directory: Path | None) -> Path:
    if directory is None:
        directory = Path(api.new_run_name("quickstart"))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--dir '{directory}' already holds something, perhaps another run; choose a new folder or delete it")
    return directory.resolve()


def _start_s3(stack: ExitStack, root: Path) -> None:
    """Start the store; this process and its cluster find it through the environment."""
    from eagleray.cluster.local_s3 import LocalS3

    store = stack.enter_context(LocalS3(root / "s3"))
    os.environ.update(store.environment())
    store.create_bucket(BUCKET)


def _write_session(root: Path, job: JobConfig, address: str, use_s3: bool) -> Path:
    """Write the settings with which a second terminal finds workspace, cluster and store, and return the file's path."""
    from eagleray.cluster.local import write_settings

    settings = {
        "EAGLERAY_ROOT": job.workspace.root,
        "MLFLOW_TRACKING_URI": job.workspace.resolved_tracking_uri,
        "EAGLERAY_ADDRESS": address,
    }
    if use_s3:
        settings |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return write_settings(root, settings)


def _build_job(root: Path, store_uri: str, data: str | None, *, port: int, overrides: list[str]) -> JobConfig:
    values: dict[str, Any] = {
        "workspace": {"root": store_uri, "tracking_uri": f"sqlite:///{root}/mlflow.db"},
        "tune.storage": f"sqlite:///{root}/study.db",
        "serve.port": port,
        **{f"data.{split}": storage.join(store_uri, "data", split) for split in ("train", "val", "test")},
    }
    if data is not None:
        if not storage.exists(data):
            raise DataError(f"--data '{data}': no such folder; give a folder with one sub-folder of pictures per class")
        values |= {"name": "pictures", "data.image_size": 64, "data.augment.crop_scale": [0.35, 1.0], "data.augment.flip": 0.5}
        values |= {"ingest.shard_bytes": 64_000_000, "ingest.row_group_bytes": 2_000_000}
    return with_values(load_job(job_path(), overrides), values)


def job_path() -> Path:
    """Return the quickstart's job file: the checkout's, or the copy within an installed package."""
    in_checkout = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
    return in_checkout if in_checkout.exists() else Path(__file__).with_name("quickstart.yaml")


def _runner_up(search: SearchResult) -> TrialResult:
    """Return the best trial of another family than the winner's (of any, if there is none)."""
    others = [trial for trial in search.trials if trial.trial_id != search.best.trial_id and trial.checkpoint_uri]
    return max(others, key=lambda trial: (trial.family != search.best.family, trial.val_top1), default=search.best)


def _send_held_out(url: str, job: JobConfig, classes: list[str]) -> dict[str, dict[str, float]]:
    """Classify the held-out pictures over HTTP, one user each, and tell the endpoint what they were.

    The other variant then classifies each picture as for a tester, which the experiment does not count: both are judged
    by the same pictures.

    Returns:
        variant → requests, share, p50_ms, p99_ms (of the users' requests, as the client measured), and top1 of all
        pictures (share and top1 are fractions).
    """
    import httpx
    import numpy as np

    correct: dict[str, list[bool]] = {name: [] for name in VARIANTS}
    latencies: dict[str, list[float]] = {name: [] for name in VARIANTS}
    assert job.data.test is not None
    with httpx.Client(base_url=url, timeout=30.0) as client:
        for key, picture, label in _held_out(job.data.test):
            start = time.perf_counter()
            answer = _post_picture(client, job.name, picture, {"X-Routing-Key": key})
            latencies[answer["variant"]].append(1000 * (time.perf_counter() - start))
            client.post("/feedback", json={"request_id": answer["request_id"], "label": classes[label]}).raise_for_status()
            others = [_post_picture(client, job.name, picture, {"X-Variant": name}) for name in VARIANTS if name != answer["variant"]]
            for given in (answer, *others):
                correct[given["variant"]].append(given["predictions"][0]["label"] == classes[label])
    return {
        variant: {
            "requests": len(latencies[variant]),
            "share": len(latencies[variant]) / len(results),
            "top1": sum(results) / len(results),
            "p50_ms": float(np.percentile(latencies[variant] or [np.nan], 50)),
            "p99_ms": float(np.percentile(latencies[variant] or [np.nan], 99)),
        }
        for variant, results in correct.items()
    }


def _post_picture(client: httpx.Client, model: str, picture: bytes, headers: dict[str, str]) -> dict[str, Any]:
    response = client.post(f"/predict/{model}", content=picture, headers=headers)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def _held_out(uri: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield key, picture and label; as PNG, which small ones no longer are in shards."""
    from eagleray.data.decode import decode_trusted, encode_png
    from eagleray.data.shards import load_manifest, read_row_groups

    for shard in load_manifest(uri).shards:
        for table in read_row_groups(uri, shard.path, list(range(len(shard.row_group_rows)))):
            pictures = (encode_png(decode_trusted(data)) for data in table["image"].to_pylist())
            yield from zip(table["key"].to_pylist(), pictures, table["label"].to_pylist(), strict=True)


def _summary(
    stages: Stages,
    seconds: float,
    search: SearchResult,
    champion: ModelVersion,
    challenger: ModelVersion,
    results: dict[str, dict[str, float]],
    url: str,
    root: Path,
    run_uri: str,
) -> dict[str, Any]:
    def variant(name: str, version: ModelVersion) -> dict[str, Any]:
        return {"version": version.version, "architecture": version.tags["architecture"], **results.get(name, {})}

    return {
        "seconds": {**stages.seconds, "total": round(seconds, 1)},
        "num_trials": len(search.trials),
        "champion": variant("champion", champion),
        "challenger": variant("challenger", challenger),
        "endpoint": url,
        "learning_curve": _local_copy(storage.join(run_uri, api.LEARNING_CURVE_NAME), root),
        "directory": str(root),
    }


def _local_copy(uri: str, root: Path) -> str:
    """Return the path of the file at `uri`, brought into `root`."""
    path = root / api.LEARNING_CURVE_NAME
    path.write_bytes(storage.read_bytes(uri))
    return str(path)


def _print_summary(console: Console, summary: dict[str, Any], report: dict[str, Any], job: JobConfig, classes: list[str]) -> None:
    from rich import box
    from rich.table import Table

    from eagleray.cli import difference_lines

    table = Table(title="A/B test on the held-out pictures", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("variant", "version", "architecture", "requests", "share", "top-1", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column in ("variant", "version", "architecture") else "right")
    for name in VARIANTS:
        row = summary[name]
        table.add_row(
            name,
            f"{job.name}:{row['version']}",
            row["architecture"],
            f"{row['requests']}",
            f"{100 * row['share']:.1f} %",
            f"{100 * row['top1']:.1f} %",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
        )
    console.print()
    console.print(table)
    for line in difference_lines(report):
        console.print(line)
    console.print()
    seconds = summary["seconds"]
    console.print("seconds         " + "  ".join(f"{name} {value}" for name, value in seconds.items()))
    console.print(f"learning curve  {summary['learning_curve']}")
    console.print(f"endpoint        {summary['endpoint']}")
    sample = _sample_picture(Path(summary["directory"]), job, classes)
    console.print(f"try it          curl -s --data-binary @{sample} {summary['endpoint']}/predict/{job.name}")


def _sample_picture(root: Path, job: JobConfig, classes: list[str]) -> Path:
    """Write one held-out picture to a file and return its path."""
    assert job.data.test is not None
    key, picture, label = next(_held_out(job.data.test))
    path = root / f"sample-{classes[label]}{Path(key).suffix}"
    path.write_bytes(picture)
    return path
