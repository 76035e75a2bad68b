"""The verbs as functions: what `import eagleray` offers and what the command line calls.

Every function that needs a cluster connects to it for as long as it runs: `address=None` starts Ray
on this machine, `"auto"` or `host:port` joins one. Within a session that is connected already, that
one is used.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray import __version__, storage
from eagleray.config.load import load_job as load_job
from eagleray.config.schema import IngestConfig, JobConfig, ServingConfig, WorkspaceConfig
from eagleray.errors import ServingError

if TYPE_CHECKING:
    import torch

    from eagleray.artifacts.package import ModelCard
    from eagleray.artifacts.registry import ModelVersion, Registry
    from eagleray.cluster.doctor import Check
    from eagleray.cluster.submit import JobInfo
    from eagleray.data.shards import Manifest
    from eagleray.serving.experiment import Experiment
    from eagleray.training.trainer import TrainingResult
    from eagleray.tuning.search import SearchResult, TrialResult


LEARNING_CURVE_NAME = "learning_curve.png"


def _ignore(*arguments: Any) -> None:
    """Default of the progress callbacks."""


@dataclass(frozen=True)
class TrainedModel:
    """What `train` leaves: the run and the version it registered."""

    training: TrainingResult
    version: ModelVersion
    metrics: dict[str, float]
    """Of the registered weights: validation, and test where the job names a test split."""


def ingest(
    source: str,
    target: str,
    config: IngestConfig | None = None,
    *,
    seed: int = 0,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = _ignore,
) -> dict[str, Manifest]:
    """Write the pictures of `source` as shards and a manifest under `target`; one data set per split.

    Args:
        source: `imagefolder:PATH`, `imagenet:…`, `webdataset:…`, `parquet:…`, `idx:…`, `cifar:…`, `csv:…`, or a folder.
        target: local folder or s3:// URI.
        on_progress: called with (pictures done, pictures in all), first with those that an earlier run had finished.

    Raises:
        ConfigError: settings that do not fit the source.
        DataError: no such source, no pictures, too many unreadable ones, `target` holds something else, or another
            ingest is writing there.
        StorageError: the source cannot be read, or `target` cannot be written.
    """
    from eagleray.cluster.connect import connected
    from eagleray.data.claim import check_unclaimed
    from eagleray.data.ingest import ingest as run_ingest

    storage.check_access(target)
    check_unclaimed(target)
    with connected(address):
        return run_ingest(source, target, config or IngestConfig(), seed=seed, progress=on_progress)


def show_data(uri: str, contact_sheet: str | Path | None = None) -> dict[str, Any]:
    """Return what the data set at `uri` holds; with `contact_sheet`, also draw samples of each class into that PNG."""
    from eagleray.data import inspection

    description = inspection.describe(uri)
    if contact_sheet is not None:
        inspection.contact_sheet(uri, contact_sheet)
    return description


def verify_data(uri: str) -> list[str]:
    """Check every shard at `uri` against the manifest; return what is damaged, nothing if all is well."""
    from eagleray.data import inspection

    return inspection.verify(uri)


def train(
    job: JobConfig,
    *,
    name: str | None = None,
    resume: str | None = None,
    alias: str | None = None,
    address: str | None = None,
    on_epoch: Callable[[dict[str, float]], None] = _ignore,
) -> TrainedModel:
    """Train the job's model, and register the best checkpoint as a new version of `job.name`.

    Args:
        name: name of the run; by default the job's name and the time.
        resume: name of a run to go on with, after anything; its own stored job file counts then.
        alias: alias for the new version, such as `challenger`.

    Raises:
        ConfigError, DataError, TrainingError: says what and what to do.
    """
    from eagleray.cluster.connect import connected

    storage.check_access(job.workspace.root)
    with connected(address):
        from eagleray.training.trainer import check_inputs, claim_run, load_checkpoint, load_run_job, run_training

        if resume is not None:
            job = load_run_job(job.workspace.runs_uri, resume)
        check_inputs(job)
        run_name = resume or name or new_run_name(job.name)
        if resume is None:
            claim_run(job, run_name)
        with _tracked_run(job, run_name, "train") as (registry, run_id):

            def record(metrics: dict[str, float]) -> None:
                registry.log_metrics(run_id, metrics, step=int(metrics["epoch"]))
                on_epoch(metrics)

            training = run_training(job, run_name, on_epoch=record)
            weights = load_checkpoint(training.checkpoint_uri)["weights"]
            _save_curve(training)
            version, metrics = register_weights(registry, run_id, job, run_name, weights, training.metrics, alias)
    return TrainedModel(training, version, metrics)


def tune(
    job: JobConfig,
    *,
    name: str | None = None,
    address: str | None = None,
    on_trial: Callable[[TrialResult], None] = _ignore,
) -> SearchResult:
    """Search the job's space; `result.job` is the job with the best trial's values, ready for `train`.

    Raises:
        ConfigError: the space cannot be searched.
        SearchError: every trial failed.
    """
    from eagleray.cluster.connect import connected

    run_name = name or new_run_name(f"{job.name}-tune")
    storage.check_access(job.workspace.root)
    with connected(address):
        from eagleray.training.trainer import check_inputs, claim_run
        from eagleray.tuning.search import run_search
        from eagleray.tuning.search_space import check_space

        check_space(job)
        check_inputs(job)
        claim_run(job, run_name)
        with _tracked_run(job, run_name, "tune") as (registry, run_id):
            result = run_search(job, run_name, on_trial=on_trial)
            registry.log_metrics(run_id, {"val_top1": result.best.val_top1, "trials": len(result.trials)}, step=0)
            return result


def register_trial(search: SearchResult, trial: TrialResult, alias: str | None = None) -> ModelVersion:
    """Register a trial of a search, as its last epoch left it, as a new version; Ray must be connected."""
    from eagleray.training.trainer import load_checkpoint
    from eagleray.tuning.search import trial_job
    from eagleray.tuning.search_space import apply_values

    job = apply_values(trial_job(search.job), trial.values)
    run_name = f"{search.run_name}-{trial.trial_id}"
    weights = load_checkpoint(trial.checkpoint_uri)["weights"]
    with _tracked_run(job, run_name, "trial") as (registry, run_id):
        return register_weights(registry, run_id, job, run_name, weights, {"val_top1": trial.val_top1}, alias)[0]


def list_models(workspace: WorkspaceConfig, name: str | None = None) -> list[ModelVersion]:
    """Return all versions in the registry, or those of one model, newest first."""
    return open_registry(workspace).versions(name)


def show_model(workspace: WorkspaceConfig, reference: str) -> tuple[ModelVersion, ModelCard]:
    """Return a version and its card; `reference` is `name@alias` or `name:version`."""
    from eagleray.artifacts.package import load_card

    version = open_registry(workspace).resolve(reference)
    return version, load_card(version.package_uri)


def compare_models(workspace: WorkspaceConfig, first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two versions: key → (first's value, second's value)."""
    sides = [_flat(show_model(workspace, reference)[1].model_dump(mode="json")) for reference in (first, second)]
    keys = sorted(sides[0].keys() | sides[1].keys())
    return {key: (sides[0].get(key), sides[1].get(key)) for key in keys if sides[0].get(key) != sides[1].get(key)}


def promote_model(workspace: WorkspaceConfig, reference: str, alias: str = "champion") -> ModelVersion:
    """Give `alias` to a version; what is served changes with `serve` or `ab_promote`, not by this."""
    registry = open_registry(workspace)
    version = registry.resolve(reference)
    registry.set_alias(version.name, alias, version.version)
    registry.record_event(version.name, "alias", {"alias": alias, "version": version.version})
    return registry.resolve(reference)


def quickstart(
    *,
    data: str | None = None,
    directory: str | Path | None = None,
    use_s3: bool = False,
    address: str | None = None,
    port: int = 8000,
    stay: bool = False,
) -> dict[str, Any]:
    """Go the whole way from pictures to an A/B-tested endpoint and return the summary; see `eagleray quickstart --help`."""
    from rich.console import Console

    from eagleray.quickstart import run_quickstart

    return run_quickstart(
        Console(),
        data=data,
        directory=Path(directory) if directory else None,
        use_s3=use_s3,
        address=address,
        port=port,
        stay=stay,
        json_path=None,
        overrides=[],
    )


def export_model(workspace: WorkspaceConfig, reference: str, target: str) -> str:
    """Verify a version's package and copy it to `target`; returns the target's URI."""
    from eagleray.artifacts.package import load_package

    version = open_registry(workspace).resolve(reference)
    load_package(version.package_uri)
    storage.copy_tree(version.package_uri, target)
    return storage.normalize_uri(target)


def serve(workspace: WorkspaceConfig, versions: dict[str, str], config: ServingConfig | None = None, *, address: str | None = None) -> str:
    """Serve versions behind one endpoint, users split evenly among them, and return the endpoint's address.

    The endpoint lives as long as its cluster: with `address=None` call this within `connected()`.

    Args:
        versions: variant name → reference (`imagenet@champion`, `imagenet:7`), all of one model; the first is the control.

    Raises:
        RegistryError: no such version, or its package does not verify.
        ServingError: the port is taken, or a version does not come up.
    """
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint
    from eagleray.serving.experiment import Variant

    registry = open_registry(workspace)
    resolved = {variant: registry.resolve(reference) for variant, reference in versions.items()}
    names = {version.name for version in resolved.values()}
    if len(names) != 1:
        raise ServingError(
            f"{', '.join(sorted(names))}: the variants of an endpoint are versions of one model; deploy each model by itself"
        )
    model = names.pop()
    experiment = endpoint.new_experiment(model, [Variant(name=name, version=v.version, weight=1.0) for name, v in resolved.items()])
    with connected(address):
        url = endpoint.deploy(model, resolved, experiment, config or ServingConfig(), workspace.experiments_uri)
    registry.save_experiment(model, experiment.model_dump(mode="json"))
    registry.record_event(model, "deployed", {"url": url, "versions": {name: version.version for name, version in resolved.items()}})
    return url


def serve_status(address: str | None = "auto") -> dict[str, Any]:
    """Return what the endpoint on a cluster serves: its address, and per model its variants and their traffic."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.status()


def ab_start(
    workspace: WorkspaceConfig, name: str, challenger: str, traffic_fraction: float, *, address: str | None = "auto"
) -> Experiment:
    """Send a fraction of the users of `name` to another version; see `endpoint.ab_start`."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.ab_start(open_registry(workspace), name, challenger, traffic_fraction)


def ab_status(workspace: WorkspaceConfig, name: str, *, address: str | None = "auto") -> dict[str, Any]:
    """Return the figures of the experiment on `name`: shares, latencies, outcomes, and the difference with its interval."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.ab_status(open_registry(workspace), name)


def ab_promote(workspace: WorkspaceConfig, name: str, variant: str | None = None, *, address: str | None = "auto") -> Experiment:
    """End the experiment: the challenger becomes `champion` and gets all traffic, without a failed request."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.ab_promote(open_registry(workspace), name, variant)


def ab_abort(workspace: WorkspaceConfig, name: str, *, address: str | None = "auto") -> Experiment:
    """End the experiment: all traffic returns to the champion."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.ab_abort(open_registry(workspace), name)


def submit(job: JobConfig, address: str, *, verb: str | None = None, name: str | None = None) -> str:
    """Start `train` or `tune` with `job` on a cluster (`http://head:8265`); return the job's id. See `cluster.submit.submit_job`."""
    from eagleray.cluster.submit import submit_job

    return submit_job(job, address, verb=verb, name=name)


def list_jobs(address: str) -> list[JobInfo]:
    """Return the submitted jobs of a cluster, newest first."""
    from eagleray.cluster import submit

    return submit.list_jobs(address)


def job_status(submission_id: str, address: str) -> JobInfo:
    """Return what became of a submitted job."""
    from eagleray.cluster import submit

    return submit.job_status(submission_id, address)


def job_logs(submission_id: str, address: str, *, follow: bool = False) -> Iterator[str]:
    """Yield the log of a submitted job in pieces; with `follow`, until it ends."""
    from eagleray.cluster import submit

    return submit.job_logs(submission_id, address, follow=follow)


def stop_job(submission_id: str, address: str) -> bool:
    """Stop a submitted job; return False where it had ended before."""
    from eagleray.cluster import submit

    return submit.stop_job(submission_id, address)


def doctor(address: str | None = None, uri: str | None = None, port: int = 8000) -> list[Check]:
    """Look at this machine's set-up; each check says what is wrong and what to do."""
    from eagleray.cluster.doctor import diagnose

    return diagnose(address=address, uri=uri, port=port)


def open_registry(workspace: WorkspaceConfig) -> Registry:
    """Return the registry of a workspace; it is created when first used."""
    from eagleray.artifacts.registry import Registry

    return Registry(workspace)


def register_weights(
    registry: Registry,
    run_id: str,
    job: JobConfig,
    run_name: str,
    weights: dict[str, torch.Tensor],
    metrics: dict[str, float],
    alias: str | None,
) -> tuple[ModelVersion, dict[str, float]]:
    """Measure weights on the test split, package them with their lineage, and register them as a version."""
    from eagleray.artifacts.package import ModelCard, save_package
    from eagleray.data.mixture import load_training_set
    from eagleray.data.transforms import Preprocessing
    from eagleray.training.evaluation import evaluate_weights
    from eagleray.training.trainer import load_quarantine

    kept = {key: value for key, value in metrics.items() if key.startswith("val_")}
    if job.data.test is not None:
        kept |= evaluate_weights(job, weights, job.data.test, "test")
    training_set = load_training_set(job.data)
    card = ModelCard(
        name=job.name,
        model=job.model,
        classes=training_set.classes,
        preprocessing=Preprocessing.of(job.data),
        metrics=kept,
        run_name=run_name,
        data_digest=training_set.digest,
        quarantined=load_quarantine(storage.join(job.workspace.runs_uri, run_name)),
        job=job.model_dump(mode="json"),
        code_version=code_version(),
    )
    package_uri = storage.join(job.workspace.models_uri, job.name, run_name)
    card = save_package(package_uri, weights, card)
    tags = {
        "architecture": job.model.name,
        "data_digest": card.data_digest,
        "weights_sha256": card.weights_sha256,
        "code_version": card.code_version,
        "run_name": run_name,
        **{key: f"{value:.6g}" for key, value in kept.items()},
    }
    version = registry.register(job.name, package_uri, run_id, tags)
    if alias is not None:
        registry.set_alias(job.name, alias, version.version)
        registry.record_event(job.name, "alias", {"alias": alias, "version": version.version})
    return registry.resolve(f"{job.name}:{version.version}"), kept


def new_run_name(prefix: str) -> str:
    """Return `prefix` and the time to the second, in UTC."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def code_version() -> str:
    """Return the package's version and, in a git checkout, the commit, marked `+changes` if it has any."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--", ".") else ""
        return f"{__version__} {git('rev-parse', '--short=12', 'HEAD')}{changes}"
    except (OSError, subprocess.SubprocessError):
        return __version__


@contextmanager
def _tracked_run(job: JobConfig, run_name: str, kind: str) -> Iterator[tuple[Registry, str]]:
    """Open an MLflow run for the block, and close it with what became of it."""
    registry = open_registry(job.workspace)
    run_id = registry.start_run(run_name, job, {"kind": kind, "code_version": code_version()})
    status = "KILLED"
    try:
        yield registry, run_id
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        registry.end_run(run_id, status)


def _save_curve(training: TrainingResult) -> None:
    from eagleray.training.curve import plot_learning_curve

    if training.history:
        storage.write_bytes(storage.join(training.run_uri, LEARNING_CURVE_NAME), plot_learning_curve(training.history, training.run_name))


def _flat(document: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(document, dict):
        return {prefix: document}
    return {key: value for name, part in document.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
