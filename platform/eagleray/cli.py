"""The command line: a thin skin over `eagleray.api` that parses, shows progress and prints.

Exit codes: 0 done, 1 a check or a job failed, 2 the input or set-up is wrong (one line says what), 130 Ctrl-C,
143 SIGTERM; a training run has then saved where it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from eagleray import __version__
from eagleray.cluster.connect import prepare_environment
from eagleray.errors import ConfigError, EagleRayError, Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from eagleray.cluster.state import ClusterStatus
    from eagleray.config.schema import SearchConfig, ServingConfig, WorkspaceConfig

HELP = "From raw pictures to a served, A/B-tested image classifier on one Ray cluster, from one job file."

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(help="Look at an ingested data set.", no_args_is_help=True)
runs_app = typer.Typer(help="Training runs, running or not.", no_args_is_help=True)
models_app = typer.Typer(help="The registry: versions, their lineage and aliases.", no_args_is_help=True)
serve_app = typer.Typer(help="Serve registered models over HTTP.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of an endpoint.", no_args_is_help=True)
ab_app = typer.Typer(help="A/B-test served versions.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs on a cluster.", no_args_is_help=True)
cluster_app = typer.Typer(help="Clusters: their files, their nodes, what they cost.", no_args_is_help=True)
local_app = typer.Typer(help="A whole cluster on this machine.", no_args_is_help=True)
for group, name in (
    (data_app, "data"),
    (runs_app, "runs"),
    (models_app, "models"),
    (serve_app, "serve"),
    (ab_app, "ab"),
    (jobs_app, "jobs"),
    (cluster_app, "cluster"),
):
    app.add_typer(group, name=name)
serve_app.add_typer(keys_app, name="keys")
cluster_app.add_typer(local_app, name="local")

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the job file: a.b=c. May be repeated.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join (host:port or 'auto'); by default Ray is started here.", envvar="EAGLERAY_ADDRESS")
]
ServeAddress = Annotated[
    str, typer.Option(help="Ray cluster that serves (host:port, or 'auto' for the one on this machine).", envvar="EAGLERAY_ADDRESS")
]
JobsAddress = Annotated[
    str, typer.Option("--address", help="Ray's job server: http://head:8265.", envvar="EAGLERAY_JOBS_ADDRESS", show_default=False)
]
Watch = Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")]
OnFinish = Annotated[
    Literal["serve"] | None, typer.Option(help="serve: make what was trained the champion and deploy it, on the same cluster.")
]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run; by default the job's name and the time.")]
Keys = Annotated[str, typer.Option(help="Folder or s3:// URI of the keys, the endpoint's serve.keys_uri.", envvar="EAGLERAY_KEYS")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")]
Root = Annotated[str, typer.Option(help="Workspace: the job file's workspace.root.", envvar="EAGLERAY_ROOT")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; by default SQLite in the workspace.", envvar="MLFLOW_TRACKING_URI")
]
DEFAULT_ROOT = "./eagleray"
WATCH_S = 2.0
CHECKED = "checked: "
"""How the line begins that a job prints once nothing is in the way of its work."""


def main() -> None:
    """Run the command line; errors meant for the user become one line and exit code 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
        os.environ["EAGLERAY_DEBUG"] = "1"
    prepare_environment()
    try:
        app()
    except Interrupted as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(_escape(str(error)))
        sys.exit(128 + error.signal_number)
    except EagleRayError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("eagleray"):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"[bold red]error:[/] the package '{error.name}' is not installed here; run `uv sync` in the checkout, or, on a cluster, "
            "start its nodes from an image made with cluster/images/Dockerfile"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show traces of errors and Ray's own log lines.")] = False,
) -> None:
    if version:
        console.print(f"eagleray {__version__}")
        raise typer.Exit()


@app.command()
def quickstart(
    data: Annotated[str | None, typer.Option(help="A folder of pictures, one sub-folder per class; by default handwritten digits.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="New folder for all that is made; by default ./quickstart-<time>.")
    ] = None,
    s3: Annotated[bool, typer.Option("--s3", help="Keep data, runs and models in a real S3 store started here (SeaweedFS).")] = False,
    address: Address = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint.")] = 8000,
    exit_: Annotated[bool, typer.Option("--exit", help="End after the summary instead of serving on.")] = False,
    json_path: JsonPath = None,
    overrides: Overrides = None,
) -> None:
    """The whole way on this machine: pictures → shards → search → DDP training → registry → A/B-tested endpoint."""
    from eagleray.demo import run_quickstart

    run_quickstart(
        console,
        data=data,
        directory=directory,
        use_s3=s3,
        address=address,
        port=port,
        stay=not exit_,
        json_path=json_path,
        overrides=overrides or [],
    )


@app.command()
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with one sub-folder per class (imagefolder:URI), imagenet:FOLDER, webdataset:PATTERN, parquet:PATTERN, "
            "idx:FOLDER, cifar:URI or csv:FILE; local or s3://. A pattern is a file, a folder, or names with * and {000..146}."
        ),
    ],
    target: Annotated[str, typer.Argument(help="Folder or s3://bucket/key for shards and manifest.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split off a part of all (or of the source's train), stratified by class: val=0.1. May be repeated."),
    ] = None,
    split_by: Annotated[
        str | None,
        typer.Option(help="'folder': the source's top folders (train/, val/, …) are the splits; or a CSV file of lines key,split."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Parquet, CSV: column with the pictures, or their URIs.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Parquet, CSV: column with the class; WebDataset: its field in the json.")
    ] = None,
    class_names: Annotated[str | None, typer.Option(help="Text file with a class name a line, where labels are numbers from 0.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of split and order.")] = 0,
    max_side: Annotated[int | None, typer.Option(help="Make pictures smaller whose shorter side is longer (pixels).")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of re-encoded pictures.")] = 90,
    max_refused: Annotated[float, typer.Option(help="Give up when more than this share cannot be read.")] = 0.01,
    shard_bytes: Annotated[int, typer.Option(help="Size of a shard file, in bytes.")] = 64_000_000,
    address: Address = None,
    json_path: JsonPath = None,
) -> None:
    """Turn pictures into shards and a manifest in object storage."""
    from eagleray import api
    from eagleray.config.load import build_section
    from eagleray.config.schema import IngestConfig

    options: dict[str, Any] = {
        "split": _split(split or []),
        "split_by": split_by,
        "image_column": image_column,
        "label_column": label_column,
        "class_names": class_names,
        "max_side": max_side,
        "quality": quality,
        "max_refused_fraction": max_refused,
        "shard_bytes": shard_bytes,
    }
    config = build_section(IngestConfig, options, "ingest")
    with _ImageProgress() as progress:
        manifests = api.ingest(source, target, config, seed=seed, address=address, on_progress=progress.update)
    table = _table("split", "pictures", "classes", "shards", "MB", "refused", "digest")
    for name, manifest in manifests.items():
        size = sum(shard.size_bytes for shard in manifest.shards) / 1e6
        table.add_row(
            name,
            f"{manifest.num_rows:,}",
            str(len(manifest.classes)),
            str(len(manifest.shards)),
            f"{size:.1f}",
            str(manifest.num_refused),
            manifest.digest[:12],
        )
    console.print(table)
    for manifest in manifests.values():
        for refused in manifest.refused[:10]:
            console.print(f"refused: {_escape(refused.key)}: {_escape(refused.reason)}")
    _write_json(
        json_path,
        {name: {"rows": m.num_rows, "classes": m.classes, "refused": m.num_refused, "digest": m.digest} for name, m in manifests.items()},
    )


@data_app.command("show")
def data_show(
    uri: Annotated[str, typer.Argument(help="Folder or s3:// URI of an ingested data set.")],
    contact_sheet: Annotated[Path | None, typer.Option(help="Draw samples of each class into this PNG.")] = None,
) -> None:
    """Classes, counts and sizes of a data set."""
    from eagleray import api

    description = api.show_data(uri, contact_sheet)
    for key, value in description.items():
        if isinstance(value, dict):
            table = _table(key, "")
            for name, entry in value.items():
                table.add_row(_escape(str(name)), f"{entry:,}" if isinstance(entry, int) else str(entry))
            console.print(table)
        else:
            console.print(f"{key}: {_escape(str(value))}")
    if contact_sheet is not None:
        console.print(f"contact sheet: {contact_sheet}")


@data_app.command("verify")
def data_verify(uri: Annotated[str, typer.Argument(help="Folder or s3:// URI of an ingested data set.")]) -> None:
    """Check every shard against the manifest's checksums; exit 1 if any is damaged."""
    from eagleray import api

    problems = api.verify_data(uri)
    for problem in problems:
        console.print(f"[red]damaged:[/] {_escape(str(problem))}")
    if problems:
        raise typer.Exit(1)
    console.print(f"'{uri}': all shards match the manifest")


@app.command()
def train(
    job_file: JobFile,
    overrides: Overrides = None,
    name: RunName = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run from its newest checkpoint.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias for the new version, such as challenger.")] = None,
    on_finish: OnFinish = None,
    address: Address = None,
    json_path: JsonPath = None,
) -> None:
    """Train the job's model by DDP and register the best checkpoint."""
    from eagleray import api

    if on_finish == "serve":
        alias = alias or "champion"
    job = api.load_job(job_file, overrides)
    console.print(
        f"training {job.model.name} on {' + '.join(part.uri for part in job.data.train_parts)}: {job.train.epochs} epochs, batch {job.train.global_batch_size}, {job.train.max_workers} worker(s)"
    )
    with _TrainProgress() as progress:
        trained = api.train(
            job,
            name=name,
            resume=resume,
            alias=alias,
            address=address,
            on_epoch=lambda metrics: console.print(epoch_line(metrics, job.train.epochs)),
            on_progress=progress.update,
            on_message=_say,
        )
    console.print(f"run:     {trained.training.run_uri}")
    console.print(
        f"version: {trained.version.name}:{trained.version.version}  ({', '.join(f'{k} {v:.4f}' for k, v in trained.metrics.items() if 'samples' not in k)})"
    )
    _write_json(
        json_path,
        {
            "run": trained.training.run_name,
            "run_uri": trained.training.run_uri,
            "version": trained.version.version,
            "metrics": trained.metrics,
            "history": trained.training.history,
        },
    )
    if on_finish == "serve":
        _deploy(job.workspace, {"champion": trained.version.reference}, job.serve, address)


@app.command()
def tune(
    job_file: JobFile,
    overrides: Overrides = None,
    name: RunName = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this search, after anything.")] = None,
    register: Annotated[str | None, typer.Option(help="NAME or NAME@ALIAS: train the winner in full, and register it so.")] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="With --register: take the winner as its trial left it, without training it in full.")
    ] = False,
    address: Address = None,
    json_path: JsonPath = None,
) -> None:
    """Search architectures and hyperparameters; prints the trials and the best job."""
    from eagleray import api
    from eagleray.cluster.connect import connected

    if as_is and register is None:
        raise ConfigError("--as-is: give --register NAME, too")
    job = api.load_job(job_file, overrides)
    if register is not None:
        api.winner_job(job, register)  # a name that cannot be is refused before the search rather than after it
    version = None

    def on_epoch(metrics: dict[str, float]) -> None:
        console.print(epoch_line(metrics, job.train.epochs))

    with connected(address):
        with TrialsProgress(console, job.tune) as progress:
            result = api.tune(job, name=name, resume=resume, on_trial=progress.update, on_message=_say)
        console.print(trials_table(result))
        console.print(f"search: {result.run_uri}")
        if register is not None:
            version = api.register_winner(result, register, retrain=not as_is, on_epoch=on_epoch, on_message=_say)
            console.print(f"registered {version.reference} {' '.join('@' + alias for alias in version.aliases)}")
    if version is None and job.tune is not None and job.tune.is_population:
        console.print(f"keep the winner: eagleray tune {job_file} --resume {result.run_name} --register {job.name}", soft_wrap=True)
    elif version is None:
        console.print(
            "train the winner: eagleray train "
            + str(job_file)
            + " "
            + " ".join(f"--set {_shell(f'{key}={json.dumps(value)}')}" for key, value in winner_overrides(result).items())
        )
    _write_json(
        json_path,
        {
            "run": result.run_name,
            "best": result.best.values,
            "val_top1": result.best.val_top1,
            "registered": version.reference if version is not None else None,
            "trials": [vars(trial) for trial in result.trials],
        },
    )


@runs_app.command("list")
def runs_list(root: Root = DEFAULT_ROOT, tracking_uri: TrackingUri = None, json_path: JsonPath = None) -> None:
    """All runs, newest first."""
    from eagleray import api

    runs = api.list_runs(_workspace(root, tracking_uri))
    table = _table("run", "state", "epochs", "best val top-1", "images/s", "started")
    for run in runs:
        table.add_row(
            run.name,
            _state(run),
            f"{len(run.history)}/{run.job.train.epochs}",
            _percent(run.best["val_top1"] if run.best else None),
            f"{run.images_per_s:,.0f}" if run.images_per_s else "",
            _time(run.started),
        )
    console.print(table)
    _write_json(json_path, [_run_summary(run) for run in runs])


@runs_app.command("show")
def runs_show(
    name: Annotated[str, typer.Argument(help="Name of the run.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the learning curve so far into this PNG.")] = None,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
    json_path: JsonPath = None,
) -> None:
    """A run, running or not: its state, epochs, checkpoints, and what was registered from it."""
    from eagleray import api

    run, versions = api.show_run(_workspace(root, tracking_uri), name, plot)
    left_out = sum(epoch.get("train_skipped_samples", 0) for epoch in run.history)
    table = _table(run.name, _state(run))
    rows = {
        "reason": run.reason,
        "model": run.job.model.name,
        "data": " + ".join(part.uri for part in run.job.data.train_parts),
        "started": _time(run.started),
        "epochs": f"{len(run.history)} of {run.job.train.epochs}, {run.training_s:,.0f} s",
        "images/s": f"{run.images_per_s:,.0f}" if run.images_per_s else "",
        "best epoch": f"{int(run.best['epoch']) + 1}: val top-1 {_percent(run.best['val_top1'])}" if run.best else "",
        "checkpoints": ", ".join(f"step {step} ({size / 1e6:.1f} MB)" for _, step, size in run.checkpoints),
        "quarantined": f"{len(run.quarantined)} pictures: {run.uri}/quarantine.json" if run.quarantined else "",
        "rolled back": "\n".join(f"{entry.reason}: to step {entry.back_to}, without {len(entry.steps)} step(s)" for entry in run.rollbacks),
        "left out": f"{left_out:,.0f} pictures in finished epochs" if left_out else "",
        "versions": ", ".join(version.reference for version in versions),
        "lives at": run.uri,
        "go on": f"eagleray train JOB --resume {run.name}" if run.is_resumable else "",
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, _escape(value))
    console.print(table)
    if run.history:
        epochs = _table("epoch", "train loss", "val loss", "train top-1", "val top-1", "images/s", "waiting", "seconds")
        for row in run.history:
            epochs.add_row(
                str(int(row["epoch"]) + 1),
                *(f"{row[key]:.4f}" for key in ("train_loss", "val_loss")),
                *(_percent(row[key]) for key in ("train_top1", "val_top1")),
                f"{row['images_per_s']:,.0f}",
                _percent(row["data_wait_fraction"]),
                f"{row['epoch_s']:.1f}",
            )
        console.print(epochs)
    if plot is not None:
        console.print(f"learning curve: {plot}")
    _write_json(json_path, _run_summary(run) | {"versions": [version.reference for version in versions]})


@runs_app.command("report")
def runs_report(
    name: Annotated[str, typer.Argument(help="Name of a search.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for report.html and the figures as PNGs.")] = Path("report"),
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """A search as a page to look at: history, curves, what mattered, what was spent."""
    from eagleray import api

    console.print(f"report {api.report_search(_workspace(root, tracking_uri), name, to)}")


@models_app.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="Only this model.")] = None, root: Root = DEFAULT_ROOT, tracking_uri: TrackingUri = None
) -> None:
    """All versions, newest first."""
    from eagleray import api

    table = _table("model", "version", "aliases", "architecture", "val top-1", "test top-1", "registered")
    for version in api.list_models(_workspace(root, tracking_uri), name):
        tags = version.tags
        table.add_row(
            version.name,
            str(version.version),
            ", ".join(version.aliases),
            tags.get("architecture", ""),
            tags.get("val_top1", ""),
            tags.get("test_top1", ""),
            f"{version.created:%Y-%m-%d %H:%M}",
        )
    console.print(table)


@models_app.command("show")
def models_show(
    reference: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """A version with its lineage: data, job file, code, weights."""
    from eagleray import api

    version, card = api.show_model(_workspace(root, tracking_uri), reference)
    table = _table(f"{version.name}:{version.version}", ", ".join(version.aliases))
    rows = {
        "architecture": f"{card.model.name} {json.dumps(card.model.params)}",
        "classes": f"{len(card.classes)}: {', '.join(card.classes[:8])}{' …' if len(card.classes) > 8 else ''}",
        **{key: f"{value:.4f}" for key, value in card.metrics.items()},
        "run": f"{card.run_name} ({version.run_id})",
        "data digest": card.data_digest,
        "weights sha256": card.weights_sha256,
        "code": card.code_version,
        "package": version.package_uri,
    }
    for key, value in rows.items():
        table.add_row(key, _escape(value))
    console.print(table)


@models_app.command("compare")
def models_compare(
    first: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    second: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """What differs between two versions: metrics, architecture, job file, data."""
    from eagleray import api

    table = _table("", first, second)
    for key, (left, right) in api.compare_models(_workspace(root, tracking_uri), first, second).items():
        table.add_row(key, _escape(str(left)), _escape(str(right)))
    console.print(table)


@models_app.command("promote")
def models_promote(
    reference: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    alias: Annotated[str, typer.Option(help="Alias to give.")] = "champion",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Give a version an alias."""
    from eagleray import api

    version = api.promote_model(_workspace(root, tracking_uri), reference, alias)
    console.print(f"{version.name}:{version.version} is now {version.name}@{alias}")


@models_app.command("export")
def models_export(
    reference: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    target: Annotated[str, typer.Argument(help="Folder or s3:// URI.")],
    encrypt: Annotated[bool, typer.Option("--encrypt", help="With the password in EAGLERAY_PACKAGE_PASSWORD (AES-256-GCM).")] = False,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Verify a version's package and copy it: weights.safetensors, card.json and what else it holds."""
    from eagleray import api

    console.print(f"exported to {api.export_model(_workspace(root, tracking_uri), reference, target, encrypt=encrypt)}")


@models_app.command("decrypt")
def models_decrypt(
    source: Annotated[str, typer.Argument(help="What `models export --encrypt` wrote: folder or s3:// URI.")],
    target: Annotated[str, typer.Argument(help="Folder or s3:// URI.")],
) -> None:
    """Decrypt an exported package, with the password in EAGLERAY_PACKAGE_PASSWORD."""
    from eagleray import api

    console.print(f"decrypted to {api.decrypt_package(source, target)}")


@models_app.command("keygen")
def models_keygen(path: Annotated[Path, typer.Argument(help="File for the private key; the public one is written beside it.")]) -> None:
    """Make a key pair to sign versions with: EAGLERAY_SIGNING_KEY=FILE when they are registered, serve.trusted_keys when served."""
    from eagleray.artifacts.signing import make_key_pair

    console.print(f"private key {path}, public key {path}.pub: {make_key_pair(path)}")


@models_app.command("verify")
def models_verify(
    reference: Annotated[str, typer.Argument(help="name@alias, name:version, or the request_id of an answer.")],
    key: Annotated[list[str] | None, typer.Option(help="Public key that may have signed it. May be repeated.")] = None,
    shards: Annotated[bool, typer.Option("--shards", help="Also read the data set in full and compare every shard.")] = False,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
    json_path: JsonPath = None,
) -> None:
    """Walk from an answer or a version back to its data: signature, weights, run, job file, code, manifest, quarantine."""
    from eagleray import api

    version, links = api.verify_model(_workspace(root, tracking_uri), reference, trusted_keys=key or (), with_shards=shards)
    colours = {"holds": "green", "broken": "red", "unknown": "yellow"}
    table = _table(version.reference, "", "")
    for link in links:
        table.add_row(link.name, f"[{colours[link.status]}]{link.status}[/]", _escape(link.detail))
    console.print(table)
    _write_json(json_path, {"version": version.reference, "links": [vars(link) for link in links]})
    if any(link.status == "broken" for link in links):
        raise typer.Exit(1)


@serve_app.command("deploy")
def serve_deploy(
    reference: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    challenger: Annotated[str | None, typer.Option(help="A second version of the model; users are split evenly.")] = None,
    job_file: Annotated[Path | None, typer.Option("--job", help="Job file whose workspace and serve sections count.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, by default 127.0.0.1; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, by default 8000.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="The Open Inference Protocol over gRPC too, on this port.")] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Replicas of each version, by default 1; MIN-MAX, such as 0-4, for as many as the requests need.")
    ] = None,
    keys: Annotated[str | None, typer.Option(help="Folder of API keys; without one everybody is let in.")] = None,
    tls: Annotated[tuple[str, str] | None, typer.Option(help="Certificate and private key, PEM files: the endpoint speaks HTTPS.")] = None,
    allow_anonymous: Annotated[bool | None, typer.Option("--allow-anonymous", help="Let everybody in on a host that others reach.")] = None,
    address: Address = None,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve a version over HTTP; on a cluster it stays up, without --address until Ctrl-C."""
    from eagleray import api
    from eagleray.config.load import build_section
    from eagleray.config.schema import ServingConfig

    versions = {"champion": reference} | ({"challenger": challenger} if challenger else {})
    certificate, private_key = tls or (None, None)
    options = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "num_replicas": _replicas(replicas) if replicas is not None else None,
        "keys_uri": keys,
        "allow_anonymous": allow_anonymous,
        "tls_cert_path": certificate,
        "tls_key_path": private_key,
    }
    job = api.load_job(job_file) if job_file is not None else None
    base = job.serve.model_dump(mode="json") if job is not None else {}
    config = build_section(ServingConfig, base | {key: value for key, value in options.items() if value is not None}, "serve")
    workspace = job.workspace if job is not None else _workspace(root, tracking_uri)
    _deploy(workspace, versions, config, address)


@serve_app.command("status")
def serve_status(address: ServeAddress = "auto", json_path: JsonPath = None) -> None:
    """What the endpoint on a cluster serves."""
    from eagleray import api

    status = api.serve_status(address)
    table = _table("model", "variant", "version", "traffic", "state", "computed by")
    for name, model in status["models"].items():
        for variant, row in model["variants"].items():
            speed_up = f" ({row['speed_up']:.1f} × torch-fp32)" if row["speed_up"] else ""
            table.add_row(name, variant, str(row["version"]), f"{100 * row['traffic']:.0f} %", row["state"], f"{row['backend']}{speed_up}")
    console.print(f"endpoint {status['address']}")
    console.print(table)
    for name in status["models"]:
        console.print(backends_table(status, name))
    _write_json(json_path, status)


@serve_app.command("stop")
def serve_stop(address: ServeAddress = "auto") -> None:
    """Take the endpoint down; its log and its experiments stay."""
    from eagleray import api

    api.serve_stop(address)
    console.print("the endpoint is down")


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Keys,
    role: Annotated[str, typer.Option(help="predict, or admin for experiments too.")] = "predict",
    rate: Annotated[
        float | None, typer.Option(help="Requests per second that each ingress replica lets pass; by default any number.")
    ] = None,
) -> None:
    """Make a key and print its secret, once: only its SHA-256 is kept."""
    from eagleray import api

    secret = api.add_key(keys, name, role, rate)
    console.print(f"key '{name}' ({role}); it is shown this once. Send it with every request as\nAuthorization: Bearer {secret}")


@keys_app.command("list")
def keys_list(keys: Keys) -> None:
    """Names, roles and rates of the keys."""
    from eagleray import api

    table = _table("key", "role", "requests/s", "created")
    for key in api.list_keys(keys):
        table.add_row(key.name, key.role, f"{key.requests_per_s:g}" if key.requests_per_s else "any", f"{key.created:%Y-%m-%d %H:%M}")
    console.print(table)


@keys_app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Whose key it is.")], keys: Keys) -> None:
    """Delete a key; endpoints refuse it within seconds."""
    from eagleray import api

    api.revoke_key(keys, name)
    console.print(f"key '{name}' is revoked")


@ab_app.command("start")
def ab_start(
    name: Annotated[str, typer.Argument(help="A model that is served.")],
    challenger: Annotated[
        list[str] | None, typer.Option(help="Version number or reference; several are named: --challenger wide=7 --challenger deep=8.")
    ] = None,
    traffic: Annotated[
        list[str] | None, typer.Option(help="Share of the users for the challenger, such as 10% or wide=10%.", show_default="10%")
    ] = None,
    shadow: Annotated[
        list[str] | None, typer.Option(help="A version that gets copies of requests and answers nobody: 9, or 9@20% for a part of them.")
    ] = None,
    outcome: Annotated[str, typer.Option(help="What is compared: proportion (successes) or mean (of a number).")] = "proportion",
    policy: Annotated[str, typer.Option(help="fixed, or thompson: traffic moves to what looks best.")] = "fixed",
    ramp: Annotated[
        str | None, typer.Option(help="Shares of the challenger and how long each is held at least: 1%@10m,10%@1h,50%@1d.")
    ] = None,
    guardrail: Annotated[
        list[str] | None,
        typer.Option(
            help="What ends the experiment: error_rate=0.01, p99_latency=1.0, outcome=0.05, confidence=0.1, recall:CLASS=0.02.",
            show_default="the first three",
        ),
    ] = None,
    guardrails: Annotated[bool, typer.Option("--guardrails/--no-guardrails", help="Whether anything ends it by itself.")] = True,
    salt: Annotated[str | None, typer.Option(help="Salt of an earlier experiment, for the same users in the same variants.")] = None,
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Send a share of the users to other versions."""
    from eagleray import api
    from eagleray.serving.experiment import DEFAULT_GUARDRAILS

    challengers = dict(_named(reference, "challenger") for reference in challenger or ())
    copies = {variant: _copies(text) for variant, text in (_named(reference, "shadow") for reference in shadow or ())}
    shares = {} if ramp else dict.fromkeys(challengers, 0.1) if traffic is None else {}
    for share in traffic or ():
        variant, text = _named(share, "challenger")
        shares[variant] = _fraction("--traffic", text)
    given = tuple(_guardrail(text) for text in guardrail or ())
    experiment = api.ab_start(
        _workspace(root, tracking_uri),
        name,
        challengers | {variant: reference for variant, (reference, _) in copies.items()},
        shares,
        address=address,
        shadows={variant: fraction for variant, (_, fraction) in copies.items()},
        outcome=outcome,
        policy=policy,
        ramp=_ramp(ramp) if ramp else (),
        guardrails=(given or DEFAULT_GUARDRAILS) if guardrails else (),
        salt=salt,
    )
    console.print(f"experiment {experiment.id}: {_shares(experiment)}")
    if experiment.guardrails:
        console.print(f"ends by itself where it breaks: {', '.join(f'{guard} ({guard.margin:g})' for guard in experiment.guardrails)}")


@ab_app.command("power")
def ab_power(
    baseline: Annotated[str, typer.Argument(help="Success rate of what is served, such as 90%.")],
    difference: Annotated[str, typer.Argument(help="Difference that should be found, such as 2% (points).")],
    traffic: Annotated[str, typer.Option(help="Share of the users for the challenger.")] = "50%",
    power: Annotated[str, typer.Option(help="Probability to find it.")] = "80%",
    alpha: Annotated[str, typer.Option(help="Probability of a false alarm.")] = "5%",
) -> None:
    """How many users with an outcome an experiment needs; watched all along, or looked at once at the end."""
    from eagleray.serving.statistics import required_samples, required_samples_sequential

    rate, points, share, wanted, level = (
        _fraction(name, text)
        for name, text in (
            ("baseline", baseline),
            ("difference", difference),
            ("--traffic", traffic),
            ("--power", power),
            ("--alpha", alpha),
        )
    )
    once = required_samples(rate, points, wanted, level, share)
    watched = required_samples_sequential(rate, points, wanted, level, share)
    table = _table("", "champion", "challenger", "together", "on average")
    table.add_row(
        "watched all along", *(f"{n:,}" for n in (watched.control, watched.variant, watched.control + watched.variant, watched.expected))
    )
    table.add_row("looked at once, at the end", *(f"{n:,}" for n in (*once, sum(once), sum(once))))
    console.print(table)


@ab_app.command("weights")
def ab_weights(
    name: Annotated[str, typer.Argument(help="The tested model.")],
    weights: Annotated[list[str], typer.Argument(help="variant=share: champion=50% challenger=50%.")],
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Change the split; as few users as possible change their variant, and the figures start anew."""
    from eagleray import api

    shares = {variant: _fraction("weights", text) for variant, text in (_named(weight, "challenger") for weight in weights)}
    experiment = api.ab_set_weights(_workspace(root, tracking_uri), name, shares, address=address)
    console.print(f"experiment {experiment.id}: {_shares(experiment)}")


@ab_app.command("status")
def ab_status(
    name: Annotated[str, typer.Argument(help="A model that is or was tested.")],
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
    json_path: JsonPath = None,
) -> None:
    """Shares, latencies and outcomes of each variant, and what they prove so far; may be looked at any time."""
    from eagleray import api

    report = api.ab_status(_workspace(root, tracking_uri), name, address=address)
    console.print(f"experiment {report['experiment']}: {report['status']}")
    is_rate = report["outcome"] == "proportion"
    table = _table("variant", "version", "requests", "share", "errors", "p50 ms", "p99 ms", "outcomes", "success" if is_rate else "mean")
    for variant, row in report["variants"].items():
        cells = (row["requests"], _percent(row["share"]), row["errors"], _short(row["p50_ms"]), _short(row["p99_ms"]), row["outcomes"])
        result = _percent(row["success_rate"]) if is_rate else _short(row["mean"])
        table.add_row(variant, str(row["version"]), *(str(cell) for cell in cells), result)
    console.print(table)
    for line in [*difference_lines(report), *shadow_lines(report)]:
        console.print(line)
    for guard in report["guardrails"]:
        console.print(f"guardrail {'[red]broken[/]' if guard['is_breached'] else 'kept'}: {_escape(guard['reason'])}")
    if report["reason"]:
        console.print(f"[red]ended by a guardrail[/]: {_escape(report['reason'])}")
    if report["sample_ratio"]["is_mismatch"]:
        console.print(
            f"[red]the split is broken[/]: sample-ratio p = {report['sample_ratio']['p_value']:.2g}; do not trust the figures before the cause is found"
        )
    _write_json(json_path, report)


@ab_app.command("promote")
def ab_promote(
    name: Annotated[str, typer.Argument(help="The tested model.")],
    variant: Annotated[str | None, typer.Option(help="Variant to promote; by default the only challenger.")] = None,
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """The challenger becomes champion and gets all traffic."""
    from eagleray import api

    experiment = api.ab_promote(_workspace(root, tracking_uri), name, variant, address=address)
    winner = experiment.variant(experiment.winner or "")
    console.print(f"{name}:{winner.version} is now {name}@champion and gets all traffic")


@ab_app.command("abort")
def ab_abort(
    name: Annotated[str, typer.Argument(help="The tested model.")],
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """All traffic returns to the champion."""
    from eagleray import api

    experiment = api.ab_abort(_workspace(root, tracking_uri), name, address=address)
    console.print(f"experiment {experiment.id} is aborted; {name}:{experiment.control.version} gets all traffic")


@app.command()
def submit(
    job_file: JobFile,
    address: JobsAddress,
    verb: Annotated[str | None, typer.Option(help="train or tune; by default tune where the job has a tune section.")] = None,
    overrides: Overrides = None,
    name: RunName = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run from its newest checkpoint.")] = None,
    queue: Annotated[str | None, typer.Option(help="Wait in this queue of the cluster's until it has room for the job's workers.")] = None,
    on_finish: OnFinish = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return as soon as the job has checked cluster and data, instead of following its log.")
    ] = False,
) -> None:
    """Run a job file on a cluster; Ctrl-C leaves the job running. Exits 1 if the job fails."""
    from eagleray import api

    job = api.load_job(job_file, overrides)
    submission = api.submit(job, address, verb=verb, name=name, resume=resume, serves=on_finish == "serve", queue=queue)
    _submitted(submission, address, detach)


@jobs_app.command("resubmit")
def jobs_resubmit(
    submission_id: Annotated[str, typer.Argument(help="Id of a job that has ended.")],
    address: JobsAddress,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin a new run, rather than go on with the job's own.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the log.")] = False,
) -> None:
    """Run a job again: it goes on from its run's newest checkpoint."""
    from eagleray import api

    _submitted(api.resubmit(submission_id, address, fresh=fresh), address, detach)


@jobs_app.command("show")
def jobs_show(submission_id: Annotated[str, typer.Argument(help="Id of the job.")], address: JobsAddress) -> None:
    """What became of a job, and its job file."""
    from eagleray import api

    job = api.job_status(submission_id, address)
    rows = {
        "status": job.status,
        "started": f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else "",
        "ended": f"{job.ended:%Y-%m-%d %H:%M:%S}" if job.ended else "",
        "run": job.run,
        "queue": job.queue,
        "entrypoint": job.entrypoint,
        "message": job.message,
    }
    for key, value in rows.items():
        if value:
            console.print(f"{key + ':':<12}{_escape(value)}")
    if job.job_file:
        console.print()
        console.out(job.job_file, end="")


@jobs_app.command("list")
def jobs_list(address: JobsAddress, watch: Watch = False) -> None:
    """Jobs of a cluster, newest first."""
    from eagleray import api

    def jobs() -> Table:
        table = _table("job", "status", "started", "entrypoint")
        for job in api.list_jobs(address):
            started = f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else ""
            table.add_row(job.submission_id, job.status, started, _escape(job.entrypoint))
        return table

    _show(jobs, watch)


@jobs_app.command("logs")
def jobs_logs(
    submission_id: Annotated[str, typer.Argument(help="Id of the job.")],
    address: JobsAddress,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; exits 1 if it fails.")] = False,
) -> None:
    """The log of a job."""
    from eagleray import api

    if follow:
        _follow(submission_id, address)
        return
    for text in api.job_logs(submission_id, address):
        console.out(text, end="")


@jobs_app.command("stop")
def jobs_stop(submission_id: Annotated[str, typer.Argument(help="Id of the job.")], address: JobsAddress) -> None:
    """Stop a job; its runs can be resumed from their newest checkpoints."""
    from eagleray import api

    job = api.stop_job(submission_id, address)
    if job is not None and job.status == "PENDING":
        console.print(f"{submission_id}: waits in queue '{job.queue}', and ends when its turn comes, before it begins")
    else:
        console.print(f"{submission_id}: {'had ended before' if job is None else 'stopped'}")


@cluster_app.command("render")
def cluster_render(
    description: Annotated[Path, typer.Argument(help="Cluster description (YAML), see cluster/cluster.yaml.")],
    to: Annotated[Path, typer.Option(help="Folder for the files.")],
) -> None:
    """Write a cluster's files for Ray's launcher (AWS, GCP), Kubernetes, and the rights on its buckets."""
    from eagleray import api

    for path in api.render_cluster(description, to):
        console.print(path)


@local_app.command("up")
def cluster_local_up(
    directory: Annotated[Path, typer.Option("--dir", help="Folder for what its parts store, and for their logs.")] = Path("local-cluster"),
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of Ray; by default all.")] = None,
) -> None:
    """S3, PostgreSQL, MLflow, Ray with a job server, and Prometheus, until Ctrl-C; what they store stays."""
    from eagleray.cluster.local import SETTINGS_NAME, LocalCluster

    end_as_by_ctrl_c()  # while it starts as well: its parts would outlive it
    console.print(f"starting the parts of a cluster in {directory.resolve()}")
    with LocalCluster(directory, num_cpus, lambda part: console.print(f"{part.name:<11} {part.address}", soft_wrap=True)) as cluster:
        console.print(f"in another terminal: set -a; . {cluster.directory / SETTINGS_NAME}; set +a; eagleray cluster status")
        console.print("Ctrl-C stops all of it; what it stores stays")
        wait_for_interrupt()


@cluster_app.command("status")
def cluster_status(address: JobsAddress, watch: Watch = False) -> None:
    """Nodes by group, what is used of them, running jobs, and what waits for room and why."""
    from eagleray import api

    _show(lambda: _status_of(api.cluster_status(address)), watch)


def _status_of(status: ClusterStatus) -> Group:
    table = _table("group", "nodes", "CPUs in use", "GPUs in use")
    groups: dict[str, list[Any]] = {}
    for node in status.nodes:
        groups.setdefault("head" if node.is_head else node.group or node.node_type or "workers", []).append(node)
    for name, nodes in groups.items():
        used = {kind: sum(status.used.get(node.node_id, {}).get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        table.add_row(name, str(len(nodes)), f"{used['CPU']:g} of {cpus:g}", f"{used['GPU']:g} of {gpus:g}" if gpus else "")
    lines = [f"starting: {_escape(kind)}" for kind in status.starting]
    lines += [f"[red]failed:[/] {_escape(failure)}" for failure in status.failed]
    lines += [f"{job.status.lower()}: {job.submission_id} {job.verb} {_escape(job.run)}".rstrip() for job in status.jobs]
    for demand in status.demands:
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in demand.resources.items())
        lines.append(f"pending: {demand.count} × ({wanted}): {demand.why}")
    return Group(table, *lines, *([] if status.demands else ["nothing waits for room"]))


def _show(draw: Callable[[], RenderableType], watch: bool) -> None:
    """Print something; with `watch`, again and again in its place until Ctrl-C."""
    if not watch:
        console.print(draw())
        return
    with suppress(KeyboardInterrupt), Live(draw(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(draw(), refresh=True)


@cluster_app.command("cost")
def cluster_cost(
    description: Annotated[Path, typer.Argument(help="Cluster description, for its machines and prices.")],
    address: JobsAddress,
    cloud: Annotated[Literal["aws", "gcp"], typer.Option(help="Whose prices.")],
    json_path: JsonPath = None,
) -> None:
    """What the cluster has cost since its head was started, by group of nodes and by job; time of nodes that nobody held is idle."""
    from eagleray import api

    costs, jobs = api.cluster_costs(address, description, cloud)
    table = _table("group", "node-hours", "USD")
    for group, usd in costs.groups.items():
        table.add_row(group, f"{costs.node_hours[group]:.2f}", f"{usd:.2f}")
    table.add_row("all", f"{sum(costs.node_hours.values()):.2f}", f"{costs.total:.2f}")
    console.print(table)
    runs = {job.submission_id: job.run for job in jobs}
    models = api.versions_by_job(jobs)
    table = _table("job", "run", "model", "GPU-hours", "USD")
    for job, usd in sorted(costs.jobs.items(), key=lambda item: -item[1]):
        table.add_row(job, _escape(runs.get(job, "")), ", ".join(models.get(job, [])), f"{costs.gpu_hours[job]:.2f}", f"{usd:.2f}")
    table.add_row("idle, and the head", "", "", "", f"{costs.idle:.2f}")
    console.print(table)
    by_model: dict[str, float] = defaultdict(float)
    for job, usd in costs.jobs.items():
        for reference in models.get(job, []):
            by_model[reference] += usd
    rows = [
        {"job": job, "run": runs.get(job, ""), "models": models.get(job, []), "gpu_hours": costs.gpu_hours[job], "usd": usd}
        for job, usd in costs.jobs.items()
    ]
    summary = {"total_usd": costs.total, "idle_usd": costs.idle, "groups": dict(costs.groups), "models": by_model, "jobs": rows}
    _write_json(json_path, summary)


@cluster_app.command("estimate")
def cluster_estimate(
    job_file: JobFile,
    description: Annotated[Path, typer.Argument(help="Cluster description, for its machines and prices.")],
    cloud: Annotated[Literal["aws", "gcp"], typer.Option(help="Whose prices.")],
    images_per_s: Annotated[
        float | None, typer.Option("--images-per-second", min=0.001, help="Of one worker, as measured; see `eagleray runs show`.")
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="Training pictures, where the data are not there yet.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Classes, where the data are not there yet.")] = None,
    overrides: Overrides = None,
    json_path: JsonPath = None,
) -> None:
    """What a job will take and cost on the cluster, before it starts; of a search, at most."""
    from eagleray import api

    job = api.load_job(job_file, overrides)
    found = api.estimate_cost(job, description, cloud, images_per_s=images_per_s, pictures=pictures, num_classes=classes)
    where = "as measured" if found.is_measured else "assumed, from the network's work; measured: --images-per-second"
    kind = "GPU" if job.train.use_gpu is not False else "worker"
    at_most = "at most " if found.trials > 1 else ""
    console.print(f"speed:   {found.images_per_s:,.0f} images/s a worker ({where})")
    console.print(f"workers: {found.workers} at a time on {found.nodes} × {found.machine}, and the head")
    console.print(f"time:    {at_most}{found.hours:.2f} h, {found.worker_hours:.2f} {kind}-hours")
    spot = "" if found.spot_usd is None else f", {found.spot_usd:.2f} USD with spot nodes"
    console.print(f"cost:    {at_most}{found.usd:.2f} USD on demand{spot}")
    _write_json(json_path, asdict(found))


@cluster_app.command("watch-notices")
def cluster_watch_notices(
    address: Annotated[str, typer.Option(help="The cluster, host:6379.")],
    cloud: Annotated[Literal["aws", "gcp"], typer.Option(help="Whose metadata service to ask.")],
    node_id: Annotated[str | None, typer.Option(help="This node, where several run on one machine.")] = None,
    metadata_url: Annotated[str | None, typer.Option(help="Another address of the metadata service.")] = None,
) -> None:
    """On a spot node: wait for the cloud's notice, then have the node's work saved and moved. Rendered files start it."""
    from eagleray.cluster.notices import watch_notices

    watch_notices(cloud, address, node_id=node_id, url=metadata_url, on_message=console.print)


@cluster_app.command("drain")
def cluster_drain(
    address: Annotated[str, typer.Option(help="The cluster, host:6379.")],
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds until the node goes.")],
    node_id: Annotated[str | None, typer.Option(help="This node, where several run on one machine.")] = None,
) -> None:
    """On a node that will go: have its work saved and moved; returns when it has none left, or the time is over."""
    from eagleray.cluster.notices import drain_this_node

    drain_this_node(address, deadline_s, node_id=node_id)


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Also look at this Ray cluster (host:port).")] = None,
    uri: Annotated[str | None, typer.Option(help="Also look at this folder or s3:// URI.")] = None,
    port: Annotated[int, typer.Option(help="Port the endpoint would take.")] = 8000,
) -> None:
    """What is wrong with this set-up, and what to do; exit 1 if anything is."""
    from eagleray import api

    table = _table("", "check", "found", "what to do")
    checks = api.doctor(address, uri, port)
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "[yellow]note[/]"}[check.ok]
        table.add_row(mark, check.name, _escape(check.detail), _escape(check.remedy))
    console.print(table)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


def _say(text: str) -> None:
    console.print(_escape(text))


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM do what Ctrl-C does: leave every block as it is meant to be left."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def _deploy(workspace: WorkspaceConfig, versions: dict[str, str], config: ServingConfig, address: str | None) -> None:
    """Serve; where Ray runs for this command alone, until Ctrl-C."""
    from eagleray import api
    from eagleray.cluster.connect import connected

    with connected(address, serves_tls=config.tls_cert_path is not None):
        url = api.serve(workspace, versions, config, address=address)
        model = api.open_registry(workspace).resolve(versions["champion"]).name
        console.print(backends_table(api.serve_status(address), model))
        console.print(f"endpoint {url}\ntry it   curl -s --data-binary @picture.jpg {url}/predict/{model}\ndocs     {url}/docs")
        if address is None:
            console.print("Serving until Ctrl-C.")
            wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Return when the user presses Ctrl-C (or the process is asked to end)."""
    end_as_by_ctrl_c()
    with suppress(KeyboardInterrupt):
        signal.pause()


def _submitted(submission_id: str, address: str, detach: bool) -> None:
    from eagleray import api

    at = f"{submission_id} --address {address}"
    console.print(f"submitted {submission_id}")
    console.print(f"follow it: eagleray jobs logs {at} --follow\nstop it:   eagleray jobs stop {at}")
    if detach and (queue := api.job_status(submission_id, address).queue):
        console.print(f"it waits in queue '{queue}' for its turn")
        return
    _follow(submission_id, address, until=CHECKED if detach else None)


def _follow(submission_id: str, address: str, until: str | None = None) -> None:
    """Print a job's log, to its end or up to a text in it; exit 1 where the job has failed."""
    from eagleray import api

    seen = ""
    try:
        for text in api.job_logs(submission_id, address, follow=True):
            console.out(text, end="")
            seen += text
            if until is not None and until in seen:
                return
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; follow it: eagleray jobs logs {submission_id} --address {address} --follow")
        return
    job = api.job_status(submission_id, address)
    console.print(f"{submission_id}: {job.status}")
    if job.status != "SUCCEEDED":
        raise typer.Exit(1)


def backends_table(status: dict[str, Any], model: str) -> Table:
    """Return what was measured when the versions of `model` were deployed; what computes them is marked."""
    table = _table("version", "back end", "images/s by batch size", "largest difference of a probability", "same class", "")
    for row in status["models"][model]["variants"].values():
        for measured in row["measured"] or [
            {"backend": row["backend"], "images_per_s": {}, "drift": None, "agreement": None, "refused": "as set"}
        ]:
            rates = ", ".join(f"{size}: {rate:.4g}" for size, rate in measured["images_per_s"].items())
            drift = "" if measured["drift"] is None else f"{measured['drift']:.2g}"
            agreement = "" if measured["agreement"] is None else f"{100 * measured['agreement']:.1f} %"
            is_chosen = measured["backend"] == row["backend"]
            name = f"[bold]{measured['backend']}[/]" if is_chosen else measured["backend"]
            table.add_row(str(row["version"]), name, rates, drift, agreement, measured["refused"] or ("chosen" if is_chosen else ""))
    return table


def difference_lines(report: dict[str, Any]) -> list[str]:
    """Return what the outcomes say of each variant against the control: as counted, by user, and with the covariate's part taken out."""
    names = {"": "", "by_user": ", users as trials", "adjusted": ", less what the covariate explains"}
    lines = []
    for variant, difference in report["differences"].items():
        for key, name in names.items():
            figures = difference[key] if key and key in difference else difference if not key else None
            if figures is not None:
                lines.append(f"{variant} − {report['control']}{name}: {_difference(figures, difference['alpha'], report['outcome'])}")
    return lines


def _difference(figures: dict[str, Any], alpha: float, outcome: str) -> str:
    if figures["estimate"] is None:
        return "no outcomes yet"
    scale, unit, digits = (100, " points", 1) if outcome == "proportion" else (1, "", 3)
    if figures["lower"] is None:
        return f"{scale * figures['estimate']:+.{digits}f}{unit}; too few outcomes for an interval"
    estimate, lower, upper = (f"{scale * figures[key]:+.{digits}f}" for key in ("estimate", "lower", "upper"))
    return f"{estimate}{unit} ({lower} to {upper} with {100 * (1 - alpha):g} % confidence at any time)"


def shadow_lines(report: dict[str, Any]) -> list[str]:
    """Return one line on each shadow."""
    return [
        f"shadow {name} (version {row['version']}): {row['requests']} copies, {row['errors']} errors, agrees in {_percent(row['agreement']) or '–'}, "
        f"right in {_percent(row['success_rate']) or '–'} of {row['outcomes']}, p99 {row['p99_ms']} ms, looks at the same places: {_similarity(row)}"
        for name, row in report["shadows"].items()
    ]


def _similarity(shadow: dict[str, Any]) -> str:
    mean = shadow["saliency_similarity"]
    return "–" if mean is None else f"{mean:.2f} over {shadow['saliency_pictures']} pictures"


def epoch_line(metrics: dict[str, float], epochs: int) -> str:
    """Return one line on an epoch."""
    return (
        f"epoch {int(metrics['epoch']) + 1:>3}/{epochs}  loss {metrics['train_loss']:.3f}  val loss {metrics['val_loss']:.3f}  "
        f"val top-1 {100 * metrics['val_top1']:5.1f} %  {metrics['images_per_s']:,.0f} images/s  {100 * metrics['data_wait_fraction']:.0f} % waiting for data"
    )


class TrialsProgress:
    """Where a search stands: a line for each trial that ends and, on a terminal, what runs now, the best so far and the time left."""

    def __init__(self, to: Console, search: SearchConfig | None) -> None:
        self._to = to
        self._num_trials, self._epochs = (search.num_trials, search.epochs) if search else (0, 0)  # without one, the search says so
        self._trials: dict[str, Any] = {}
        self._live = Live(console=to, transient=True, refresh_per_second=4) if to.is_terminal else nullcontext()
        self._start = time.monotonic()

    def __enter__(self) -> TrialsProgress:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def update(self, trial: Any) -> None:
        self._trials[trial.trial_id] = trial
        if trial.status != "running":
            self._to.print(_trial_line(trial))
        if isinstance(self._live, Live):
            self._live.update(search_status(list(self._trials.values()), self._num_trials, self._epochs, time.monotonic() - self._start))


def search_status(trials: list[Any], num_trials: int, epochs: int, seconds: float) -> Group:
    """Return the trials that run as a table, and a line on the whole search after so many seconds."""
    running = [trial for trial in trials if trial.status == "running"]
    table = _table("running", "architecture", "epochs", "val top-1", "values")
    for trial in running:
        table.add_row(
            trial.trial_id, trial.family, f"{trial.epochs}/{epochs}", _percent(trial.val_top1 if trial.epochs else None), _values(trial)
        )
    counts = Counter(trial.status for trial in trials)
    ended = len(trials) - len(running)
    parts = [f"{ended} of {num_trials} trials ended"] + [f"{counts[kind]} {kind}" for kind in ("stopped", "failed") if counts[kind]]
    best = max((trial for trial in trials if trial.epochs), key=lambda trial: trial.val_top1, default=None)
    if best is not None:
        parts.append(f"best {_percent(best.val_top1)} by {best.family} ({best.trial_id})")
    if ended:
        parts.append(f"about {_duration(seconds / ended * (num_trials - ended))} left")
    return Group(table, ", ".join(parts)) if running else Group(", ".join(parts))


def _trial_line(trial: Any) -> str:
    end = f"[red]{_escape(trial.reason)}[/]" if trial.status == "failed" else f"val top-1 {100 * trial.val_top1:5.1f} %"
    return (
        f"trial {trial.trial_id}  {trial.family:<14} {trial.status:<8} {trial.epochs:>2} epochs  {end}  {trial.seconds:4.1f} s  "
        f"[dim]{_values(trial, '  ', ' ')}[/]"
    )


def _values(trial: Any, between: str = ", ", equals: str = "=") -> str:
    short = {key.rpartition(".")[2]: _short(value) for key, value in trial.values.items() if key != "model.name"}
    return between.join(f"{key}{equals}{value}" for key, value in short.items())


def trials_table(result: Any) -> Table:
    """Return the trials of a search as a table, best first."""
    table = _table("trial", "architecture", "val top-1", "status", "epochs", "seconds", "values")
    for trial in sorted(result.trials, key=lambda t: -t.val_top1):
        top1, seconds = f"{100 * trial.val_top1:.1f} %", f"{trial.seconds:.1f}"
        table.add_row(trial.trial_id, trial.family, top1, trial.status, str(trial.epochs), seconds, _values(trial))
    return table


def winner_overrides(result: Any) -> dict[str, Any]:
    """Return the dotted keys that turn the searched job into the winner's."""
    family = result.best.family
    params = {key.removeprefix(f"{family}."): value for key, value in result.best.values.items() if key.startswith(f"{family}.")}
    shared = {key: value for key, value in result.best.values.items() if key != "model.name" and not key.startswith(f"{family}.")}
    return {"model.name": family, "model.params": params, **shared}


def progress_line(progress: Any) -> str:
    """Return one line on where a run stands within an epoch."""
    return (
        f"epoch {progress.epoch + 1:>3}/{progress.epochs}  step {progress.step}/{progress.steps_per_epoch}  loss {progress.loss:.3f}  "
        f"top-1 {100 * progress.top1:5.1f} %  {progress.images_per_s:,.0f} images/s  "
        f"{100 * progress.data_wait_fraction:.0f} % waiting for data  {_duration(progress.eta_s)} left"
        f"{f'  rolled back: {progress.rollbacks}' if progress.rollbacks else ''}"
    )


class _TrainProgress:
    """Where a run stands: a line that changes on a terminal, a new line every few seconds in a log."""

    EVERY_S = 10.0

    def __enter__(self) -> _TrainProgress:
        self._status = console.status("starting the workers") if console.is_terminal else None
        self._printed = time.monotonic()
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, progress: Any) -> None:
        now = time.monotonic()
        if self._status is not None:
            self._status.update(progress_line(progress))
        elif now - self._printed > self.EVERY_S:
            self._printed = now
            console.print(progress_line(progress))


class _ImageProgress:
    """Pictures done, images/s and time left: a bar on a terminal, a line every few seconds in a log."""

    EVERY_S = 5.0

    def __enter__(self) -> _ImageProgress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("ingest"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} images/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._start = self._printed = time.monotonic()
        self._kept: int | None = None
        self._task: Any = None
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if console.is_terminal:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._kept is None:  # the first call tells what an earlier run had finished
            self._kept, self._start, self._printed = done, now, now
            if done:
                console.print(f"ingest: going on, {done:,} of {total:,} pictures are done")
        rate = (done - self._kept) / max(now - self._start, 1e-9)
        if console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("ingest", total=total, rate="")
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:,.0f}")
        elif done == total or now - self._printed > self.EVERY_S:
            self._printed = now
            console.print(f"ingest: {done:,}/{total:,} pictures, {rate:,.0f} images/s, {(total - done) / max(rate, 1e-9):.0f} s left")


def _split(parts: list[str]) -> dict[str, float]:
    from eagleray.errors import ConfigError

    fractions = {}
    for part in parts:
        name, _, fraction = part.partition("=")
        try:
            fractions[name] = float(fraction)
        except ValueError:
            raise ConfigError(f"--split '{part}': expected name=fraction, for example val=0.1") from None
    return fractions


def _fraction(option: str, text: str) -> float:
    from eagleray.errors import ConfigError

    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ConfigError(f"{option} '{text}': expected a percentage such as 10%, or a fraction such as 0.1") from None


def _named(text: str, default: str) -> tuple[str, str]:
    """Read `name=value`, or a value alone."""
    name, separator, value = text.partition("=")
    return (name, value) if separator else (default, text)


def _copies(text: str) -> tuple[str, float]:
    """Read a version and the part of the requests that it gets copies of: `9@20%`, or `9` for all of them."""
    reference, _, part = text.rpartition("@")
    return (reference, _fraction("--shadow", part)) if part.endswith("%") and reference else (text, 1.0)


def _replicas(text: str) -> Any:
    least, is_range, most = text.partition("-")
    return {"min": least, "max": most} if is_range else text


def _shares(experiment: Any) -> str:
    return ", ".join(
        f"{variant.name} {experiment.model}:{variant.version} "
        + (f"copies of {100 * variant.mirror:.0f} %" if variant.is_shadow else f"{100 * experiment.shares[variant.name]:.0f} %")
        for variant in experiment.variants
    )


def _ramp(text: str) -> list[Any]:
    from eagleray.errors import ConfigError
    from eagleray.serving.experiment import RampStep

    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    steps = []
    for step in text.split(","):
        share, _, hold = step.strip().partition("@")
        try:
            steps.append(RampStep(share=_fraction("--ramp", share), hold_s=float(hold[:-1]) * units[hold[-1:]]))
        except (KeyError, ValueError):
            raise ConfigError(f"--ramp '{step}': expected share@time, such as 10%@1h (s, m, h or d)") from None
    return steps


def _guardrail(text: str) -> Any:
    from eagleray.errors import ConfigError
    from eagleray.serving.experiment import Guardrail

    what, _, margin = text.rpartition("=")
    metric, _, label = what.partition(":")
    try:
        return Guardrail.model_validate({"metric": metric, "margin": margin, "label": label or None})
    except ValueError:
        raise ConfigError(
            f"--guardrail '{text}': expected error_rate=, p99_latency=, outcome=, confidence= or recall:CLASS= and what is still borne, such as 0.02"
        ) from None


def _state(run: Any) -> str:
    return f"{run.state} (resumable)" if run.is_resumable else str(run.state)


def _run_summary(run: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(run), "job": run.job.model_dump(mode="json"), "best": run.best, "images_per_s": run.images_per_s}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) if seconds else ""


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.0f} h"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def _workspace(root: str, tracking_uri: str | None) -> WorkspaceConfig:
    from eagleray.config.load import build_section
    from eagleray.config.schema import WorkspaceConfig

    return build_section(WorkspaceConfig, {"root": root, "tracking_uri": tracking_uri}, "workspace")


def _table(*columns: str) -> Table:
    from rich import box

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    return table


def _write_json(path: Path | None, summary: Any) -> None:
    if path is not None:
        from eagleray.errors import StorageError

        try:
            path.write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"--json '{path}': cannot be written ({error.strerror}); give a file in a folder that exists") from None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
