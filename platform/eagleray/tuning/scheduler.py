"""Which trials go on: successive halving that pauses rather than kills."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from eagleray.config.schema import AshaConfig

PAUSED = "is_paused"
"""Key of a result after which its trial has paused; whoever proposes trials sees it."""


class PausingAsha(FIFOScheduler):
    """Asynchronous successive halving as published (Li et al. 2018, arXiv:1810.05934, algorithm 2).

    A trial that comes to a rung, after `grace_epochs * reduction_factor**k` epochs, pauses there and holds nothing but its
    checkpoint. It goes on once it is among the best `1/reduction_factor` of those that have come there, however many come
    later; Ray's own ASHA kills it where it is not so at that moment. When there is nothing else to run, those that still
    pause end; if none has come to its last epoch by then, the best of the highest rung goes on first.
    """

    def __init__(self, config: AshaConfig, metric: str, mode: str, max_epochs: int) -> None:
        super().__init__()
        self._metric = metric
        self._sign = 1.0 if mode == "max" else -1.0
        self._factor = config.reduction_factor
        self._rungs: list[int] = []
        epochs = config.grace_epochs
        while epochs < max_epochs:
            self._rungs.append(epochs)
            epochs *= config.reduction_factor
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
