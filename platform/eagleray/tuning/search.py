"""A search: which trials to run (Optuna), which to stop early (ASHA), and what came of it."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

from eagleray import storage
from eagleray.config.load import with_values
from eagleray.config.schema import JobConfig, SearchConfig
from eagleray.errors import SearchError
from eagleray.training.resources import share_resources
from eagleray.tuning.search_space import FAMILY, apply_values, suggest_point
from eagleray.tuning.trial import TrainingTrial

METRIC = "val_top1"
STUDY_DB = "study.db"
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


def run_search(job: JobConfig, run_name: str, *, on_trial: Callable[[TrialResult], None] = lambda trial: None) -> SearchResult:
    """Search on the connected cluster and return all trials and the best.

    Args:
        job: as `check_space` and `check_inputs` let it pass.
        run_name: a run that `claim_run` has claimed.
        on_trial: called in this process whenever a trial reports or ends.

    Raises:
        SearchError: every trial failed; says why.
    """
    search = job.tune
    assert search is not None
    cluster = ray.cluster_resources()
    concurrent = search.max_concurrent or max(1, int(cluster.get("GPU", 0) or cluster.get("CPU", 1)))
    resources = share_resources(cluster, min(concurrent, search.num_trials), job.train.use_gpu)
    study_url = _study_url(job, run_name)
    run_uri = storage.join(job.workspace.runs_uri, run_name)

    callback = _TrialTable(on_trial)
    filesystem, runs_path = storage.open_uri(job.workspace.runs_uri)
    trainable = tune.with_parameters(TrainingTrial, job=trial_job(job).model_dump(mode="json"), resources=resources)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials,
            max_concurrent_trials=concurrent,
            search_alg=_search_alg(search, run_name, study_url, job.seed),
            scheduler=_scheduler(search),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=run_name,
            storage_path=runs_path,
            storage_filesystem=filesystem,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=True),
            verbose=0,
            callbacks=[callback],
        ),
    )
    grid = tuner.fit()
    prefix = "" if storage.is_local(run_uri) else "s3://"
    checkpoints = {result.metrics["trial_id"]: prefix + result.checkpoint.path for result in grid if result.checkpoint and result.metrics}
    trials = [replace(trial, checkpoint_uri=checkpoints.get(trial.trial_id, "")) for trial in callback.results()]
    storage.write_bytes(storage.join(run_uri, TRIALS_NAME), json.dumps([asdict(trial) for trial in trials], indent=2).encode())
    succeeded = [trial for trial in trials if trial.status != "failed" and math.isfinite(trial.val_top1)]
    if not succeeded:
        reason = trials[0].reason if trials else "no trial was started"
        raise SearchError(f"search '{run_name}': all {len(trials)} trials failed; the first: {reason}; see '{run_uri}'")
    best = max(succeeded, key=lambda trial: trial.val_top1)
    return SearchResult(run_name, run_uri, trials, best, apply_values(job, best.values))


def trial_job(job: JobConfig) -> JobConfig:
    """Return the job as its trials run it: the search's epochs, one worker."""
    search = job.tune
    assert search is not None
    warmup = min(job.train.schedule.warmup_epochs, search.epochs / 4)
    return with_values(job, {"train.epochs": search.epochs, "train.schedule.warmup_epochs": warmup, "train.num_workers": 1})


def _search_alg(search: SearchConfig, study_name: str, study_url: str, seed: int) -> OptunaSearch:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # grouping is what conditional spaces need
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
    return OptunaSearch(
        space=partial(suggest_point, search),
        metric=METRIC,
        mode="max",
        sampler=sampler,
        study_name=study_name,
        storage=optuna.storages.RDBStorage(study_url),
        # Each family gets a trial before TPE begins to compare them.
        points_to_evaluate=[{FAMILY: family} for family in search.families],
    )


def _scheduler(search: SearchConfig) -> AsyncHyperBandScheduler | None:
    if search.scheduler is None:
        return None
    return AsyncHyperBandScheduler(
        metric=METRIC,
        mode="max",
        max_t=search.epochs,
        grace_period=min(search.scheduler.grace_epochs, search.epochs),
        reduction_factor=search.scheduler.reduction_factor,
    )


def _study_url(job: JobConfig, run_name: str) -> str:
    assert job.tune is not None
    if job.tune.storage is not None:
        return job.tune.storage
    if not storage.is_local(job.workspace.root):
        raise SearchError(
            f"tune.storage is needed where workspace.root is on S3 ('{job.workspace.root}'): "
            "give an Optuna URL, for example postgresql://user@host/optuna or sqlite:////absolute/path/study.db"
        )
    return f"sqlite:///{storage.join(job.workspace.runs_uri, run_name, STUDY_DB)}"


class _TrialTable(tune.Callback):
    """Keeps one row per trial as Ray Tune reports."""

    def __init__(self, on_trial: Callable[[TrialResult], None]) -> None:
        self._on_trial = on_trial
        self._rows: dict[str, TrialResult] = {}
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune saves its callbacks with the experiment; whoever listens here is of this process alone.
        return self.__dict__ | {"_on_trial": None}

    def results(self) -> list[TrialResult]:
        return list(self._rows.values())

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._started.setdefault(trial.trial_id, time.monotonic())
        self._update(trial, status="running")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        best = max(self._row(trial).val_top1, result[METRIC])
        self._update(trial, epochs=int(result["epoch"]) + 1, val_top1=best)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        finished = bool(trial.last_result.get("is_last_epoch"))
        self._update(trial, status="finished" if finished else "stopped")

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
        row = replace(self._row(trial), seconds=seconds, **changes)
        self._rows[trial.trial_id] = row
        self._on_trial(row)


def _reason(trial: Trial) -> str:
    """Return the last line of the error with which a trial failed."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"
