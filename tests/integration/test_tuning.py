"""A search on the real cluster: what it tries, stops, keeps and leaves behind."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import pytest
import ray
from shards_for_tests import digits_job, write_digit_shards

from eagleray import api
from eagleray.cluster.connect import Connection
from eagleray.config.load import with_values
from eagleray.config.schema import JobConfig
from eagleray.errors import ConfigError, SearchError
from eagleray.training.trainer import load_checkpoint
from eagleray.tuning.search import TrialResult
from eagleray.tuning.search_space import check_space

SEARCH = {
    "num_trials": 5,
    "epochs": 3,
    "scheduler": {"grace_epochs": 1, "reduction_factor": 2},
    "families": {
        "cnn": {"width": {"choice": [8, 16]}},
        "resnet_cifar": {"depth": {"choice": [8]}, "width": {"integer": [4, 8]}},
        "vgg_cifar": {"width": {"choice": [8]}},
    },
    "space": {"train.optimizer.lr": {"log_uniform": [0.001, 0.01]}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def search_job(shards: Path, root: Path, **changes: object) -> JobConfig:
    return with_values(digits_job(shards, root), {"tune": SEARCH | changes})


@pytest.mark.slow
def test_a_search_tries_every_family_stops_the_weak_and_leaves_nothing_behind(
    ray_cluster: Connection, shards: Path, tmp_path: Path
) -> None:
    seen: list[TrialResult] = []
    result = api.tune(search_job(shards, tmp_path), name="search", on_trial=seen.append)

    assert len(result.trials) == 5
    assert {trial.family for trial in result.trials} == set(SEARCH["families"])
    assert {trial.status for trial in result.trials} <= {"finished", "stopped"}
    assert any(trial.status == "stopped" and trial.epochs < 3 for trial in result.trials)
    assert result.best.val_top1 == max(trial.val_top1 for trial in result.trials)
    assert result.job.model.name == result.best.family
    assert result.job.train.optimizer.lr == result.best.values["train.optimizer.lr"]
    assert result.job.train.epochs == 4 and result.job.train.num_workers == 2, "the winner is trained as the job says, not as its trial was"
    assert all(load_checkpoint(trial.checkpoint_uri)["steps_done"] == 15 * trial.epochs for trial in result.trials)
    assert any(trial.status == "running" for trial in seen)

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/runs/search/study.db")
    assert len(study.trials) == 5

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0, "a trial or its stream still holds CPUs"
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


@pytest.mark.slow
def test_a_search_in_which_every_trial_fails_says_why(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    families = {"cnn": {"width": {"choice": [8]}}}
    space = {"train.optimizer.lr": {"log_uniform": [1e7, 1e8]}}
    job = with_values(search_job(shards, tmp_path, num_trials=2, families=families, space=space), {"train.optimizer.name": "sgd"})
    with pytest.raises(SearchError, match=r"all 2 trials failed; the first: .*loss is"):
        api.tune(job, name="failing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": {"resnet51": {}}}, r"tune.families.resnet51: .*did you mean 'resnet50'"),
        ({"families": {"cnn": {"widht": {"choice": [1]}}}}, r"tune.families.cnn: .*did you mean 'width'"),
        ({"space": {"train.optimizer.lrr": {"uniform": [0.1, 0.2]}}}, r"unknown key 'train.optimizer.lrr' \(did you mean 'lr'\?\)"),
        ({"space": {"train.global_batch_size": {"choice": [32, 33]}}}, r"33 is not a multiple of data.lanes"),
        ({"space": {"train.optimizer.lr": {"uniform": [-1.0, 0.2]}}}, r"tune.space.train.optimizer.lr: .*greater than 0"),
    ],
)
def test_a_space_with_a_point_that_cannot_be_is_refused(changes: dict[str, object], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(search_job(shards, tmp_path, **changes))
