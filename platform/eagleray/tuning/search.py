"""A search: which trials to run (Optuna), which to stop early (Ray Tune), and what came of it."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from eagleray import storage
from eagleray.artifacts.runs import load_run_job
from eagleray.config.load import with_values
from eagleray.config.schema import OBJECTIVES, JobConfig, SearchConfig
from eagleray.data.mixture import load_training_set
from eagleray.errors import ConfigError, SearchError
from eagleray.placement import cluster_for, on_group
from eagleray.training.failures import FINAL, reason_of, users_error
from eagleray.training.resources import WorkerResources, share_resources
from eagleray.tuning.proposals import MAX_REFUSED, Proposer, add_earlier_trials, fitting_sampler
from eagleray.tuning.scheduler import build_scheduler
from eagleray.tuning.search_space import FAMILY, apply_values
from eagleray.tuning.study import close_lost_trials, open_studies, study_url
from eagleray.tuning.trial import TrainingTrial

METRIC = "val_top1"
SNAPSHOT_S = "1"
"""Seconds between Ray Tune's snapshots, from which a search goes on whose driver has died."""

TRIALS_NAME = "trials.json"


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial; `status` is running, finished, stopped (by the scheduler) or failed."""

    trial_id: str
    values: dict[str, Any]
    status: str
    epochs: int
    val_top1: float
    """Best of its epochs."""
    seconds: float
    reason: str = ""
    """Why it failed."""
    checkpoint_uri: str = ""
    """State of its last epoch."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All objectives, of its best epoch by the first one of the search."""
    curve: list[float] = field(default_factory=list)
    """The first objective after each epoch."""
    gpu_seconds: float = 0.0
    """`seconds` times the GPUs that it held."""
    usd: float = 0.0
    """What that, and its CPUs, cost by `tune.prices`."""
    train_s: float = 0.0
    """Seconds of its epochs, validation included, from the first batch of each; what is left of `seconds` is overhead."""

    @property
    def family(self) -> str:
        return str(self.values[FAMILY])


@dataclass(frozen=True)
class SearchResult:
    run_name: str
    run_uri: str
    trials: list[TrialResult]
    best: TrialResult
    job: JobConfig
    """The job with the best trial's values, for training in full."""


def run_search(
    job: JobConfig,
    run_name: str,
    *,
    resume: bool = False,
    on_trial: Callable[[TrialResult], None] = lambda trial: None,
    on_message: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Search on the connected cluster and return all trials and the best.

    Args:
        job: as `check_space` and `check_inputs` let it pass.
        run_name: a run that `claim_run` has claimed.
        resume: go on with that run's search: what has ended stays, what has not goes on from its last epoch.
        on_trial: called in this process whenever a trial reports or ends.
        on_message: gets lines for the user.

    Raises:
        SearchError: every trial failed, or too many; or none is what `tune.select` asks for; says why.
    """
    search = job.tune
    assert search is not None
    cluster = cluster_for(min(search.max_concurrent or search.num_trials, search.num_trials) * search.num_workers, job.train.use_gpu)
    cluster["GPU"] = cluster.get("GPU", 0) * search.trials_per_gpu
    places = int(cluster["GPU"] or cluster.get("CPU", 1))
    concurrent = min(search.max_concurrent or max(1, places // search.num_workers), search.num_trials)
    resources = share_resources(cluster, concurrent * search.num_workers, job.train.use_gpu)
    resources = replace(resources, gpus=resources.gpus / search.trials_per_gpu)
    # All of a population begin before any of them is compared; those that have no room wait.
    population = search.num_trials if search.is_population else concurrent
    if search.gpu_hours is not None and not resources.gpus:
        raise SearchError(f"tune.gpu_hours {search.gpu_hours:g}: the trials hold no GPU; give tune.time_budget_s, or a cluster with GPUs")
    studies = open_studies(study_url(job, run_name), on_message)
    run_uri = storage.join(job.workspace.runs_uri, run_name)

    table = _TrialTable(on_trial, on_message, storage.join(run_uri, TRIALS_NAME), search, resources)
    filesystem, runs_path = storage.open_uri(job.workspace.runs_uri)
    proposer = Proposer(job, len(load_training_set(job.data).classes), population, run_name, studies, is_new=not resume)
    if not resume:
        _warm_start(job, proposer, on_message)
    if search.sampler == "auto":
        on_message("sampler {}: {}".format(*fitting_sampler(search)))
    trainable = tune.with_resources(
        tune.with_parameters(TrainingTrial, job=trial_job(job).model_dump(mode="json"), resources=resources, run_name=run_name),
        _placement(resources, search.num_workers),
    )
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT_S)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(population)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials,
            search_alg=proposer,
            scheduler=build_scheduler(search, concurrent),
            reuse_actors=True,
            time_budget_s=search.time_budget_s,
        ),
        run_config=tune.RunConfig(
            name=run_name,
            storage_path=runs_path,
            storage_filesystem=filesystem,
            # Two, as the newest may be newer than the last snapshot; of a population, others may go on from it meanwhile.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=4 if search.is_population else 2, checkpoint_frequency=1, checkpoint_at_end=True
            ),
            failure_config=tune.FailureConfig(max_failures=job.train.max_failures),
            verbose=0,
            callbacks=[table],
            stop=table,
        ),
    )
    experiment = f"{runs_path}/{run_name}"
    if resume and tune.Tuner.can_restore(experiment, filesystem):
        table.load()
        tuner = tune.Tuner.restore(experiment, trainable, storage_filesystem=filesystem)
        config = tuner._local_tuner.get_run_config()
        config.callbacks, config.stop = [table], table  # the one in the snapshot speaks to a process that has died
    grid = tuner.fit()
    close_lost_trials(optuna.load_study(study_name=run_name, storage=studies))
    prefix = "" if storage.is_local(run_uri) else "s3://"
    checkpoints = {result.metrics["trial_id"]: prefix + result.checkpoint.path for result in grid if result.checkpoint and result.metrics}
    trials = [replace(trial, checkpoint_uri=checkpoints.get(trial.trial_id, "")) for trial in table.results()]
    table.save(trials)
    if proposer.is_out_of_points and not trials:
        raise SearchError(f"tune.constraints: none of {MAX_REFUSED} points of the space is within them; loosen them, or widen the space")
    _check_failures(trials, search, run_name, run_uri)
    succeeded = [trial for trial in trials if trial.status != "failed" and trial.metrics]
    if not succeeded:
        raise SearchError(
            f"search '{run_name}': no trial has come to the end of an epoch; give tune.time_budget_s more time; see '{run_uri}'"
        )
    best = select_best(succeeded, search)
    return SearchResult(run_name, run_uri, trials, best, apply_values(job, best.values))


def _warm_start(job: JobConfig, proposer: Proposer, on_message: Callable[[str], None]) -> None:
    """Give Optuna what earlier searches of the workspace have found."""
    assert job.tune is not None
    earlier = []
    for name in job.tune.warm_start:
        kept = load_run_job(job.workspace.runs_uri, name)
        if kept.tune is None:
            raise SearchError(f"tune.warm_start: run '{name}' is no search; leave it out")
        if kept.tune.objectives != job.tune.objectives:
            raise SearchError(f"tune.warm_start: search '{name}' was for {', '.join(kept.tune.objectives)}; leave it out")
        earlier.append(optuna.load_study(study_name=name, storage=open_studies(study_url(kept, name))))
    if earlier:
        count = add_earlier_trials(proposer._ot_study, earlier)
        on_message(f"{count} trials of {', '.join(job.tune.warm_start)} are known from the start")


def _placement(resources: WorkerResources, num_workers: int) -> tune.PlacementGroupFactory:
    bundle = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    where = on_group("train")
    selector = {"bundle_label_selector": [where] * num_workers} if where else {}
    return tune.PlacementGroupFactory([bundle] * num_workers, **selector)


def select_best(trials: list[TrialResult], search: SearchConfig) -> TrialResult:
    """Return the trial that `tune.select` asks for, among those with metrics.

    Raises:
        SearchError: none is within the bounds; says how near they came.
    """
    rule = search.rule
    within = [trial for trial in trials if all(bounds.hold(trial.metrics[name]) for name, bounds in rule.where.items())]
    if not within:
        ranges = {name: sorted(trial.metrics[name] for trial in trials) for name in rule.where}
        found = ", ".join(f"{name} from {values[0]:.4g} to {values[-1]:.4g}" for name, values in ranges.items())
        raise SearchError(f"tune.select.where: none of {len(trials)} trials is within the bounds; they have {found}; loosen the bounds")
    return max(within, key=lambda trial: _merit(rule.best, trial.metrics))


def is_stuck(trials: list[TrialResult], search: SearchConfig) -> bool:
    """Tell whether the newest `tune.stop_without_progress` trials that ended have brought no new best."""
    merits = [_merit(search.objectives[0], trial.metrics) for trial in trials if trial.status in ("finished", "stopped") and trial.metrics]
    limit = search.stop_without_progress
    return limit is not None and len(merits) > limit and max(merits[-limit:]) <= max(merits[:-limit])


def is_spent(trials: list[TrialResult], search: SearchConfig) -> bool:
    """Tell whether trials have held as many GPU-hours, or cost as much, as they may."""
    hours = sum(trial.gpu_seconds for trial in trials) / 3600
    usd = sum(trial.usd for trial in trials)
    return (search.gpu_hours is not None and hours > search.gpu_hours) or (search.max_usd is not None and usd > search.max_usd)


def usd_per_hour(search: SearchConfig, resources: WorkerResources) -> float:
    """Return the price of what a trial holds."""
    return search.num_workers * (resources.gpus * search.prices.gpu_hour + resources.all_cpus * search.prices.cpu_hour)


def _merit(objective: str, metrics: dict[str, float]) -> float:
    """Return a number that is the greater the better."""
    return metrics[objective] if OBJECTIVES[objective] == "max" else -metrics[objective]


def check_same_search(job: JobConfig, kept: JobConfig, run_name: str) -> None:
    """Refuse to go on with a search by another job file than its own, but for how many trials there are at a time.

    Raises:
        ConfigError: names the first key that differs.
    """
    ours, its = (_flat(with_values(side, {"tune.max_concurrent": None}).model_dump(mode="json")) for side in (job, kept))
    for key in sorted(ours.keys() | its.keys()):
        if not key.startswith("serve.") and ours.get(key) != its.get(key):
            raise ConfigError(
                f"{key} is {ours.get(key)!r}, and {its.get(key)!r} in search '{run_name}': its trials would not compare; "
                "go on with the job file as it was, or start another search"
            )


def _flat(document: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(document, dict) or not document:
        return {at: document}
    return {key: value for name, inner in document.items() for key, value in _flat(inner, f"{at}.{name}" if at else name).items()}


def trial_job(job: JobConfig) -> JobConfig:
    """Return the job as its trials run it: the search's epochs and workers."""
    search = job.tune
    assert search is not None
    warmup = min(job.train.schedule.warmup_epochs, search.epochs / 4)
    changes = {"train.epochs": search.epochs, "train.schedule.warmup_epochs": warmup, "train.num_workers": search.num_workers}
    return with_values(job, changes)


def _check_failures(trials: list[TrialResult], search: SearchConfig, run_name: str, run_uri: str) -> None:
    """Raise SearchError where all trials have failed, or too many."""
    failed = [trial for trial in trials if trial.status == "failed"]
    if len(failed) <= search.max_failed_trials and len(failed) < max(1, len(trials)):
        return
    alike, count = Counter(_without_numbers(trial.reason) for trial in failed).most_common(1)[0]
    reason = next(trial.reason for trial in failed if _without_numbers(trial.reason) == alike)
    limit = f", more than tune.max_failed_trials {search.max_failed_trials}" if len(failed) > search.max_failed_trials else ""
    raise SearchError(
        f"search '{run_name}': {len(failed)} of {len(trials)} trials failed{limit}; the commonest reason ({count} of them): {reason}; "
        f"see '{run_uri}'"
    )


def _without_numbers(reason: str) -> str:
    """Return what a reason has in common with the same one elsewhere."""
    return re.sub(r"[-+\d.e]*\d", "#", reason)


class _TrialTable(tune.Callback, tune.Stopper):
    """Keeps one row per trial as Ray Tune reports, in a file too; ends a search as its failures and budgets say."""

    def __init__(
        self,
        on_trial: Callable[[TrialResult], None],
        on_message: Callable[[str], None],
        uri: str,
        search: SearchConfig,
        resources: WorkerResources,
    ) -> None:
        self._on_trial = on_trial
        self._on_message = on_message
        self._uri = uri
        self._search = search
        self._gpus = resources.gpus * search.num_workers
        self._usd_per_s = usd_per_hour(search, resources) / 3600
        self._rows: dict[str, TrialResult] = {}
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune saves its callbacks with the experiment; whoever listens here is of this process alone.
        return self.__dict__ | {"_on_trial": None, "_on_message": None}

    def results(self) -> list[TrialResult]:
        """Return all rows; to be called once the search has ended, in which no trial is left running."""
        return [replace(row, status="stopped") if row.status == "running" else row for row in self._rows.values()]

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        rows, search = list(self._rows.values()), self._search
        too_many_failed = sum(row.status == "failed" for row in rows) > search.max_failed_trials
        too_dear = is_spent(rows, search)
        return too_many_failed or too_dear or is_stuck(rows, search)

    def load(self) -> None:
        """Take over the rows of the driver before."""
        if storage.exists(self._uri):
            rows = (TrialResult(**row) for row in json.loads(storage.read_bytes(self._uri)))
            self._rows = {row.trial_id: row for row in rows}

    def save(self, rows: list[TrialResult]) -> None:
        storage.write_bytes(self._uri, json.dumps([asdict(row) for row in rows], indent=2).encode())

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._started.setdefault(trial.trial_id, time.monotonic() - self._row(trial).seconds)
        self._update(trial, status="running")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        metrics = {name: float(result[name]) for name in OBJECTIVES if name in result}
        row, first = self._row(trial), self._search.objectives[0]
        best = metrics if not row.metrics or _merit(first, metrics) > _merit(first, row.metrics) else row.metrics
        epochs = int(result["epoch"]) + 1  # one that a new driver is told of again takes its old place
        curve = [*row.curve[: epochs - 1], metrics[first]]
        train_s = row.train_s + result["epoch_s"] - result["first_batch_s"]
        self._update(trial, epochs=epochs, val_top1=max(row.val_top1, metrics[METRIC]), metrics=best, curve=curve, train_s=train_s)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        finished = bool(trial.last_result.get("is_last_epoch"))
        self._update(trial, status="finished" if finished else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = _error_of(trial)
        if isinstance(users_error(error), (*FINAL, SearchError)):
            trial.max_failures = 0  # Ray Tune tries once more, whatever it was
            return
        reason = reason_of(error) if error is not None else "no reason given"
        self._on_message(f"trial {trial.trial_id} failed ({reason}); it goes on from its newest checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._update(trial, status="failed", reason=_reason(trial))

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        # Ray Tune stores some errors only after it has told of them.
        for trial in trials:
            if self._row(trial).status == "failed":
                self._rows[trial.trial_id] = replace(self._row(trial), reason=_reason(trial))

    def _row(self, trial: Trial) -> TrialResult:
        return self._rows.get(trial.trial_id) or TrialResult(trial.trial_id, dict(trial.config), "running", 0, -math.inf, 0.0)

    def _update(self, trial: Trial, **changes: Any) -> None:
        seconds = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        row = replace(
            self._row(trial),
            values=dict(trial.config),
            seconds=seconds,
            gpu_seconds=seconds * self._gpus,
            usd=seconds * self._usd_per_s,
            **changes,
        )
        self._rows[trial.trial_id] = row
        self.save(list(self._rows.values()))
        self._on_trial(row)


def _error_of(trial: Trial) -> BaseException | None:
    """Return the error of a trial's last failure; None where Ray Tune kept none, or its class is not to be had here."""
    if trial.pickled_error_file is None:
        return None
    try:
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # a class of the user's may raise anything while it is loaded; the search is to go on
        return None
    return error


def _reason(trial: Trial) -> str:
    """Return the last line of the error with which a trial failed."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"
