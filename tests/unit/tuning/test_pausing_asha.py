"""Successive halving that pauses, on trials whose score is known beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from eagleray.config.schema import SchedulerConfig
from eagleray.tuning.scheduler import PAUSED, PausingAsha

MAX_EPOCHS = 9
CONFIG = SchedulerConfig(name="pausing_asha", grace_epochs=1, reduction_factor=3)


@dataclass
class FakeTrial:
    trial_id: str
    score: float
    status: str = Trial.PENDING
    epochs: int = 0
    last_result: dict[str, Any] = field(default_factory=dict)


@dataclass
class Controller:
    """What Ray Tune does with a scheduler, an epoch of a trial at a time, in `slots` slots."""

    scheduler: PausingAsha
    scores: list[float]
    slots: int = 2
    trials: list[FakeTrial] = field(default_factory=list)
    most_running: int = 0

    @property
    def search_alg(self) -> Controller:
        return self

    def is_finished(self) -> bool:
        return len(self.trials) == len(self.scores)

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def stop_trial(self, trial: FakeTrial) -> None:
        assert trial.status == Trial.PAUSED
        trial.status = Trial.TERMINATED

    def running(self) -> list[FakeTrial]:
        return [trial for trial in self.trials if trial.status == Trial.RUNNING]

    def run(self, random_: random.Random) -> None:
        for _ in range(10_000):
            while len(self.running()) < self.slots:
                if not any(trial.status == Trial.PENDING for trial in self.trials) and not self.is_finished():
                    self.trials.append(FakeTrial(f"t{len(self.trials):03}", self.scores[len(self.trials)]))
                    self.scheduler.on_trial_add(self, self.trials[-1])
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is None:
                    break
                assert chosen.status in (Trial.PENDING, Trial.PAUSED)
                chosen.status = Trial.RUNNING
            self.most_running = max(self.most_running, len(self.running()))
            if self.running():
                self.step(random_.choice(self.running()))
            elif self.is_finished() and all(trial.status == Trial.TERMINATED for trial in self.trials):
                return
        raise AssertionError("it never ends")

    def step(self, trial: FakeTrial) -> None:
        trial.epochs += 1
        result = {"training_iteration": trial.epochs, "val_top1": trial.score, "is_last_epoch": trial.epochs == MAX_EPOCHS}
        trial.last_result = result
        if trial.epochs == MAX_EPOCHS:
            trial.status = Trial.TERMINATED
            self.scheduler.on_trial_complete(self, trial, result)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        assert (decision == TrialScheduler.PAUSE) == (PAUSED in result)
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED


def searched(scores: list[float], seed: int = 0, mode: str = "max") -> list[FakeTrial]:
    controller = Controller(PausingAsha(CONFIG, "val_top1", mode, MAX_EPOCHS), scores)
    controller.run(random.Random(seed))
    assert controller.most_running == min(2, len(scores))
    return controller.trials


@pytest.mark.parametrize("seed", range(8))
def test_the_best_reach_the_end_whenever_they_came(seed: int) -> None:
    """Twenty-seven trials, whose best comes at any time: a third of each rung goes on, and the best is among them."""
    scores = random.Random(seed).sample(range(100), 27)
    trials = searched([float(score) for score in scores], seed)
    ended = {trial.score: trial.epochs for trial in trials}
    assert ended[max(scores)] == MAX_EPOCHS
    assert set(ended.values()) <= {1, 3, 9}
    assert 9 <= sum(epochs >= 3 for epochs in ended.values()) <= 18, "a third, and those that were among the best for a while"


def test_one_that_was_not_among_the_best_at_first_goes_on_later() -> None:
    """The third comes to its rung behind two better ones that fail nothing: as more come, it is among the best third."""
    trials = searched([0.9, 0.8, 0.7] + [0.1] * 6)
    assert [trial.epochs for trial in trials[:3]] == [9, 3, 3]


def test_the_smaller_is_the_better_where_it_is_said_so() -> None:
    trials = searched([0.5, 0.1, 0.9], mode="min")
    assert [trial.epochs for trial in trials] == [1, 9, 1]


def test_of_fewer_trials_than_a_rung_needs_the_best_goes_to_the_end() -> None:
    assert [trial.epochs for trial in searched([0.2, 0.4])] == [1, 9]


def test_a_new_driver_takes_up_the_rungs() -> None:
    scheduler = PausingAsha(CONFIG, "val_top1", "max", MAX_EPOCHS)
    for number, score in enumerate((0.9, 0.3, 0.2)):
        result = {"training_iteration": 1, "val_top1": score, "is_last_epoch": False}
        scheduler.on_trial_add(None, FakeTrial(f"t{number}", score, last_result=result))
    weak, strong = ({"training_iteration": 2, "val_top1": score} for score in (0.3, 0.9))
    assert scheduler.on_trial_result(None, FakeTrial("t1", 0.3), weak) == TrialScheduler.PAUSE
    assert scheduler.on_trial_result(None, FakeTrial("t0", 0.9), strong) == TrialScheduler.CONTINUE
