from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from eagleray.errors import ServingError
from eagleray.serving.experiment import (
    Experiment,
    Variant,
    assign,
    compare,
    conclude,
    difference_interval,
    log_evidence,
    required_samples,
    sample_ratio_p_value,
    with_weights,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = [f"user-{i}" for i in range(20_000)]


def experiment(**weights: float) -> Experiment:
    variants = tuple(Variant(name=name, version=i + 1, weight=weight) for i, (name, weight) in enumerate(weights.items()))
    return Experiment(id="digits-1", model="digits", salt="0123456789", variants=variants, started=NOW, revised=NOW)


def assignments(e: Experiment) -> np.ndarray:
    return np.array([assign(e, key).name for key in KEYS])


# --- Assignment -------------------------------------------------------------------------------------------------


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


# --- Statistics -------------------------------------------------------------------------------------------------

TESTS, HORIZON = 2_000, 2_000


def evidence_over_time(rate_a: float, rate_b: float, traffic: float = 0.5) -> np.ndarray:
    """Simulate TESTS experiments of HORIZON requests; returns the evidence after each request [TESTS, HORIZON]."""
    rng = np.random.default_rng(7)
    in_b = rng.random((TESTS, HORIZON), dtype=np.float32) < traffic
    success = rng.random((TESTS, HORIZON), dtype=np.float32) < np.where(in_b, rate_b, rate_a)
    n_b, s_b = np.cumsum(in_b, 1, dtype=np.int32), np.cumsum(in_b & success, 1, dtype=np.int32)
    n_a, s_a = np.cumsum(~in_b, 1, dtype=np.int32), np.cumsum(~in_b & success, 1, dtype=np.int32)
    return log_evidence(s_a, n_a, s_b, n_b)


@pytest.mark.parametrize(("rate", "traffic"), [(0.5, 0.5), (0.97, 0.5), (0.05, 0.1)])
def test_false_alarms_stay_below_alpha_when_looking_after_each_observation(rate: float, traffic: float):
    alarmed = (evidence_over_time(rate, rate, traffic) >= math.log(1 / 0.05)).any(axis=1)
    assert alarmed.mean() <= 0.05


def test_a_real_difference_is_found_with_about_twice_the_samples_of_a_fixed_test():
    needed = sum(required_samples(0.5, 0.15, power=0.8))
    evidence = evidence_over_time(0.5, 0.65)
    found = (evidence >= math.log(1 / 0.05)).any(axis=1)
    first = np.argmax(evidence >= math.log(1 / 0.05), axis=1)[found] + 1
    assert found.mean() > 0.99
    assert np.median(first) < 2.2 * needed


def test_the_interval_covers_the_true_difference_at_all_times_at_once():
    rng = np.random.default_rng(3)
    looks = [5, 20, 80, 320, 1_000]
    missed = 0
    for _ in range(200):
        a, b = rng.random(1_000) < 0.8, rng.random(1_000) < 0.9
        intervals = [difference_interval(int(a[:n].sum()), n, int(b[:n].sum()), n, 0.1) for n in looks]
        missed += any(not low <= 0.1 <= high for low, high in intervals)
    assert missed / 200 <= 0.1


@pytest.mark.parametrize(
    ("a", "b"), [((50, 100), (60, 100)), ((500, 1000), (600, 1000)), ((0, 40), (40, 40)), ((9, 10), (980, 1000)), ((300, 310), (0, 2))]
)
def test_the_interval_leaves_zero_out_exactly_when_the_evidence_says_so(a: tuple[int, int], b: tuple[int, int]):
    for alpha in (0.2, 0.05, 0.001):
        low, high = difference_interval(*a, *b, alpha)
        assert (low > 0 or high < 0) == (float(log_evidence(*a, *b)) > math.log(1 / alpha))
        assert low < b[0] / b[1] - a[0] / a[1] < high or {low, high} & {-1.0, 1.0}


def test_the_interval_narrows_and_is_symmetric():
    wide, narrow = difference_interval(50, 100, 60, 100), difference_interval(5_000, 10_000, 6_000, 10_000)
    assert narrow[1] - narrow[0] < 0.2 * (wide[1] - wide[0])
    swapped = difference_interval(60, 100, 50, 100)
    assert swapped == pytest.approx((-wide[1], -wide[0]), abs=1e-9)


def test_nothing_is_concluded_from_nothing():
    difference = compare((0, 0), (0, 0), 0.05)
    assert (difference.estimate, difference.lower, difference.upper, difference.p_value) == (None, -1.0, 1.0, 1.0)


def test_sample_ratio_alarms_are_rare_under_constant_looking_and_certain_when_the_split_is_broken():
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.random((300, 1_000)) < 0.1, axis=1)
    looks = range(50, 1_000, 50)
    alarms = [any(sample_ratio_p_value([n - int(row[n - 1]), int(row[n - 1])], [0.9, 0.1]) < 0.05 for n in looks) for row in arrivals]
    assert np.mean(alarms) <= 0.05
    assert sample_ratio_p_value([9_000, 1_300], [0.9, 0.1]) < 1e-6
    assert sample_ratio_p_value([100, 1], [1.0, 0.0]) == 0.0
    assert sample_ratio_p_value([0, 0], [0.5, 0.5]) == 1.0


def test_power_agrees_with_simulated_z_tests():
    n, _ = required_samples(0.2, 0.05, power=0.8, alpha=0.05)
    rng = np.random.default_rng(11)
    a, b = rng.binomial(n, 0.2, 20_000) / n, rng.binomial(n, 0.25, 20_000) / n
    pooled = (a + b) / 2
    z = (b - a) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.015)


def test_unequal_traffic_needs_more_samples_in_total():
    assert sum(required_samples(0.2, 0.05, traffic_fraction=0.1)) > sum(required_samples(0.2, 0.05))
    with pytest.raises(ServingError, match="between 0 and 1"):
        required_samples(0.2, 0.9)
