"""Which trials go on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from eagleray.config.schema import OBJECTIVES, Distribution, SchedulerConfig, SearchConfig

PAUSED = "is_paused"
"""Key of a result after which its trial has paused; whoever proposes trials sees it."""


def build_scheduler(search: SearchConfig, max_running: int) -> TrialScheduler:
    """Return what stops trials; see `tune.scheduler`."""
    config, objective, max_epochs = search.scheduler, search.objectives[0], search.epochs
    if config is None:
        return FIFOScheduler()
    mode, grace = OBJECTIVES[objective], min(config.grace_epochs, max_epochs)
    match config.name:
        case "pausing_asha":
            return PausingAsha(config, objective, mode, max_epochs)
        case "median":
            return MedianStopping(metric=objective, mode=mode, grace_period=grace)
        case "pbt":
            return Population(search.mutable, objective, mode, grace, max_running)
        case _:
            return AsyncHyperBandScheduler(
                metric=objective,
                mode=mode,
                max_t=max_epochs,
                grace_period=grace,
                reduction_factor=config.reduction_factor,
                # Each begins to stop a rung later than the one before; the last stops none.
                brackets=1 + len(rungs(config, max_epochs)) if config.name == "hyperband" else 1,
            )


def rungs(config: SchedulerConfig, max_epochs: int) -> list[int]:
    """Return the epochs after which trials are compared."""
    found, epochs = [], config.grace_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= config.reduction_factor
    return found


class MedianStopping(MedianStoppingRule):
    """Ray's rule, but that trials go on where there are too few to be compared with; Ray's would pause them for others."""

    def __init__(self, metric: str, mode: str, grace_period: int) -> None:
        super().__init__(time_attr="training_iteration", metric=metric, mode=mode, grace_period=grace_period)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        return str(TrialScheduler.CONTINUE)


class Population(PopulationBasedTraining):
    """Population-based training (Jaderberg et al. 2017, arXiv:1711.09846), which waits for all of the population at each exchange.

    Ray's own refuses to begin with what a search algorithm proposes, and lets values leave their ranges.
    """

    def __init__(self, mutable: Mapping[str, Distribution], metric: str, mode: str, interval: int, max_running: int) -> None:
        super().__init__(
            time_attr="training_iteration",
            metric=metric,
            mode=mode,
            perturbation_interval=interval,
            hyperparam_mutations={key: _mutation(distribution) for key, distribution in mutable.items()},
            custom_explore_fn=partial(_within, mutable),
            log_config=False,
            synch=True,
        )
        self._max_running = max_running

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        if sum(trial.status == Trial.RUNNING for trial in tune_controller.get_trials()) >= self._max_running:
            return None
        chosen: Trial | None = super().choose_trial_to_run(tune_controller)
        return chosen


def _mutation(distribution: Distribution) -> Any:
    """Return what Ray draws a new value from; of choices it goes to a neighbour, too."""
    if distribution.choice is not None:
        return distribution.choice
    if distribution.uniform is not None:
        return tune.uniform(*distribution.uniform)
    if distribution.log_uniform is not None:
        return tune.loguniform(*distribution.log_uniform)
    assert distribution.integer is not None
    low, high = distribution.integer
    return tune.randint(low, high + 1)


def _within(mutable: Mapping[str, Distribution], values: dict[str, Any]) -> dict[str, Any]:
    """Return values that were changed, brought back into their ranges."""
    for key, distribution in mutable.items():
        bounds = distribution.uniform or distribution.log_uniform or distribution.integer
        if bounds is not None:
            values[key] = type(bounds[0])(min(max(values[key], bounds[0]), bounds[1]))
    return values


class PausingAsha(FIFOScheduler):
    """Asynchronous successive halving as published (Li et al. 2018, arXiv:1810.05934, algorithm 2).

    A trial that comes to a rung, after `grace_epochs * reduction_factor**k` epochs, pauses there and holds nothing but its
    checkpoint. It goes on once it is among the best `1/reduction_factor` of those that have come there, however many come
    later; Ray's own ASHA kills it where it is not so at that moment. When there is nothing else to run, those that still
    pause end; if none has come to its last epoch by then, the best of the highest rung goes on first.
    """

    def __init__(self, config: SchedulerConfig, metric: str, mode: str, max_epochs: int) -> None:
        super().__init__()
        self._metric = metric
        self._sign = 1.0 if mode == "max" else -1.0
        self._factor = config.reduction_factor
        self._rungs = rungs(config, max_epochs)
        self._scores: list[dict[str, float]] = [{} for _ in self._rungs]
        self._promoted: list[set[str]] = [set() for _ in self._rungs]
        self._chosen: set[str] = set()
        """Trials that are to go on and do not run yet."""
        self._has_finished = False

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a trial of a driver that has died for what its last epoch says."""
        epochs = int(trial.last_result.get("training_iteration", 0)) if trial.last_result else 0
        self._has_finished |= bool(trial.last_result and trial.last_result.get("is_last_epoch"))
        for rung, milestone in enumerate(self._rungs):
            if milestone <= epochs:
                self._scores[rung][trial.trial_id] = self._sign * trial.last_result[self._metric]
                if epochs > milestone:
                    self._promoted[rung].add(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self._chosen.discard(trial.trial_id)
        rung = self._rung_after(int(result["training_iteration"]))
        if rung is None:
            return str(TrialScheduler.CONTINUE)
        self._scores[rung].setdefault(trial.trial_id, self._sign * result[self._metric])
        if trial.trial_id in self._promoted[rung] or self._promote(rung, {trial.trial_id}):
            return str(TrialScheduler.CONTINUE)
        result[PAUSED] = True
        return str(TrialScheduler.PAUSE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._has_finished |= bool(result.get("is_last_epoch"))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trials = {trial.trial_id: trial for trial in tune_controller.get_trials()}
        paused = {name for name, trial in trials.items() if trial.status == Trial.PAUSED}
        pending = [name for name, trial in trials.items() if trial.status == Trial.PENDING]
        chosen = next((name for name in pending if name in self._chosen), None)
        for rung in reversed(range(len(self._rungs))):
            chosen = chosen or self._promote(rung, paused)
        is_over = not pending and tune_controller.search_alg.is_finished()
        if chosen is None and paused and is_over and not any(trial.status == Trial.RUNNING for trial in trials.values()):
            chosen = self._end(tune_controller, [trials[name] for name in sorted(paused)])
        if chosen is not None:
            self._chosen.add(chosen)
            return trials[chosen]
        return trials[pending[0]] if pending else None

    def _rung_after(self, epochs: int) -> int | None:
        return max((rung for rung, milestone in enumerate(self._rungs) if milestone <= epochs), default=None)

    def _promote(self, rung: int, candidates: set[str]) -> str | None:
        """Let the best candidate go on that belongs to the best of a rung and has not gone on before; return it."""
        scores = self._scores[rung]
        best = sorted(scores, key=lambda name: -scores[name])[: len(scores) // self._factor]
        chosen = next((name for name in best if name in candidates and name not in self._promoted[rung]), None)
        if chosen is not None:
            self._promoted[rung].add(chosen)
        return chosen

    def _end(self, tune_controller: Any, paused: list[Trial]) -> str | None:
        """End the search, or return the trial that has to go on first."""
        waiting = {trial.trial_id for trial in paused}
        for scores, promoted in zip(reversed(self._scores), reversed(self._promoted), strict=True):
            if not self._has_finished and waiting & scores.keys():
                best: str = max(waiting & scores.keys(), key=scores.__getitem__)
                promoted.add(best)
                return best
        for trial in paused:
            tune_controller.stop_trial(trial)
        return None
