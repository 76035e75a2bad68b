"""What a search is asked to improve, which trial wins, and when there is no more to hope for."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eagleray.config.load import build_section
from eagleray.config.schema import SearchConfig
from eagleray.data.stream import DecodeResources
from eagleray.errors import ConfigError, SearchError
from eagleray.training.resources import WorkerResources
from eagleray.tuning.search import TrialResult, _error_of, is_spent, is_stuck, select_best, usd_per_hour
from eagleray.tuning.trial import check_objectives


def search(**values: Any) -> SearchConfig:
    return build_section(SearchConfig, {"families": {"cnn": {}}, **values}, "tune")


def trial(name: str, top1: float, loss: float, status: str = "finished") -> TrialResult:
    metrics = {"val_top1": top1, "val_top5": 1.0, "val_loss": loss}
    return TrialResult(name, {"model.name": "cnn"}, status, 1, top1, 1.0, metrics=metrics)


TRIALS = [trial("a", 0.9, 0.8), trial("b", 0.8, 0.3), trial("c", 0.7, 0.4)]


@pytest.mark.parametrize(
    ("values", "winner"),
    [
        ({}, "a"),
        ({"objectives": ["val_loss", "val_top1"]}, "b"),
        ({"select": {"best": "val_loss"}}, "b"),
        ({"select": {"best": "val_top1", "where": {"val_loss": {"max": 0.5}}}}, "b"),
        ({"select": {"best": "val_top1", "where": {"val_loss": {"min": 0.4, "max": 0.4}}}}, "c"),
    ],
)
def test_the_rule_picks_the_winner(values: dict[str, Any], winner: str) -> None:
    assert select_best(TRIALS, search(**values)).trial_id == winner


def test_bounds_that_no_trial_keeps_are_told_with_how_near_they_came() -> None:
    rule = {"best": "val_top1", "where": {"val_loss": {"max": 0.1}}}
    with pytest.raises(SearchError, match=r"none of 3 trials is within the bounds; they have val_loss from 0.3 to 0.8; loosen"):
        select_best(TRIALS, search(select=rule))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectives": ["val_top_1"]}, r"no objective is called 'val_top_1' \(did you mean 'val_top1'\?\); there are val_top1, "),
        ({"select": {"best": "loss"}}, r"did you mean 'val_loss'"),
        ({"select": {"best": "val_top1", "where": {"val_los": {"max": 1}}}}, r"did you mean 'val_loss'"),
        ({"select": {"best": "val_top1", "where": {"val_loss": {}}}}, r"give min, max or both"),
        ({"select": {"best": "val_top1", "where": {"val_loss": {"min": 2, "max": 1}}}}, r"min 2.0 is above max 1.0; swap them"),
        ({"objectives": ["val_loss", "val_loss"]}, r"one is given twice"),
        ({"objectives": []}, r"objectives"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**values)


def test_a_search_is_stuck_once_that_many_trials_have_brought_no_new_best() -> None:
    two = search(stop_without_progress=2, objectives=["val_loss"])
    assert is_stuck([trial("a", 0.5, 0.3), trial("b", 0.9, 0.3), trial("c", 0.9, 0.4)], two)
    assert not is_stuck([trial("a", 0.5, 0.3), trial("b", 0.5, 0.4), trial("c", 0.5, 0.2)], two)
    assert not is_stuck([trial("a", 0.5, 0.3), trial("b", 0.5, 0.4), trial("c", 0.5, 0.4, "running")], two)
    assert not is_stuck([trial("a", 0.5, 0.3), *(trial("b", 0.5, 0.4) for _ in range(9))], search())


def test_a_budget_of_money_or_of_gpu_hours_is_spent_by_what_trials_hold() -> None:
    held = WorkerResources(cpus=1.0, gpus=0.5, threads=1, train_decode=DecodeResources(3, 0.5), eval_decode=DecodeResources(1, 0.5))
    two = search(num_workers=2, prices={"gpu_hour": 2.0, "cpu_hour": 0.1}, max_usd=1.0, gpu_hours=3)
    assert usd_per_hour(two, held) == pytest.approx(2 * (0.5 * 2.0 + 3.0 * 0.1))
    rows = [replace(TRIALS[0], usd=0.6, gpu_seconds=3600.0), replace(TRIALS[1], usd=0.3, gpu_seconds=3600.0)]
    assert not is_spent(rows, two) and not is_spent(rows, search())
    assert is_spent([*rows, replace(TRIALS[2], usd=0.2)], two)
    assert is_spent([*rows, replace(TRIALS[2], gpu_seconds=4000.0)], two)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_epoch_whose_loss_is_no_number_fails_its_trial(value: float) -> None:
    epoch = {"epoch": 1.0, "val_top1": 0.1, "val_top5": 0.5, "val_loss": 2.0, "parameters": 9, "flops": 9}
    check_objectives(epoch)
    with pytest.raises(KeyError, match="flops"):
        check_objectives({name: epoch[name] for name in epoch if name != "flops"})
    with pytest.raises(SearchError, match=rf"val_loss is {value} after epoch 2"):
        check_objectives(epoch | {"val_loss": value})


def test_an_error_that_cannot_be_loaded_here_does_not_end_the_search(tmp_path: Path) -> None:
    (tmp_path / "error.pkl").write_bytes(b"of a class that is not here")
    assert _error_of(SimpleNamespace(pickled_error_file=str(tmp_path / "error.pkl"))) is None
    assert _error_of(SimpleNamespace(pickled_error_file=None)) is None
    (tmp_path / "error.pkl").write_bytes(pickle.dumps(SearchError("why")))
    assert str(_error_of(SimpleNamespace(pickled_error_file=str(tmp_path / "error.pkl")))) == "why"
