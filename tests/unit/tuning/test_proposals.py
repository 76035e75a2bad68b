"""What is proposed: within constraints, with what is known from before, and told to Optuna as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from eagleray.config.load import build_job
from eagleray.config.schema import JobConfig, SearchConfig
from eagleray.errors import ConfigError, SearchError
from eagleray.tuning.proposals import Proposer, add_earlier_trials, fitting_sampler
from eagleray.tuning.scheduler import PAUSED

SPACE = {"train.optimizer.lr": {"log_uniform": [0.001, 0.01]}}


def search_job(**search: Any) -> JobConfig:
    families = {"cnn": {"width": {"choice": [4, 8, 64]}}}
    document = {"families": families, "space": SPACE} | search
    return build_job({"name": "j", "data": {"train": "t", "val": "v", "image_size": 16}, "tune": document}, source="test")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def proposer(job: JobConfig, url: str, name: str = "s", max_concurrent: int = 99, is_new: bool = True) -> Proposer:
    return Proposer(job, 10, max_concurrent, name, optuna.storages.RDBStorage(url), is_new=is_new)


def rows(url: str, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=url).get_trials()


def test_a_network_that_is_too_large_is_told_as_pruned_and_never_proposed(url: str) -> None:
    """A CNN has about 5 k parameters at width 4, 10 k at 8, 300 k at 64."""
    search = proposer(search_job(constraints={"parameters": {"max": 100_000}}), url)
    points = [search.suggest(str(number)) for number in range(12)]
    assert {point["cnn.width"] for point in points if isinstance(point, dict)} <= {4, 8} and len(points) == 12
    ruled_out = [row for row in rows(url) if row.state == TrialState.PRUNED]
    assert ruled_out and all(row.params["cnn.width"] == 64 for row in ruled_out)


def test_a_space_without_a_point_within_the_constraints_ends_the_search(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.tuning.proposals.MAX_REFUSED", 5)
    search = proposer(search_job(constraints={"flops": {"max": 10}}), url)
    assert search.suggest("a") == Searcher.FINISHED and search.is_out_of_points


def test_no_more_at_a_time_than_wanted_and_those_that_pause_do_not_count(url: str) -> None:
    search = proposer(search_job(), url, max_concurrent=1)
    assert search.suggest("a") is not None and search.suggest("b") is None
    search.on_trial_result("a", {"training_iteration": 1, "val_top1": 0.5, PAUSED: True})
    assert search.suggest("b") is not None
    search.on_trial_complete("b", {"val_top1": 0.4})
    search.on_trial_result("a", {"training_iteration": 2, "val_top1": 0.6})
    assert search.suggest("c") is None, "the one that paused runs again"


def test_optuna_knows_of_a_trial_that_paused_and_of_what_became_of_it(url: str) -> None:
    search = proposer(search_job(), url)
    search.suggest("a")
    search.on_trial_result("a", {"training_iteration": 1, "val_top1": 0.5, PAUSED: True})
    (paused,) = rows(url)
    assert paused.state == TrialState.PRUNED and paused.intermediate_values == {1: 0.5}
    search.on_trial_result("a", {"training_iteration": 2, "val_top1": 0.7})
    search.on_trial_result("a", {"training_iteration": 3, "val_top1": 0.8, PAUSED: True})
    search.on_trial_complete("a")  # the search ends while it pauses
    first, second = rows(url)
    assert first == paused and second.params == first.params
    assert second.state == TrialState.PRUNED and second.intermediate_values == {1: 0.5, 2: 0.7, 3: 0.8}


def test_a_trial_that_paused_and_came_to_its_end_is_complete(url: str) -> None:
    search = proposer(search_job(), url)
    search.suggest("a")
    search.on_trial_result("a", {"training_iteration": 1, "val_top1": 0.5, PAUSED: True})
    search.on_trial_result("a", {"training_iteration": 2, "val_top1": 0.7})
    search.on_trial_complete("a", {"training_iteration": 3, "val_top1": 0.9})
    assert [(row.state, row.value) for row in rows(url)] == [(TrialState.PRUNED, 0.5), (TrialState.COMPLETE, 0.9)]


def test_each_family_is_tried_first_but_not_again_after_a_resume(url: str) -> None:
    families = {"cnn": {}, "vgg_cifar": {}, "resnet_cifar": {}}
    job = search_job(families=families, sampler="random")
    names = [proposer(job, url).suggest(name) for name in "a"] + [None]
    assert names[0] is not None
    waiting = [row for row in rows(url) if row.state == TrialState.WAITING]
    proposer(job, url, is_new=False)
    assert len([row for row in rows(url) if row.state == TrialState.WAITING]) == len(waiting) == 2


def test_earlier_searches_are_known_from_the_start(url: str) -> None:
    before = proposer(search_job(), url, "before")
    for number in range(3):
        before.suggest(str(number))
        before.on_trial_complete(str(number), {"val_top1": number / 10})
    search = proposer(search_job(), url)
    assert add_earlier_trials(search._ot_study, [optuna.load_study(study_name="before", storage=url)]) == 3
    known = [row for row in rows(url) if row.state == TrialState.COMPLETE]
    assert [row.value for row in known] == [0.0, 0.1, 0.2] and {row.user_attrs["from"] for row in known} == {"before"}
    assert search.suggest("a") is not None
    other = optuna.create_study(direction="minimize")
    with pytest.raises(SearchError, match="other objectives; leave it out"):
        add_earlier_trials(search._ot_study, [other])


def test_a_grid_ends_when_every_point_has_been_tried(url: str) -> None:
    space = {"train.global_batch_size": {"choice": [32, 64]}}
    search = proposer(search_job(space=space, sampler="grid", families={"cnn": {"width": {"integer": [4, 6]}}}), url)
    points = []
    for number in range(6):
        point = search.suggest(str(number))
        assert isinstance(point, dict)
        search.on_trial_complete(str(number), {"val_top1": 0.1})
        points.append((point["cnn.width"], point["train.global_batch_size"]))
    assert sorted(points) == [(width, size) for width in (4, 5, 6) for size in (32, 64)]
    with pytest.raises(ConfigError, match=r"grid needs choices and integers, and 'train.optimizer.lr' is a range of reals"):
        search_job(sampler="grid")


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"families": {"cnn": {}}}, "gp", "every dimension is a number"),
        ({}, "tpe", "some dimensions are choices"),
        ({"families": {"cnn": {}, "resnet18": {}}}, "tpe", "2 families"),
        ({"objectives": ["val_top1", "parameters"]}, "tpe", "2 objectives"),
        ({"families": {"cnn": {}}, "constraints": {"flops": {"max": 1e9}}}, "tpe", "constraints"),
        ({"families": {"cnn": {}}, "num_trials": 200}, "tpe", "more than 100 trials"),
    ],
)
def test_what_auto_stands_for_is_said_with_the_reason(changes: dict[str, Any], name: str, reason: str) -> None:
    found, why = fitting_sampler(SearchConfig.model_validate({"families": {"cnn": {"width": {"choice": [4]}}}, "space": SPACE} | changes))
    assert found == name and reason in why


def test_a_size_cannot_be_what_trials_are_stopped_by() -> None:
    with pytest.raises(ConfigError, match="parameters cannot be the first one"):
        search_job(objectives=["parameters", "val_top1"])
