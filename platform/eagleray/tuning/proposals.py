"""Which points of a space are tried: Optuna's samplers, within constraints, with what earlier searches have found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from eagleray.config.schema import OBJECTIVES, JobConfig, SearchConfig
from eagleray.errors import SearchError
from eagleray.models.size import network_size
from eagleray.tuning.scheduler import PAUSED
from eagleray.tuning.search_space import FAMILY, apply_values, suggest_point

MAX_GP_TRIALS = 100
"""Up to which the Gaussian process is taken by itself: its own time grows with the cube of the trials."""

MAX_REFUSED = 200
"""Points in a row outside the constraints after which the space counts as having none inside."""


class Proposer(OptunaSearch):
    """Optuna's proposals for Ray Tune.

    A point that `tune.constraints` rule out is told to Optuna as pruned, and costs no training. A trial that pauses is told
    as pruned with its epochs so far, so that the sampler learns from it; if it goes on, Optuna gets a row more for what it
    has come to. No more trials than `max_concurrent` run at a time; those that pause do not count.
    """

    def __init__(
        self, job: JobConfig, num_classes: int, max_concurrent: int, study_name: str, storage: BaseStorage, *, is_new: bool
    ) -> None:
        search = job.tune
        assert search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Optuna takes several objectives as lists; of one it also keeps the epochs' values.
        names = search.objectives if len(search.objectives) > 1 else search.objectives[0]
        super().__init__(
            space=partial(suggest_point, search),
            metric=names,
            mode=[OBJECTIVES[name] for name in search.objectives] if isinstance(names, list) else OBJECTIVES[names],
            sampler=build_sampler(search, job.seed),
            study_name=study_name,
            storage=storage,
            # Each family gets a trial before the sampler begins to compare them.
            points_to_evaluate=[{FAMILY: family} for family in search.families] if is_new else None,
        )
        self._job = job
        self._num_classes = num_classes
        self._max_running = max_concurrent
        self._running: set[str] = set()
        self._paused: dict[str, FrozenTrial] = {}
        """What Optuna was told of trials that paused."""
        self.is_out_of_points = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._running) >= self._max_running:
            return None
        for _ in range(MAX_REFUSED):
            point: dict[str, Any] = super().suggest(trial_id)
            if within_constraints(self._job, point, self._num_classes):
                self._running.add(trial_id)
                return point
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.PRUNED)
        self.is_out_of_points = True
        return str(Searcher.FINISHED)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._paused:
            self._running.add(trial_id)  # it goes on
            if not isinstance(self.metric, list):
                self._paused[trial_id].intermediate_values[int(result["training_iteration"])] = result[self.metric]
        else:
            super().on_trial_result(trial_id, result)
        if result.get(PAUSED):
            self._running.discard(trial_id)
            self._note_pause(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        was_running = trial_id in self._running
        self._running.discard(trial_id)
        if trial_id not in self._paused:
            super().on_trial_complete(trial_id, result, error)
        elif was_running and result and not error:
            told = self._paused[trial_id]
            names = self.metric if isinstance(self.metric, list) else [self.metric]
            self._add(told, TrialState.COMPLETE, [result[name] for name in names])

    def _note_pause(self, trial_id: str) -> None:
        told = self._paused.get(trial_id)
        if told is not None:
            self._add(told, TrialState.PRUNED, None)
            return
        number = self._ot_trials[trial_id].number
        self._ot_study.tell(number, state=TrialState.PRUNED)
        self._paused[trial_id] = self._ot_study.get_trials(deepcopy=True)[number]

    def _add(self, told: FrozenTrial, state: TrialState, values: list[float] | None) -> None:
        steps = told.intermediate_values
        row = optuna.trial.create_trial(
            state=state, values=values, params=told.params, distributions=told.distributions, intermediate_values=dict(steps)
        )
        self._ot_study.add_trial(row)


def within_constraints(job: JobConfig, values: dict[str, Any], num_classes: int) -> bool:
    """Tell whether a point's network is within `tune.constraints`."""
    assert job.tune is not None
    if not job.tune.constraints:
        return True
    trial = apply_values(job, values)
    size = network_size(trial.model, num_classes, trial.data.image_size)
    return all(bounds.hold(getattr(size, name)) for name, bounds in job.tune.constraints.items())


def add_earlier_trials(study: optuna.Study, earlier: Iterable[optuna.Study]) -> int:
    """Add to a study what others with the same objectives have found at points of its space; return how many.

    Optuna itself leaves out of account what does not fit the space, dimension by dimension.

    Raises:
        SearchError: an earlier study has other objectives.
    """
    count = 0
    for other in earlier:
        if other.directions != study.directions:
            raise SearchError(f"tune.warm_start: search '{other.study_name}' has other objectives; leave it out")
        rows = [row for row in other.get_trials(deepcopy=False) if row.state in (TrialState.COMPLETE, TrialState.PRUNED) and row.params]
        for row in rows:
            values = row.values if row.state == TrialState.COMPLETE else None
            copy = optuna.trial.create_trial(
                state=row.state,
                values=values,
                params=row.params,
                distributions=row.distributions,
                intermediate_values=row.intermediate_values,
                user_attrs={"from": other.study_name},
            )
            study.add_trial(copy)
        count += len(rows)
    return count


def build_sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    """Return what proposes the next point; see `tune.sampler`."""
    samplers: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
        "tpe": partial(optuna.samplers.TPESampler, multivariate=True, group=True),  # grouping is what conditional spaces need
        "gp": optuna.samplers.GPSampler,
        "cmaes": partial(optuna.samplers.CmaEsSampler, warn_independent_sampling=False),
        "nsga2": optuna.samplers.NSGAIISampler,
        "nsga3": optuna.samplers.NSGAIIISampler,
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.BruteForceSampler,
    }
    name = search.sampler if search.sampler != "auto" else fitting_sampler(search)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return samplers[name](seed=seed)


def fitting_sampler(search: SearchConfig) -> tuple[str, str]:
    """Return the sampler that `auto` stands for, and why."""
    if search.is_population:
        return "random", "a population begins anywhere"
    dimensions = [*search.space.values(), *(dimension for family in search.families.values() for dimension in family.values())]
    obstacles = {
        f"there are {len(search.objectives)} objectives": len(search.objectives) > 1,
        f"there are {len(search.families)} families, each with parameters of its own": len(search.families) > 1,
        "the space is a function": search.space_function is not None,
        "some dimensions are choices": any(dimension.choice is not None for dimension in dimensions),
        "there are constraints": bool(search.constraints),
        f"there are more than {MAX_GP_TRIALS} trials": search.num_trials > MAX_GP_TRIALS,
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
    return ("tpe", obstacle) if obstacle else ("gp", "one objective, one family, and every dimension is a number")
