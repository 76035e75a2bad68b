"""The command line: a thin skin over `eagleray.api` that parses, shows progress and prints.

Exit codes: 0 done, 1 a check or a job failed, 2 the input or set-up is wrong (one line says what), 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eagleray import __version__
from eagleray.cluster.connect import prepare_environment
from eagleray.errors import EagleRayError

if TYPE_CHECKING:
    from eagleray.config.schema import WorkspaceConfig

HELP = "From raw pictures to a served, A/B-tested image classifier on one Ray cluster, from one job file."

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(help="Look at an ingested data set.", no_args_is_help=True)
models_app = typer.Typer(help="The registry: versions, their lineage and aliases.", no_args_is_help=True)
serve_app = typer.Typer(help="Serve registered models over HTTP.", no_args_is_help=True)
ab_app = typer.Typer(help="A/B-test served versions.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs on a cluster.", no_args_is_help=True)
for group, name in ((data_app, "data"), (models_app, "models"), (serve_app, "serve"), (ab_app, "ab"), (jobs_app, "jobs")):
    app.add_typer(group, name=name)

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

JobFile = Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the job file: a.b=c. May be repeated.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join (host:port or 'auto'); by default Ray is started here.", envvar="EAGLERAY_ADDRESS")
]
ServeAddress = Annotated[
    str, typer.Option(help="Ray cluster that serves (host:port, or 'auto' for the one on this machine).", envvar="EAGLERAY_ADDRESS")
]
JobsAddress = Annotated[str, typer.Option("--address", help="Ray's job server: http://head:8265.")]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run; by default the job's name and the time.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the summary to this file.")]
Root = Annotated[str, typer.Option(help="Workspace: the job file's workspace.root.", envvar="EAGLERAY_ROOT")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; by default SQLite in the workspace.", envvar="MLFLOW_TRACKING_URI")
]
DEFAULT_ROOT = "./eagleray"


def main() -> None:
    """Run the command line; errors meant for the user become one line and exit code 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
        os.environ["EAGLERAY_DEBUG"] = "1"
    prepare_environment()
    try:
        app()
    except EagleRayError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}")
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
    from eagleray.quickstart import run_quickstart

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
    address: Address = None,
    json_path: JsonPath = None,
) -> None:
    """Train the job's model by DDP and register the best checkpoint."""
    from eagleray import api

    job = api.load_job(job_file, overrides)
    console.print(
        f"training {job.model.name} on {' + '.join(part.uri for part in job.data.train_parts)}: {job.train.epochs} epochs, batch {job.train.global_batch_size}, {job.train.max_workers} worker(s)"
    )
    trained = api.train(
        job, name=name, resume=resume, alias=alias, address=address, on_epoch=lambda m: console.print(epoch_line(m, job.train.epochs))
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


@app.command()
def tune(
    job_file: JobFile,
    overrides: Overrides = None,
    name: RunName = None,
    address: Address = None,
    json_path: JsonPath = None,
) -> None:
    """Search architectures and hyperparameters; prints the trials and the best job."""
    from eagleray import api

    job = api.load_job(job_file, overrides)
    result = api.tune(job, name=name, address=address, on_trial=print_trial(console))
    console.print(trials_table(result))
    console.print(f"search: {result.run_uri}")
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
            "trials": [vars(trial) for trial in result.trials],
        },
    )


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
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Verify a version's package and copy it: weights.safetensors and card.json."""
    from eagleray import api

    console.print(f"exported to {api.export_model(_workspace(root, tracking_uri), reference, target)}")


@serve_app.command("deploy")
def serve_deploy(
    reference: Annotated[str, typer.Argument(help="name@alias or name:version.")],
    challenger: Annotated[str | None, typer.Option(help="A second version of the model; users are split evenly.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(help="Replicas of each version.")] = 1,
    address: Address = None,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve a version over HTTP; on a cluster it stays up, without --address until Ctrl-C."""
    from eagleray import api
    from eagleray.cluster.connect import connected
    from eagleray.config.load import build_section
    from eagleray.config.schema import ServingConfig

    versions = {"champion": reference} | ({"challenger": challenger} if challenger else {})
    config = build_section(ServingConfig, {"host": host, "port": port, "num_replicas": replicas}, "serve")
    with connected(address):
        url = api.serve(_workspace(root, tracking_uri), versions, config, address=address)
        model = api.open_registry(_workspace(root, tracking_uri)).resolve(reference).name
        console.print(f"endpoint {url}\ntry it   curl -s --data-binary @picture.jpg {url}/predict/{model}\ndocs     {url}/docs")
        if address is None:
            console.print("Serving until Ctrl-C.")
            wait_for_interrupt()


@serve_app.command("status")
def serve_status(address: ServeAddress = "auto", json_path: JsonPath = None) -> None:
    """What the endpoint on a cluster serves."""
    from eagleray import api

    status = api.serve_status(address)
    table = _table("model", "variant", "version", "traffic", "state")
    for name, model in status["models"].items():
        for variant, row in model["variants"].items():
            table.add_row(name, variant, str(row["version"]), f"{100 * row['traffic']:.0f} %", row["state"])
    console.print(f"endpoint {status['address']}")
    console.print(table)
    _write_json(json_path, status)


@ab_app.command("start")
def ab_start(
    name: Annotated[str, typer.Argument(help="A model that is served.")],
    challenger: Annotated[str, typer.Option(help="Version number or reference.")],
    traffic: Annotated[str, typer.Option(help="Share of the users for the challenger, such as 10%.")] = "10%",
    address: ServeAddress = "auto",
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Send a share of the users to another version."""
    from eagleray import api

    experiment = api.ab_start(_workspace(root, tracking_uri), name, challenger, _fraction("--traffic", traffic), address=address)
    shares = ", ".join(
        f"{variant.name} {name}:{variant.version} {100 * experiment.shares[variant.name]:.0f} %" for variant in experiment.variants
    )
    console.print(f"experiment {experiment.id}: {shares}")


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
    table = _table("variant", "version", "requests", "share", "errors", "p50 ms", "p99 ms", "outcomes", "success")
    for variant, row in report["variants"].items():
        cells = (row["requests"], _percent(row["share"]), row["errors"], _short(row["p50_ms"]), _short(row["p99_ms"]), row["outcomes"])
        table.add_row(variant, str(row["version"]), *(str(cell) for cell in cells), _percent(row["success_rate"]))
    console.print(table)
    for line in difference_lines(report):
        console.print(line)
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
    address: Annotated[str, typer.Option(help="Ray's job server: http://head:8265.")],
    verb: Annotated[str | None, typer.Option(help="train or tune; by default tune where the job has a tune section.")] = None,
    overrides: Overrides = None,
    name: RunName = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once instead of following the log.")] = False,
) -> None:
    """Run a job file on a cluster; Ctrl-C leaves the job running. Exits 1 if the job fails."""
    from eagleray import api

    job = api.load_job(job_file, overrides)
    submission = api.submit(job, address, verb=verb, name=name)
    console.print(f"submitted {submission}")
    console.print(
        f"follow it: eagleray jobs logs {submission} --address {address} --follow\nstop it:   eagleray jobs stop {submission} --address {address}"
    )
    if detach:
        return
    _follow(submission, address)


@jobs_app.command("list")
def jobs_list(address: JobsAddress) -> None:
    """Jobs of a cluster, newest first."""
    from eagleray import api

    table = _table("job", "status", "started", "entrypoint")
    for job in api.list_jobs(address):
        table.add_row(job.submission_id, job.status, f"{job.started:%Y-%m-%d %H:%M:%S}" if job.started else "", _escape(job.entrypoint))
    console.print(table)


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

    console.print(f"{submission_id}: {'stopped' if api.stop_job(submission_id, address) else 'had ended before'}")


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


def wait_for_interrupt() -> None:
    """Return when the user presses Ctrl-C (or the process is asked to end)."""
    import signal
    from contextlib import suppress

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with suppress(KeyboardInterrupt):
        signal.pause()


def _follow(submission_id: str, address: str) -> None:
    from eagleray import api

    try:
        for text in api.job_logs(submission_id, address, follow=True):
            console.out(text, end="")
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; follow it: eagleray jobs logs {submission_id} --address {address} --follow")
        return
    job = api.job_status(submission_id, address)
    console.print(f"{submission_id}: {job.status}")
    if job.status != "SUCCEEDED":
        raise typer.Exit(1)


def difference_lines(report: dict[str, Any]) -> list[str]:
    """Return one line for each variant on how its success rate differs from the control's."""
    lines = []
    for variant, difference in report["differences"].items():
        if difference["estimate"] is None:
            lines.append(f"{variant} − {report['control']}: no outcomes yet")
            continue
        estimate, lower, upper = (100 * difference[key] for key in ("estimate", "lower", "upper"))
        confidence = f"{100 * (1 - difference['alpha']):g} % confidence at any time"
        lines.append(f"{variant} − {report['control']}: {estimate:+.1f} points ({lower:+.1f} to {upper:+.1f} with {confidence})")
    return lines


def epoch_line(metrics: dict[str, float], epochs: int) -> str:
    """Return one line on an epoch."""
    return (
        f"epoch {int(metrics['epoch']) + 1:>3}/{epochs}  loss {metrics['train_loss']:.3f}  val loss {metrics['val_loss']:.3f}  "
        f"val top-1 {100 * metrics['val_top1']:5.1f} %  {metrics['images_per_s']:,.0f} images/s  {100 * metrics['data_wait_fraction']:.0f} % waiting for data"
    )


def print_trial(to: Console) -> Any:
    """Return a callback that prints one line when a trial ends."""

    def on_trial(trial: Any) -> None:
        if trial.status == "running":
            return
        values = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.values.items() if key != "model.name")
        end = f"[red]{_escape(trial.reason)}[/]" if trial.status == "failed" else f"val top-1 {100 * trial.val_top1:5.1f} %"
        to.print(
            f"trial {trial.trial_id}  {trial.family:<14} {trial.status:<8} {trial.epochs:>2} epochs  {end}  {trial.seconds:4.1f} s  [dim]{values}[/]"
        )

    return on_trial


def trials_table(result: Any) -> Table:
    """Return the trials of a search as a table, best first."""
    table = _table("trial", "architecture", "val top-1", "status", "epochs", "seconds", "values")
    for trial in sorted(result.trials, key=lambda t: -t.val_top1):
        values = ", ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.values.items() if key != "model.name")
        table.add_row(
            trial.trial_id, trial.family, f"{100 * trial.val_top1:.1f} %", trial.status, str(trial.epochs), f"{trial.seconds:.1f}", values
        )
    return table


def winner_overrides(result: Any) -> dict[str, Any]:
    """Return the dotted keys that turn the searched job into the winner's."""
    family = result.best.family
    params = {key.removeprefix(f"{family}."): value for key, value in result.best.values.items() if key.startswith(f"{family}.")}
    shared = {key: value for key, value in result.best.values.items() if key != "model.name" and not key.startswith(f"{family}.")}
    return {"model.name": family, "model.params": params, **shared}


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
