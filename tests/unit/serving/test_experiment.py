from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from eagleray.errors import ServingError
from eagleray.serving.experiment import Experiment, Variant, assign, conclude, with_weights

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = [f"user-{i}" for i in range(20_000)]


def experiment(**weights: float) -> Experiment:
    variants = tuple(Variant(name=name, version=i + 1, weight=weight) for i, (name, weight) in enumerate(weights.items()))
    return Experiment(id="digits-1", model="digits", salt="0123456789", variants=variants, started=NOW, revised=NOW)


def assignments(e: Experiment) -> np.ndarray:
    return np.array([assign(e, key).name for key in KEYS])


def test_the_same_key_gets_the_same_variant_in_every_process():
    e = experiment(a=0.5, b=0.5)
    # Written down, so that a change of the hash, which would move everybody, does not pass unseen.
    assert [assign(e, f"user-{i}").name for i in range(12)] == list("baaabbababaa")


def test_shares_follow_the_weights():
    shares = assignments(experiment(a=1.0, b=2.0, c=5.0))
    for name, expected in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert np.mean(shares == name) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(KEYS)))


def test_a_variant_of_weight_zero_gets_nobody():
    assert set(assignments(experiment(a=1.0, b=0.0))) == {"a"}


def test_assignments_of_two_experiments_are_independent():
    first = experiment(a=0.5, b=0.5)
    second = first.model_copy(update={"salt": "another salt"})
    both = np.mean((assignments(first) == "a") & (assignments(second) == "a"))
    assert both == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("new_b", [0.1, 0.3, 2.0])
def test_a_changed_weight_moves_only_the_users_it_must(new_b: float):
    before, after = experiment(a=1.0, b=1.0, c=1.0), experiment(a=1.0, b=new_b, c=1.0)
    old, new = assignments(before), assignments(after)
    moved = old != new
    # Everybody who moved went to b or came from it, so that the number is the change of b's share, the least possible.
    assert np.all((old[moved] == "b") != (new[moved] == "b"))
    assert len(set(old[moved])) == (1 if new_b < 1 else 2)
    assert np.mean(moved) == pytest.approx(abs(after.shares["b"] - before.shares["b"]), abs=0.015)


def test_a_changed_weight_is_a_new_revision():
    e = with_weights(experiment(champion=0.9, challenger=0.1), {"challenger": 0.3}, NOW)
    assert (e.revision, e.shares["challenger"]) == (2, pytest.approx(0.25))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"chalenger": 0.3}, "did you mean 'challenger'"),
        ({"challenger": -1}, "not a number from 0 up"),
        ({"champion": 0, "challenger": 0}, "all weights"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], message: str):
    with pytest.raises(ServingError, match=message):
        with_weights(experiment(champion=0.9, challenger=0.1), weights, NOW)


def test_an_ended_experiment_sends_all_to_the_winner_and_cannot_end_again():
    ended = conclude(experiment(champion=0.9, challenger=0.1), "challenger", "promoted", NOW)
    assert set(assignments(ended)) == {"challenger"}
    with pytest.raises(ServingError, match="already ended"):
        conclude(ended, "champion", "aborted", NOW)
    with pytest.raises(ServingError, match="has ended"):
        with_weights(ended, {"champion": 1.0}, NOW)


def test_inconsistent_experiments_cannot_be_built():
    with pytest.raises(ValidationError, match="same name"):
        Experiment.model_validate(experiment(a=1).model_dump() | {"variants": [{"name": "a", "version": 1, "weight": 1}] * 2})
    with pytest.raises(ValidationError, match="no winner"):
        Experiment.model_validate(experiment(a=1).model_dump() | {"winner": "a"})
