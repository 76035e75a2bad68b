"""The verbs as functions: what `import eagleray` offers and what the command line calls.

Every function that needs a cluster connects to it for as long as it runs: `address=None` starts Ray
on this machine, `"auto"` or `host:port` joins one. Within a session that is connected already, that
one is used.
"""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eagleray import __version__, storage
from eagleray.config.load import load_job as load_job
from eagleray.config.schema import IngestConfig, JobConfig, ServingConfig, WorkspaceConfig
from eagleray.errors import ConfigError, Interrupted, RegistryError, ServingError, StorageError, TrainingError

if TYPE_CHECKING:
    import torch

    from eagleray.artifacts.lineage import Link
    from eagleray.artifacts.package import ModelCard
    from eagleray.artifacts.registry import ModelVersion, Registry
    from eagleray.artifacts.runs import RunInfo
    from eagleray.cluster.cost import Costs
    from eagleray.cluster.description import Cloud
    from eagleray.cluster.doctor import Check
    from eagleray.cluster.estimate import CostEstimate
    from eagleray.cluster.state import ClusterStatus
    from eagleray.cluster.submit import JobInfo
    from eagleray.data.shards import Manifest
    from eagleray.serving.access import ApiKey
    from eagleray.serving.experiment import Experiment
    from eagleray.training.board import Progress
    from eagleray.training.trainer import TrainingResult
    from eagleray.tuning.search import SearchResult, TrialResult


LEARNING_CURVE_NAME = "learning_curve.png"
TRAINING_LIBRARIES = ("torch", "pandas", "matplotlib.figure")
"""What training and searching import first; each takes a second or more."""


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
    search: str | None = None,
    address: str | None = None,
    on_epoch: Callable[[dict[str, float]], None] = _ignore,
    on_progress: Callable[[Progress], None] = _ignore,
    on_message: Callable[[str], None] = _ignore,
) -> TrainedModel:
    """Train the job's model, and register the best epoch's weights as a new version of `job.name`.

    Args:
        name: name of the run; by default the job's name and the time.
        resume: name of a run to go on with, after anything; its own stored job file counts then.
        alias: alias for the new version, such as `challenger`.
        search: name of the search that found the job; kept with the version.
        on_epoch: called with the metrics of each epoch, once it is safe.
        on_progress: called every second or so within epochs.
        on_message: called with a line on each fault, and how the run goes on.

    Raises:
        ConfigError, DataError, TrainingError, StorageError: says what and what to do.
        Interrupted: Ctrl-C or SIGTERM (in the main thread); a checkpoint has been saved.
    """
    from eagleray.cluster.connect import connected

    storage.check_access(job.workspace.root)
    with connected(address, needs=TRAINING_LIBRARIES):
        from eagleray.artifacts.checkpoint import load_state
        from eagleray.artifacts.pretrained import pin_pretrained
        from eagleray.artifacts.runs import claim_run, load_run_job, running
        from eagleray.data.mixture import load_training_set
        from eagleray.placement import keep_helpers_here
        from eagleray.training.board import EpochEnd, Message, News
        from eagleray.training.trainer import check_inputs, run_training

        if resume is not None:
            job = load_run_job(job.workspace.runs_uri, resume)
        keep_helpers_here()
        on_message(f"checked: {check_inputs(job)}")
        if resume is None:
            job = pin_pretrained(job, load_training_set(job.data).classes)
        run_name = resume or name or new_run_name(job.name)
        if resume is None:
            claim_run(job, run_name)
        run_uri = storage.join(job.workspace.runs_uri, run_name)
        with running(run_uri), _tracked_run(job, run_name, "train", resume=resume is not None) as (registry, run_id):

            def on_news(news: News) -> None:
                if isinstance(news, EpochEnd):
                    registry.log_metrics(run_id, news.metrics, step=int(news.metrics["epoch"]))
                    on_epoch(news.metrics)
                elif isinstance(news, Message):
                    on_message(news.text)
                else:
                    on_progress(news)

            with registry.system_metrics(run_id):
                training = run_training(job, run_name, on_news=on_news)
            weights = load_state(training.checkpoint_uri)["weights"]
            _save_curve(training, registry, run_id)
            version, metrics = register_weights(registry, run_id, job, run_name, weights, training.metrics, alias, search)
    return TrainedModel(training, version, metrics)


def list_runs(workspace: WorkspaceConfig) -> list[RunInfo]:
    """Return the training runs of a workspace, newest first."""
    from eagleray.artifacts.runs import load_run, run_names

    runs = [load_run(workspace.runs_uri, name) for name in run_names(workspace.runs_uri)]
    return sorted((run for run in runs if run.job.tune is None or run.history), key=lambda run: run.started, reverse=True)


def show_run(workspace: WorkspaceConfig, name: str, plot: str | Path | None = None) -> tuple[RunInfo, list[ModelVersion]]:
    """Return what is known of a run, running or not, and the versions registered from it.

    Args:
        plot: draw the learning curve so far into this PNG.

    Raises:
        TrainingError: there is no such run, or nothing to draw yet.
    """
    from eagleray.artifacts.runs import load_run

    run = load_run(workspace.runs_uri, name)
    if plot is not None:
        if not run.history:
            raise TrainingError(f"run '{name}' has finished no epoch yet: there is no learning curve to draw")
        _write_plot(Path(plot), run)
    return run, [version for version in open_registry(workspace).versions() if version.tags.get("run_name") == name]


def tune(
    job: JobConfig,
    *,
    name: str | None = None,
    resume: str | None = None,
    address: str | None = None,
    on_trial: Callable[[TrialResult], None] = _ignore,
    on_message: Callable[[str], None] = _ignore,
) -> SearchResult:
    """Search the job's space; `result.job` is the job with the best trial's values, ready for `train`.

    Args:
        name: name of the run; by default the job's name and the time.
        resume: name of a search to go on with, after anything.
        on_message: called with a line once the job has been checked against the cluster and the data, and on what was chosen.

    Raises:
        ConfigError: the space cannot be searched, or is not the one of the search to go on with.
        SearchError: every trial failed.
        TrainingError: there is no such search, or another process works on it.
    """
    from eagleray.cluster.connect import connected

    run_name = resume or name or new_run_name(f"{job.name}-tune")
    storage.check_access(job.workspace.root)
    with connected(address, needs=TRAINING_LIBRARIES):
        from eagleray.artifacts.pretrained import pin_pretrained
        from eagleray.artifacts.runs import claim_run, load_run_job, running
        from eagleray.data.mixture import load_training_set
        from eagleray.placement import keep_helpers_here
        from eagleray.training.trainer import check_inputs
        from eagleray.tuning.search import check_same_search, run_search
        from eagleray.tuning.search_space import check_space

        check_space(job)
        keep_helpers_here()
        on_message(f"checked: {check_inputs(job)}")
        job = pin_pretrained(job, load_training_set(job.data).classes)
        if resume is None:
            claim_run(job, run_name)
        else:
            check_same_search(job, load_run_job(job.workspace.runs_uri, resume), resume)
        run_uri = storage.join(job.workspace.runs_uri, run_name)
        with running(run_uri), _tracked_run(job, run_name, "tune", resume=resume is not None) as (registry, run_id):
            result = run_search(job, run_name, resume=resume is not None, on_trial=on_trial, on_message=on_message)
            registry.log_metrics(run_id, {"val_top1": result.best.val_top1, "trials": len(result.trials)}, step=0)
            return result


def report_search(workspace: WorkspaceConfig, name: str, directory: str | Path) -> Path:
    """Write a search's report, `report.html` and PNGs, into `directory`; return the page. Raises TrainingError, SearchError."""
    from eagleray.tuning.report import write_report

    return write_report(workspace.runs_uri, name, Path(directory))


def register_winner(
    search: SearchResult,
    reference: str,
    *,
    retrain: bool = True,
    address: str | None = None,
    on_epoch: Callable[[dict[str, float]], None] = _ignore,
    on_message: Callable[[str], None] = _ignore,
) -> ModelVersion:
    """Register a search's winner, trained in full as the run `SEARCH-winner`, or goes on with that run.

    Args:
        reference: `name` or `name@alias` of the new version.
        retrain: False: it is registered as its trial's last epoch left it. So is, in any case, the best of a population: its
            values changed on the way, and those that it ended with would not lead there.

    Raises:
        ConfigError: `reference` cannot be a model's name.
        As `train`.
    """
    from eagleray.artifacts.runs import run_names
    from eagleray.cluster.connect import connected

    alias = reference.partition("@")[2]
    search = replace(search, job=winner_job(search.job, reference))
    assert search.job.tune is not None
    if not retrain or search.job.tune.is_population:
        with connected(address):
            return register_trial(search, search.best, alias or None)
    run_name = f"{search.run_name}-winner"
    is_begun = run_name in run_names(search.job.workspace.runs_uri)
    trained = train(
        search.job,
        name=run_name,
        resume=run_name if is_begun else None,
        alias=alias or None,
        address=address,
        search=search.run_name,
        on_epoch=on_epoch,
        on_message=on_message,
    )
    return trained.version


def winner_job(job: JobConfig, reference: str) -> JobConfig:
    """Return the job under the name that a `name` or `name@alias` gives its model. Raises ConfigError if that cannot be a name."""
    from eagleray.config.load import with_values

    return with_values(job, {"name": reference.partition("@")[0]})


def register_trial(search: SearchResult, trial: TrialResult, alias: str | None = None) -> ModelVersion:
    """Register a trial of a search, as its last epoch left it, as a new version; Ray must be connected."""
    from eagleray.artifacts.checkpoint import load_state
    from eagleray.tuning.search import trial_job
    from eagleray.tuning.search_space import apply_values

    job = apply_values(trial_job(search.job), trial.values)
    run_name = f"{search.run_name}-{trial.trial_id}"
    weights = load_state(trial.checkpoint_uri)["weights"]
    with _tracked_run(job, run_name, "trial") as (registry, run_id):
        metrics = {"val_top1": trial.val_top1}
        return register_weights(registry, run_id, job, run_name, weights, metrics, alias, search.run_name)[0]


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

    from eagleray.demo import run_quickstart

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


def export_model(workspace: WorkspaceConfig, reference: str, target: str, *, encrypt: bool = False) -> str:
    """Verify a version's package and copy it to `target`; returns the target's URI.

    Args:
        encrypt: each file becomes one that only the password in `EAGLERAY_PACKAGE_PASSWORD` opens (see `decrypt_package`).
    """
    from eagleray.artifacts import signing
    from eagleray.artifacts.package import load_examples, load_package

    version = open_registry(workspace).resolve(reference)
    card, _ = load_package(version.package_uri)
    load_examples(version.package_uri, card)
    if not encrypt:
        storage.copy_tree(version.package_uri, target)
        return storage.normalize_uri(target)
    for uri in storage.list_files(version.package_uri):
        name = uri.rpartition("/")[2]
        storage.write_bytes(storage.join(target, f"{name}{signing.ENCRYPTED_SUFFIX}"), signing.encrypt(storage.read_bytes(uri), name))
    return storage.normalize_uri(target)


def decrypt_package(source: str, target: str) -> str:
    """Decrypt what `export_model` has encrypted into `target`; returns the target's URI.

    Raises:
        RegistryError: nothing encrypted there, another password, or a file was changed.
    """
    from eagleray.artifacts import signing

    encrypted = [uri for uri in storage.list_files(source) if uri.endswith(signing.ENCRYPTED_SUFFIX)]
    if not encrypted:
        raise RegistryError(
            f"'{source}': no encrypted package there (no *{signing.ENCRYPTED_SUFFIX}); give what `models export --encrypt` wrote"
        )
    for uri in encrypted:
        name = uri.rpartition("/")[2].removesuffix(signing.ENCRYPTED_SUFFIX)
        storage.write_bytes(storage.join(target, name), signing.decrypt(storage.read_bytes(uri), name))
    return storage.normalize_uri(target)


def verify_model(
    workspace: WorkspaceConfig, reference: str, *, trusted_keys: Sequence[str] = (), with_shards: bool = False
) -> tuple[ModelVersion, list[Link]]:
    """Walk from a version, or from the answer that an endpoint gave, back to its data; see `artifacts.lineage.verify_lineage`.

    Args:
        reference: `name@alias`, `name:version`, or the `request_id` of an answer.

    Raises:
        RegistryError: no such version, or it has no package.
        ServingError: the request id was not issued by an endpoint of this workspace.
    """
    from eagleray.artifacts.lineage import verify_lineage

    registry = open_registry(workspace)
    if "." in reference and not {":", "@"} & set(reference):
        from eagleray.serving.outcomes import version_of

        version = version_of(registry, reference)
    else:
        version = registry.resolve(reference)
    return version, verify_lineage(registry, version, code_version(), trusted_keys=trusted_keys, with_shards=with_shards)


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
    from eagleray.serving.experiment import Variant, new_experiment

    registry = open_registry(workspace)
    resolved = {variant: registry.resolve(reference) for variant, reference in versions.items()}
    names = {version.name for version in resolved.values()}
    if len(names) != 1:
        raise ServingError(
            f"{', '.join(sorted(names))}: the variants of an endpoint are versions of one model; deploy each model by itself"
        )
    model = names.pop()
    experiment = new_experiment(model, [Variant(name=name, version=v.version, weight=1.0) for name, v in resolved.items()])
    with connected(address):
        url = endpoint.deploy(model, resolved, experiment, config or ServingConfig(), workspace.experiments_uri)
        computed_by = {name: row["backend"] for name, row in endpoint.status()["models"][model]["variants"].items()}
    registry.save_experiment(model, experiment.model_dump(mode="json"))
    served = {name: version.version for name, version in resolved.items()}
    registry.record_event(model, "deployed", {"url": url, "experiment": experiment.id, "versions": served, "backends": computed_by})
    return url


def serve_status(address: str | None = "auto") -> dict[str, Any]:
    """Return what the endpoint on a cluster serves: its address, and per model its variants and their traffic."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        return endpoint.status()


def serve_stop(address: str | None = "auto") -> None:
    """Take the endpoint on a cluster down, after its log is written. Raises ServingError where there is none."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import endpoint

    with connected(address):
        endpoint.status()
        endpoint.shutdown()


def add_key(keys_uri: str, name: str, role: str = "predict", requests_per_s: float | None = None) -> str:
    """Make an API key and return its secret, which is kept nowhere. Raises ServingError, StorageError."""
    from eagleray.serving import access

    return access.add_key(keys_uri, name, role, requests_per_s)


def list_keys(keys_uri: str) -> list[ApiKey]:
    """Return an endpoint's API keys, without their secrets. Raises ServingError, StorageError."""
    from eagleray.serving import access

    return access.list_keys(keys_uri)


def revoke_key(keys_uri: str, name: str) -> None:
    """Delete an API key; endpoints refuse it within seconds. Raises ServingError, StorageError."""
    from eagleray.serving import access

    access.revoke_key(keys_uri, name)


def ab_start(
    workspace: WorkspaceConfig,
    name: str,
    challengers: Mapping[str, str],
    traffic: Mapping[str, float],
    *,
    address: str | None = "auto",
    **settings: Any,
) -> Experiment:
    """Compare other versions with the one of `name` that is served; see `serving.ab.start` for the settings."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import ab

    with connected(address):
        return ab.start(open_registry(workspace), name, challengers, traffic, **settings)


def ab_status(workspace: WorkspaceConfig, name: str, *, address: str | None = "auto") -> dict[str, Any]:
    """Return the figures of the experiment on `name`: shares, latencies, outcomes, and the difference with its interval."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import ab

    with connected(address):
        return ab.status(open_registry(workspace), name)


def ab_set_weights(workspace: WorkspaceConfig, name: str, weights: Mapping[str, float], *, address: str | None = "auto") -> Experiment:
    """Change the split between the variants; the figures start anew."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import ab

    with connected(address):
        return ab.set_weights(open_registry(workspace), name, weights)


def ab_promote(workspace: WorkspaceConfig, name: str, variant: str | None = None, *, address: str | None = "auto") -> Experiment:
    """End the experiment: the challenger becomes `champion` and gets all traffic, without a failed request."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import ab

    with connected(address):
        return ab.promote(open_registry(workspace), name, variant)


def ab_abort(workspace: WorkspaceConfig, name: str, *, address: str | None = "auto") -> Experiment:
    """End the experiment: all traffic returns to the champion."""
    from eagleray.cluster.connect import connected
    from eagleray.serving import ab

    with connected(address):
        return ab.abort(open_registry(workspace), name)


def submit(
    job: JobConfig,
    address: str,
    *,
    verb: str | None = None,
    name: str | None = None,
    resume: str | None = None,
    serves: bool = False,
    queue: str | None = None,
) -> str:
    """Start `train` or `tune` with `job` on a cluster (`http://head:8265`), or go on with the run `resume`; return the job's id.

    See `cluster.submit.submit_job`.
    """
    from eagleray.cluster.submit import submit_job

    run = resume or name or new_run_name(job.name)
    return submit_job(job, address, run=run, verb=verb, resume=resume is not None, serves=serves, queue=queue)


def resubmit(submission_id: str, address: str, *, fresh: bool = False) -> str:
    """Submit an ended job again, to go on with its run or, `fresh`, with a new one; return the new job's id. Raises ClusterError."""
    from eagleray.cluster import submit

    name = new_run_name(submit.job_status(submission_id, address).run) if fresh else None
    return submit.resubmit_job(submission_id, address, fresh_run=name)


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


def stop_job(submission_id: str, address: str) -> JobInfo | None:
    """Stop a submitted job; return what became of it, None where it had ended before; see `cluster.submit`."""
    from eagleray.cluster import submit

    return submit.stop_job(submission_id, address)


def cluster_status(address: str) -> ClusterStatus:
    """Return a cluster's nodes, what is used of them, and what waits for room; `address` is its job server's. Raises ClusterError."""
    from eagleray.cluster import state

    return state.cluster_status(address)


def cluster_costs(address: str, description: str | Path, cloud: Cloud) -> tuple[Costs, list[JobInfo]]:
    """Return what a cluster and each of its jobs have cost at the prices of a description, and the jobs; see `cluster.cost`."""
    from eagleray.cluster.cost import cluster_costs
    from eagleray.cluster.description import load_description

    return cluster_costs(address, load_description(description), cloud)


def versions_by_job(jobs: Iterable[JobInfo]) -> dict[str, list[str]]:
    """Return by job id the `name:version` of what was registered from its run; a job whose registry does not answer, or that another version of eagleray submitted, may be left out."""
    from eagleray.config.load import build_job

    found: dict[str, list[str]] = {}
    references: dict[WorkspaceConfig, dict[str, list[str]]] = {}
    for info in jobs:
        if not info.job_file:
            continue
        with suppress(ConfigError, RegistryError, StorageError):
            workspace = build_job(yaml.safe_load(info.job_file), source=info.submission_id).workspace
            if workspace not in references:
                references[workspace] = defaultdict(list)
                for version in open_registry(workspace).versions():
                    references[workspace][version.tags.get("run_name", "")].append(version.reference)
            found[info.submission_id] = references[workspace][info.run]
    return found


def estimate_cost(
    job: JobConfig,
    description: str | Path,
    cloud: Cloud,
    *,
    images_per_s: float | None = None,
    pictures: int | None = None,
    num_classes: int | None = None,
) -> CostEstimate:
    """Return what a job would cost on a cluster of that description; see `cluster.estimate`.

    Args:
        images_per_s: of one worker; by default from the network's work.
        pictures: of an epoch and `num_classes`, where the data are not there yet; by default from the data.

    Raises:
        ConfigError: no cluster of that description can run it, or its speed is not known.
        DataError: the data cannot be read.
    """
    from eagleray.cluster.description import load_description
    from eagleray.cluster.estimate import estimate_cost
    from eagleray.data.mixture import load_training_set
    from eagleray.data.shards import load_manifest

    validation = 0
    if pictures is None or num_classes is None:
        training_set = load_training_set(job.data)
        pictures = pictures or training_set.plan(job.train.global_batch_size, job.data.lanes, None, None).num_rows
        num_classes = num_classes or len(training_set.classes)
        validation = load_manifest(job.data.val).num_rows
    return estimate_cost(
        job,
        load_description(description),
        cloud,
        num_classes=num_classes,
        train_pictures=pictures,
        val_pictures=validation,
        images_per_s=images_per_s,
    )


def render_cluster(description: str | Path, directory: str | Path) -> list[Path]:
    """Write the files of a cluster description for the clouds it speaks of into `directory`; return them.

    Raises:
        ConfigError: the description cannot be.
        StorageError: a file cannot be written.
    """
    from eagleray.cluster.description import load_description
    from eagleray.cluster.render import render

    paths = []
    for name, text in render(load_description(description)).items():
        paths.append(Path(directory) / name)
        storage.write_bytes(str(paths[-1]), text.encode())
    return paths


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
    search: str | None = None,
) -> tuple[ModelVersion, dict[str, float]]:
    """Measure weights on the test split, package them with their lineage, and register them as a version."""
    from eagleray.artifacts.package import ModelCard, save_package
    from eagleray.artifacts.runs import load_quarantine
    from eagleray.data.inspection import example_pictures
    from eagleray.data.mixture import load_training_set
    from eagleray.data.transforms import Preprocessing

    kept = {key: value for key, value in metrics.items() if key.startswith("val_")}
    if job.data.test is not None:
        from eagleray.training.evaluation import evaluate_weights

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
    card = save_package(package_uri, weights, card, example_pictures(job.data.val, card.preprocessing, job.data.examples))
    tags = {
        "architecture": job.model.name,
        "data_digest": card.data_digest,
        "weights_sha256": card.weights_sha256,
        "code_version": card.code_version,
        "run_name": run_name,
        **({"search": search} if search is not None else {}),
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
def _tracked_run(job: JobConfig, run_name: str, kind: str, *, resume: bool = False) -> Iterator[tuple[Registry, str]]:
    """Open an MLflow run for the block, or go on with the one of that name, and close it with what became of it."""
    registry = open_registry(job.workspace)
    run_id = (registry.reopen_run(run_name, job) if resume else None) or registry.start_run(run_name, job, _run_tags(job, kind))
    status = "KILLED"
    try:
        yield registry, run_id
        status = "FINISHED"
    except Interrupted:
        raise
    except Exception:
        status = "FAILED"
        raise
    finally:
        registry.end_run(run_id, status)


def _run_tags(job: JobConfig, kind: str) -> dict[str, str]:
    """Return what a run depends on besides its job file."""
    from importlib.metadata import version

    from eagleray.data.mixture import load_training_set

    code, _, commit = code_version().partition(" ")
    tags = {"kind": kind, "code_version": f"{code} {commit}".strip(), "data_digest": load_training_set(job.data).digest}
    if commit:
        tags |= {"git_commit": commit.removesuffix("+changes"), "git_dirty": str(commit.endswith("+changes")).lower()}
    return tags | {f"{package}_version": version(package) for package in ("ray", "torch")}


def _save_curve(training: TrainingResult, registry: Registry, run_id: str) -> None:
    from eagleray.training.curve import plot_learning_curve

    curve = plot_learning_curve(training.history, training.run_name)
    storage.write_bytes(storage.join(training.run_uri, LEARNING_CURVE_NAME), curve)
    registry.log_artifact(run_id, LEARNING_CURVE_NAME, curve)


def _write_plot(path: Path, run: RunInfo) -> None:
    from eagleray.training.curve import plot_learning_curve

    try:
        path.write_bytes(plot_learning_curve(run.history, run.name))
    except OSError as error:
        raise StorageError(f"'{path}': the plot cannot be written ({error.strerror}); give a file in a folder that exists") from None


def _flat(document: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(document, dict):
        return {prefix: document}
    return {key: value for name, part in document.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
