"""The search space of a job file as an Optuna define-by-run function.

The architecture family is chosen first, then the parameters that only this family has, then the
dotted keys of the job file that all share. A trial's values are flat: `model.name`,
`resnet_cifar.depth`, `train.optimizer.lr`.
"""

from __future__ import annotations

from typing import Any

import optuna

from eagleray.config.load import load_function, with_values
from eagleray.config.schema import Distribution, JobConfig, ModelConfig, SearchConfig
from eagleray.errors import ConfigError
from eagleray.models.zoo import check_model

FAMILY = "model.name"


CHECKED_POINTS = 20
"""Points at random that a space given by a function is checked with."""


def suggest_point(search: SearchConfig, trial: optuna.Trial) -> dict[str, Any] | None:
    """Ask an Optuna trial for every value of one point of the space; return what a function of the user's adds."""
    family = trial.suggest_categorical(FAMILY, list(search.families))
    for key, distribution in search.families[family].items():
        _suggest(trial, f"{family}.{key}", distribution)
    for key, distribution in search.space.items():
        _suggest(trial, key, distribution)
    if search.space_function is None:
        return None
    more: dict[str, Any] | None = load_function("tune.space_function", search.space_function)(trial)
    return more


def apply_values(job: JobConfig, values: dict[str, Any]) -> JobConfig:
    """Return `job` with one point of its search space filled in, checked again.

    Raises:
        ConfigError: the values together make a job that cannot be.
    """
    assert job.tune is not None
    family = values[FAMILY]
    params = {key: values[f"{family}.{key}"] for key in job.tune.families[family]}
    shared = {key: value for key, value in values.items() if key != FAMILY and not key.startswith(f"{family}.")}
    return with_values(job, {"model.name": family, "model.params": params, **shared})


def check_space(job: JobConfig) -> None:
    """Refuse a space with an unknown architecture, parameter or key, or a value the job file would not take.

    Raises:
        ConfigError: names the key.
    """
    if job.tune is None:
        raise ConfigError(f"job '{job.name}' has no 'tune' section; add one with families and num_trials (see jobs/quickstart.yaml)")
    if job.model.pretrained is not None and set(job.tune.families) != {job.model.name}:
        raise ConfigError(
            f"tune.families {', '.join(job.tune.families)}: model.pretrained is for model.name '{job.model.name}'; "
            "make that the only family, or leave model.pretrained out"
        )
    for family, params in job.tune.families.items():
        try:
            check_model(ModelConfig(name=family, params=dict.fromkeys(params)))
        except ConfigError as error:
            raise ConfigError(f"tune.families.{family}: {error}") from None
    if job.tune.num_workers > 1 and job.train.parallelism == "fsdp":
        raise ConfigError(
            f"tune.num_workers {job.tune.num_workers}: trials do not cut networks up; set train.parallelism: ddp, or tune.num_workers: 1"
        )
    trial = _checked("tune.num_workers", job, {"train.num_workers": job.tune.num_workers})
    for key, distribution in job.tune.space.items():
        for value in _corners(distribution):
            for either in (job, trial):
                _checked(f"tune.space.{key}", either, {key: value})
    if job.tune.space_function is not None:
        _check_function(job, job.tune)


def _check_function(job: JobConfig, search: SearchConfig) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(CHECKED_POINTS):
        trial = study.ask()
        try:
            more = suggest_point(search, trial)
            apply_values(job, trial.params | (more or {}))
        except Exception as error:  # of the user's code, too
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            raise ConfigError(f"tune.space_function '{search.space_function}' at {trial.params}: {kind}{error}") from error


def _checked(what: str, job: JobConfig, values: dict[str, Any]) -> JobConfig:
    try:
        return with_values(job, values)
    except ConfigError as error:
        raise ConfigError(f"{what}: {str(error).removeprefix('job: ')}") from None


def _suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> None:
    if distribution.choice is not None:
        trial.suggest_categorical(name, distribution.choice)
    elif distribution.uniform is not None:
        trial.suggest_float(name, *distribution.uniform)
    elif distribution.log_uniform is not None:
        trial.suggest_float(name, *distribution.log_uniform, log=True)
    elif distribution.integer is not None:
        trial.suggest_int(name, *distribution.integer)


def _corners(distribution: Distribution) -> list[Any]:
    bounds = distribution.choice or distribution.uniform or distribution.log_uniform or distribution.integer
    return list(bounds or ())
