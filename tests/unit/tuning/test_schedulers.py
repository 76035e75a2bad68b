"""Which scheduler a search gets, and what those do to trials whose score is known beforehand."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from eagleray.config.load import build_section
from eagleray.config.schema import ScheduleConfig, SearchConfig, TrainingConfig
from eagleray.errors import ConfigError
from eagleray.models.zoo import CNN
from eagleray.training.recipe import build_optimizer, build_schedule, with_hyperparameters
from eagleray.tuning.scheduler import MedianStopping, PausingAsha, Population, build_scheduler

SPACE = {"train.optimizer.lr": {"log_uniform": [0.001, 0.1]}}


def search(**values: Any) -> SearchConfig:
    return build_section(SearchConfig, {"families": {"cnn": {}}, "space": SPACE, "epochs": 9, **values}, "tune")


@dataclass(eq=False)
class FakeTrial:
    trial_id: str
    epochs: int = 0


def epochs_of(scheduler: Any, scores: Iterable[float], max_epochs: int = 9) -> list[int]:
    """Train so many trials one after the other, each as long as the scheduler lets it."""
    trials = []
    for number, score in enumerate(scores):
        trial = FakeTrial(str(number))
        scheduler.on_trial_add(None, trial)
        trials.append(trial)
        while trial.epochs < max_epochs:
            trial.epochs += 1
            result = {"training_iteration": trial.epochs, "val_top1": score * trial.epochs}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(None, trial, result)
    return [trial.epochs for trial in trials]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, FIFOScheduler),
        ({}, AsyncHyperBandScheduler),
        ({"name": "hyperband"}, AsyncHyperBandScheduler),
        ({"name": "pausing_asha"}, PausingAsha),
        ({"name": "median"}, MedianStopping),
        ({"name": "pbt"}, Population),
    ],
)
def test_the_scheduler_is_the_one_that_was_asked_for(scheduler: dict[str, Any] | None, expected: type) -> None:
    assert isinstance(build_scheduler(search(scheduler=scheduler), 2), expected)


def test_the_median_rule_stops_the_worse_half_and_none_while_there_are_few() -> None:
    scheduler = build_scheduler(search(scheduler={"name": "median", "grace_epochs": 2}), 2)
    epochs = epochs_of(scheduler, [0.5, 0.1, 0.6, 0.2, 0.9, 0.8])
    assert epochs[:3] == [9, 9, 9], "there are not three others yet"
    assert epochs[3] == 2 and epochs[4:] == [9, 9]


def test_hyperband_has_trials_that_it_stops_later_or_never() -> None:
    """Each trial is worse than the one before: ASHA stops all but the first few at once."""
    np.random.seed(0)  # Ray draws each trial's bracket
    scores = [1.0 - number / 100 for number in range(60)]
    assert set(epochs_of(build_scheduler(search(), 2), scores)[3:]) == {1}
    assert set(epochs_of(build_scheduler(search(scheduler={"name": "hyperband"}), 2), scores)[3:]) == {1, 3, 9}


def test_values_of_a_population_stay_in_their_ranges_and_go_to_neighbours() -> None:
    space = SPACE | {"train.optimizer.momentum": {"uniform": [0.8, 0.99]}, "data.augment.crop_scale": {"choice": [[0.1, 1.0], [0.3, 1.0]]}}
    scheduler = build_scheduler(search(space=space | {"train.global_batch_size": {"integer": [8, 9]}}, scheduler={"name": "pbt"}), 2)
    assert isinstance(scheduler, Population)
    random.seed(0)
    best = SimpleNamespace(
        config={
            "model.name": "cnn",
            "train.optimizer.lr": 0.09,
            "train.optimizer.momentum": 0.95,
            "data.augment.crop_scale": [0.1, 1.0],
            "train.global_batch_size": 8,
        }
    )
    drawn = [scheduler._get_new_config(None, best)[0] for _ in range(50)]
    assert len({values["train.optimizer.lr"] for values in drawn}) > 3
    assert all(0.001 <= values["train.optimizer.lr"] <= 0.1 for values in drawn)
    assert all(0.8 <= values["train.optimizer.momentum"] <= 0.99 for values in drawn)
    assert {tuple(values["data.augment.crop_scale"]) for values in drawn} == {(0.1, 1.0), (0.3, 1.0)}
    assert {(values["model.name"], values["train.global_batch_size"]) for values in drawn} == {("cnn", 8)}, "these cannot change in a run"


def test_a_run_goes_on_with_other_hyperparameters_at_the_same_place_of_the_schedule() -> None:
    def parts(lr: float, momentum: float) -> tuple[torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        optimizer = build_optimizer(CNN(3), TrainingConfig.model_validate({"optimizer": {"name": "sgd", "lr": lr, "momentum": momentum}}))
        return optimizer, build_schedule(optimizer, ScheduleConfig(name="cosine", warmup_epochs=0), 4, 5)

    old, schedule = parts(0.1, 0.9)
    for _ in range(10):
        for group in old.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        old.step()
        schedule.step()
    state = {"optimizer": old.state_dict(), "schedule": schedule.state_dict(), "steps_done": 10}
    new, new_schedule = parts(0.4, 0.5)
    adopted = with_hyperparameters(state, new)
    new.load_state_dict(adopted["optimizer"])
    new_schedule.load_state_dict(adopted["schedule"])
    assert adopted["steps_done"] == 10 and state["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert all(group["momentum"] == 0.5 and group["lr"] == pytest.approx(0.2) for group in new.param_groups), "half-way: half of the peak"
    first = new.param_groups[0]["params"][0]
    assert torch.equal(new.state[first]["momentum_buffer"], old.state[old.param_groups[0]["params"][0]]["momentum_buffer"])
    new_schedule.step()
    schedule.step()
    assert new.param_groups[0]["lr"] == pytest.approx(4 * old.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": {"name": "pbt"}, "sampler": "tpe"}, "pbt begins with random values and changes them; give sampler: auto, not tpe"),
        ({"scheduler": {"name": "pbt"}, "num_trials": 3}, "num_trials 3: scheduler pbt replaces a quarter of the trials; give 4 or more"),
        ({"scheduler": {"name": "pbt"}, "space": {"train.global_batch_size": {"choice": [8, 16]}}}, "can change none of its keys"),
        ({"scheduler": {"name": "bohb"}}, "'scheduler.name': input should be"),
        ({"trials_per_gpu": 2, "num_workers": 2}, "trials_per_gpu: 2 needs num_workers: 1"),
        ({"max_usd": 5}, r"max_usd needs prices: \{gpu_hour"),
        ({"objectives": ["val_top1", "usd_per_1000"]}, r"usd_per_1000 needs prices: \{cpu_hour"),
        (
            {"sampler": "cmaes", "space": SPACE | {"data.image_size": {"choice": [8, 16]}}},
            "cmaes .*'data.image_size' is a choice; take tpe",
        ),
        ({"sampler": "cmaes", "families": {"cnn": {}, "resnet18": {}}}, "'resnet18' is another family"),
        ({"sampler": "cmaes", "objectives": ["val_top1", "val_loss"]}, "several objectives"),
        ({"objectives": ["latency_p50_ms", "val_top1"]}, "latency_p50_ms cannot be the first one"),
    ],
)
def test_what_cannot_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**values)
