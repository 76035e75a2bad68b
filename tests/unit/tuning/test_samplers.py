"""Which sampler proposes the points of a search."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest

from eagleray.config.schema import SearchConfig
from eagleray.tuning.proposals import build_sampler
from eagleray.tuning.search_space import suggest_point

NUMBERS = {"train.optimizer.lr": {"log_uniform": [0.001, 0.1]}, "train.optimizer.momentum": {"uniform": [0.8, 0.99]}}
CHOICE = {"data.augment.crop_scale": {"choice": [[0.08, 1.0], [0.35, 1.0]]}}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"families": {"cnn": {}}, "space": NUMBERS}, optuna.samplers.GPSampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "num_trials": 101}, optuna.samplers.TPESampler),
        ({"families": {"cnn": {}}, "space": NUMBERS | CHOICE}, optuna.samplers.TPESampler),
        ({"families": {"cnn": {}, "resnet18": {}}, "space": NUMBERS}, optuna.samplers.TPESampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "sampler": "random"}, optuna.samplers.RandomSampler),
        ({"families": {"cnn": {}}, "space": CHOICE, "sampler": "gp"}, optuna.samplers.GPSampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "objectives": ["val_top1", "val_loss"]}, optuna.samplers.TPESampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "sampler": "nsga2"}, optuna.samplers.NSGAIISampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "sampler": "nsga3"}, optuna.samplers.NSGAIIISampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "sampler": "cmaes"}, optuna.samplers.CmaEsSampler),
        ({"families": {"cnn": {}}, "space": NUMBERS, "scheduler": {"name": "pbt"}}, optuna.samplers.RandomSampler),
    ],
)
def test_the_sampler_fits_the_space(search: dict[str, Any], expected: type) -> None:
    assert isinstance(build_sampler(SearchConfig.model_validate(search), seed=0), expected)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "nsga3", "random"])
def test_every_sampler_proposes_for_two_objectives_and_a_conditional_space(sampler: str) -> None:
    families = {"cnn": {"width": {"integer": [4, 8]}}, "resnet_cifar": {"depth": {"choice": [8, 14]}}}
    search = SearchConfig.model_validate({"families": families, "space": NUMBERS, "sampler": sampler})
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=build_sampler(search, seed=0))
    for number in range(14):
        trial = study.ask()
        suggest_point(search, trial)
        study.tell(trial, [trial.params["train.optimizer.lr"], number])
    assert {trial.params["model.name"] for trial in study.trials} == {"cnn", "resnet_cifar"}
    assert all(("cnn.width" in t.params) == (t.params["model.name"] == "cnn") for t in study.trials)


def test_cma_es_closes_in_on_the_best() -> None:
    search = SearchConfig.model_validate({"families": {"cnn": {}}, "space": NUMBERS, "sampler": "cmaes"})
    study = optuna.create_study(direction="minimize", sampler=build_sampler(search, seed=0))
    for _ in range(80):
        trial = study.ask()
        suggest_point(search, trial)
        study.tell(trial, abs(math.log10(trial.params["train.optimizer.lr"] / 0.01)) + abs(trial.params["train.optimizer.momentum"] - 0.9))
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert sum(values[-20:]) < 0.3 * sum(values[:20])
