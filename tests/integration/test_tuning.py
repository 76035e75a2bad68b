"""A search on the real cluster: what it tries, stops, keeps and leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from shards_for_tests import digits_job, log_names, write_digit_shards

from eagleray import api
from eagleray.artifacts.checkpoint import load_state
from eagleray.artifacts.registry import Registry
from eagleray.artifacts.runs import load_run
from eagleray.cluster.connect import Connection
from eagleray.config.load import dump_job, with_values
from eagleray.config.schema import JobConfig, WorkspaceConfig
from eagleray.errors import ConfigError, SearchError
from eagleray.tuning.search import TrialResult, check_same_search, trial_job
from eagleray.tuning.search_space import apply_values, check_space

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
    assert all(load_state(trial.checkpoint_uri)["steps_done"] == 15 * trial.epochs for trial in result.trials)
    assert any(trial.status == "running" for trial in seen)

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/runs/search/study.db")
    assert len(study.trials) == 5
    page = api.report_search(WorkspaceConfig(root=str(tmp_path)), "search", tmp_path / "report")
    text = page.read_text()
    assert all(trial.trial_id in text for trial in result.trials)
    assert not re.search(r"<script[^>]*\ssrc=", text), "the page needs no network"
    assert {path.name for path in page.parent.glob("*.png")} >= {"history.png", "learning_curves.png"}

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0, "a trial or its stream still holds CPUs"
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


@pytest.mark.slow
def test_trials_of_two_workers_take_one_pair_of_processes_after_another(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """The same point twice: what the first trial left in its processes makes no difference to the second one."""
    one_point = {"families": {"cnn": {"width": {"choice": [8]}}}, "space": {"train.optimizer.lr": {"choice": [0.005]}}}
    result = api.tune(search_job(shards, tmp_path, num_trials=2, num_workers=2, scheduler=None, **one_point), name="together")
    assert [trial.status for trial in result.trials] == ["finished"] * 2
    first, second = result.trials
    assert log_names() >= {f"search together, trial {trial.trial_id}, worker {rank}" for trial in (first, second) for rank in (0, 1)}
    assert first.curve == second.curve and first.curve[-1] > 0.8
    assert all(load_state(trial.checkpoint_uri)["steps_done"] == 15 * 3 for trial in result.trials), "each step was of 32 pictures"


@pytest.mark.slow
def test_a_search_in_which_every_trial_fails_says_why(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    families = {"cnn": {"width": {"choice": [8]}}}
    space = {"train.optimizer.lr": {"log_uniform": [1e7, 1e8]}}
    job = with_values(search_job(shards, tmp_path, num_trials=9, families=families, space=space), {"train.optimizer.name": "sgd"})
    few = with_values(job, {"tune.max_failed_trials": 1, "tune.max_concurrent": 1})
    reason = r"2 of 2 trials failed, more than tune.max_failed_trials 1; .*reason \(2 of them\): .*gradients are not finite in epoch 1"
    with pytest.raises(SearchError, match=reason):
        api.tune(few, name="failing")
    with pytest.raises(SearchError, match=reason):
        api.tune(with_values(few, {"tune.num_workers": 2}), name="failing-together")


@pytest.mark.slow
def test_a_trial_whose_worker_is_killed_goes_on_from_its_last_epoch(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """kill -9 of the first of two workers in the third epoch."""
    families = {"models_for_tests:crash_in_third_epoch": {"marker": {"choice": [str(tmp_path / "marker")]}}}
    job = search_job(shards, tmp_path / "work", num_trials=1, num_workers=2, epochs=4, scheduler=None, families=families)
    said: list[str] = []
    result = api.tune(job, name="killed", on_message=said.append)
    assert (tmp_path / "marker").exists()
    assert (result.best.status, result.best.epochs, len(result.best.curve)) == ("finished", 4, 4)
    assert load_state(result.best.checkpoint_uri)["steps_done"] == 4 * 15
    assert [line for line in said if line.startswith(f"trial {result.best.trial_id} failed (") and "newest checkpoint" in line], said


@pytest.mark.slow
def test_two_objectives_a_rule_and_an_end_without_progress(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    families = {"cnn": {"width": {"choice": [8]}}}
    changes = {"num_trials": 12, "max_concurrent": 1, "epochs": 1, "scheduler": None, "families": families, "sampler": "nsga2"}
    budget = {"objectives": ["val_loss", "val_top1"], "stop_without_progress": 1}
    select = {"best": "val_top1", "where": {"val_loss": {"max": 100.0}}}
    job = search_job(shards, tmp_path, **changes, **budget, select=select)
    result = api.tune(job, name="traded")

    losses = [trial.metrics["val_loss"] for trial in result.trials]
    ended = [loss for trial, loss in zip(result.trials, losses, strict=True) if trial.status == "finished"]
    assert len(result.trials) < 12 and ended[-1] >= min(ended[:-1]), "it ended at the first trial that was no better"
    assert all(later < earlier for earlier, later in pairwise(ended[:-1]))
    assert result.best.metrics["val_top1"] == max(trial.metrics["val_top1"] for trial in result.trials)

    rows = json.loads((tmp_path / "runs" / "traded" / "trials.json").read_text())
    assert [row["metrics"]["val_loss"] for row in rows] == losses and all(row["gpu_seconds"] == 0.0 for row in rows)
    study = optuna.load_study(study_name="traded", storage=f"sqlite:///{tmp_path}/runs/traded/study.db")
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    told = [trial.values for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
    assert told == [[row["metrics"]["val_loss"], row["metrics"]["val_top1"]] for row in rows]


@pytest.mark.slow
def test_a_population_takes_over_the_best_weights_with_changed_values(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    """Two of four begin with a learning rate by which nothing is learned; room for two at a time."""
    changes = {"num_trials": 4, "epochs": 4, "scheduler": {"name": "pbt", "grace_epochs": 1}, "max_concurrent": 2}
    families = {"cnn": {"width": {"choice": [8]}}}
    space = {"train.optimizer.lr": {"log_uniform": [1e-6, 1e-2]}}
    result = api.tune(search_job(shards, tmp_path, **changes, families=families, space=space), name="population")
    assert [(trial.status, trial.epochs, len(trial.curve)) for trial in result.trials] == [("finished", 4, 4)] * 4
    study = optuna.load_study(study_name="population", storage=f"sqlite:///{tmp_path}/runs/population/study.db")
    first = {row.params["train.optimizer.lr"] for row in study.trials}
    last = {trial.values["train.optimizer.lr"] for trial in result.trials}
    assert len(first) == 4 and last - first and all(1e-6 <= lr <= 1e-2 for lr in last)
    for trial in result.trials:
        job = apply_values(trial_job(result.job), trial.values)
        groups = load_state(trial.checkpoint_uri)["optimizer"]["param_groups"]
        assert {group["initial_lr"] for group in groups} == {job.train.optimizer.lr}, "it trains by the values that it tells of"
    version = api.register_winner(result, "digits@challenger")
    assert version.tags["run_name"] == f"population-{result.best.trial_id}", "as its trial left it"


@pytest.mark.slow
def test_a_space_by_a_function_with_what_serving_will_take_and_cost(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    changes = {
        "num_trials": 3,
        "epochs": 1,
        "scheduler": None,
        "families": {"cnn": {"width": {"choice": [8]}}},
        "space_function": "models_for_tests:momentum_of_sgd",
        "objectives": ["val_top1", "latency_p99_ms"],
        "select": {"best": "val_top1", "where": {"usd_per_1000": {"max": 1.0}}},
        "prices": {"cpu_hour": 0.05},
    }
    result = api.tune(search_job(shards, tmp_path, **changes), name="function")
    for trial in result.trials:
        assert ("train.optimizer.momentum" in trial.values) == (trial.values["train.optimizer.name"] == "sgd")
        assert trial.values["train.optimizer.weight_decay"] == trial.values["train.optimizer.lr"] / 10
        assert 0 < trial.metrics["latency_p50_ms"] <= trial.metrics["latency_p99_ms"] < 1000
        assert 0 < trial.metrics["usd_per_1000"] < 1.0
        assert trial.usd == pytest.approx(trial.seconds * 0.05 / 3600, rel=0.1), "one of the two CPUs"
    assert result.job.train.optimizer.name == result.best.values["train.optimizer.name"]
    study = optuna.load_study(study_name="function", storage=f"sqlite:///{tmp_path}/runs/function/study.db")
    assert sorted(row.values[1] for row in study.trials) == sorted(trial.metrics["latency_p99_ms"] for trial in result.trials)


@pytest.mark.slow
def test_gpu_hours_without_a_gpu_are_refused(ray_cluster: Connection, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"tune.gpu_hours 2: the trials hold no GPU; give tune.time_budget_s"):
        api.tune(search_job(shards, tmp_path, gpu_hours=2), name="no-gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": {"resnet51": {}}}, r"tune.families.resnet51: .*did you mean 'resnet50'"),
        ({"families": {"cnn": {"widht": {"choice": [1]}}}}, r"tune.families.cnn: .*did you mean 'width'"),
        ({"space": {"train.optimizer.lrr": {"uniform": [0.1, 0.2]}}}, r"unknown key 'train.optimizer.lrr' \(did you mean 'lr'\?\)"),
        ({"space": {"train.global_batch_size": {"choice": [32, 33]}}}, r"33 is not a multiple of data.lanes"),
        ({"num_workers": 3}, r"tune.num_workers: data.lanes 8 is not a multiple of train.num_workers 3"),
        ({"space": {"train.optimizer.lr": {"uniform": [-1.0, 0.2]}}}, r"tune.space.train.optimizer.lr: .*greater than 0"),
        ({"space_function": "models_for_tests:impossible_space"}, r"tune.space_function 'models_.*momentun' \(did you mean 'momentum'\?\)"),
        ({"space_function": "models_for_tests:nothing"}, r"tune.space_function 'models_for_tests:nothing'.* has no 'nothing'"),
    ],
)
def test_a_space_with_a_point_that_cannot_be_is_refused(changes: dict[str, object], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space(search_job(shards, tmp_path, **changes))


def tune_in_a_process(job: JobConfig, *arguments: str) -> subprocess.Popen[str]:
    """`eagleray tune` as a user runs it, on a cluster of its own."""
    job_file = Path(job.workspace.root) / "job.yaml"
    job_file.parent.mkdir(exist_ok=True)
    job_file.write_text(dump_job(job))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "eagleray", "tune", str(job_file), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_search_does_not_go_on_by_another_job_file(shards: Path, tmp_path: Path) -> None:
    job = search_job(shards, tmp_path)
    check_same_search(with_values(job, {"tune.max_concurrent": 7}), job, "search")
    changed = with_values(job, {"tune.space": {"train.optimizer.lr": {"log_uniform": [0.001, 0.02]}}})
    reason = r"tune.space.train.optimizer.lr.log_uniform is \[0.001, 0.02\], and \[0.001, 0.01\] in search 'search'"
    with pytest.raises(ConfigError, match=reason):
        check_same_search(changed, job, "search")


@pytest.mark.slow
def test_a_search_outlives_its_driver(shards: Path, tmp_path: Path) -> None:
    """kill -9 while a trial is under way: what has ended stays as it is, and that trial goes on from its last epoch."""
    steps = tmp_path / "steps"
    families = {"models_for_tests:slow": {"step_s": {"choice": [0.1]}, "log": {"choice": [str(steps)]}}}
    job = search_job(shards, tmp_path / "work", num_trials=2, epochs=5, max_concurrent=1, scheduler=None, families=families)
    run = tmp_path / "work" / "runs" / "search"

    def rows() -> list[dict[str, Any]]:
        return json.loads((run / "trials.json").read_text()) if (run / "trials.json").exists() else []

    first = tune_in_a_process(job, "--name", "search")
    deadline = time.monotonic() + 300
    while not [row for row in rows() if row["status"] == "running" and row["epochs"] == 4] or len(rows()) < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.1)
    first.kill()
    first.communicate()
    (before, under_way) = rows()
    assert (before["status"], before["epochs"]) == ("finished", 5)

    second = tune_in_a_process(job, "--resume", "search")
    out, _ = second.communicate(timeout=400)
    assert second.returncode == 0, out
    after = {row["trial_id"]: row for row in rows()}
    assert len(after) == 2 and all((row["status"], row["epochs"]) == ("finished", 5) for row in after.values())
    assert after[before["trial_id"]] | {"checkpoint_uri": ""} == before
    went_on = after[under_way["trial_id"]]
    assert went_on["curve"][: under_way["epochs"]] == under_way["curve"] and len(went_on["curve"]) == 5
    again = len(steps.read_text().splitlines()) - 2 * 5 * 15
    assert 0 <= again <= 2 * 15, "from its last epoch, or the one before, rather than from its start"
    states = [trial.state.name for trial in optuna.load_study(study_name="search", storage=f"sqlite:///{run}/study.db").trials]
    assert states.count("COMPLETE") == 2 and "RUNNING" not in states


@pytest.mark.slow
def test_a_search_that_pauses_its_trials_ends_with_a_registered_winner(shards: Path, tmp_path: Path) -> None:
    """With room for one trial at a time: one that paused and held anything would keep all others from running."""
    changes = {"num_trials": 5, "epochs": 4, "max_concurrent": 1, "constraints": {"parameters": {"max": 200_000}}}
    families = {"cnn": {"width": {"choice": [4, 8, 256]}}}
    scheduler = {"name": "pausing_asha", "grace_epochs": 1, "reduction_factor": 2}
    job = search_job(shards, tmp_path / "work", **changes, families=families, scheduler=scheduler)
    job = with_values(job, {"train.epochs": 2, "train.num_workers": 1})
    process = tune_in_a_process(job, "--name", "paused", "--register", "reader@challenger")
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0 and "sampler tpe: some dimensions are choices" in out, out

    rows = json.loads((tmp_path / "work" / "runs" / "paused" / "trials.json").read_text())
    assert len(rows) == 5 and {row["epochs"] for row in rows} <= {1, 2, 4}
    assert sum(row["epochs"] >= 2 for row in rows) >= 2
    assert {row["status"] for row in rows if row["epochs"] == 4} == {"finished"}
    assert {row["status"] for row in rows if row["epochs"] < 4} == {"stopped"}
    assert all(row["values"]["cnn.width"] < 256 and 1000 < row["metrics"]["parameters"] < 200_000 for row in rows)
    assert "registered reader:1 @challenger" in out
    version = Registry(job.workspace).resolve("reader@challenger")
    assert version.tags["search"] == "paused" and version.tags["run_name"] == "paused-winner"
    assert (
        load_run(job.workspace.runs_uri, "paused-winner").job.train.optimizer.lr
        == max(rows, key=lambda row: row["val_top1"])["values"]["train.optimizer.lr"]
    )
