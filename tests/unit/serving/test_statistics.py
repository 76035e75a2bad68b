"""The statistics hold what they promise: verified by simulating experiments without and with a difference.

Each promise of "at most 5 % false alarms" is checked on TESTS simulated experiments that are looked at after each observation.
The binomial standard error of a rate of 5 % is 0.5 % there; no allowance is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import norm

from eagleray.errors import ServingError
from eagleray.serving.statistics import (
    BURN_IN,
    Difference,
    Moments,
    compare,
    compare_adjusted,
    compare_clustered,
    compare_means,
    difference_interval,
    drifted,
    fell,
    latency_rose,
    log_evidence,
    quantile_interval,
    required_samples,
    required_samples_sequential,
    rose,
    saliency_similarity,
    sample_ratio_p_value,
    slices_fell,
    thompson_weights,
)

TESTS, HORIZON = 2_000, 1_000
ALPHA = 0.05
LIMIT = math.log(1 / ALPHA)


def z_test_size(difference: float, deviation: float, power: float = 0.8) -> float:
    """Outcomes of both arms together with which a two-sided z-test at ALPHA finds a difference of means, looking once."""
    return 4 * ((norm.ppf(1 - ALPHA / 2) + norm.ppf(power)) * deviation / difference) ** 2


# --- Rates of independent trials --------------------------------------------------------------------------------


def counts_over_time(
    rate_a: float, rate_b: float, traffic: float = 0.5, tests: int = TESTS, horizon: int = HORIZON
) -> tuple[np.ndarray, ...]:
    """Simulate experiments; returns successes and trials of each arm after each request, each [tests, horizon]."""
    rng = np.random.default_rng(7)
    in_b = rng.random((tests, horizon), dtype=np.float32) < traffic
    success = rng.random((tests, horizon), dtype=np.float32) < np.where(in_b, rate_b, rate_a)
    return tuple(np.cumsum(events, axis=1, dtype=np.int32) for events in (~in_b & success, ~in_b, in_b & success, in_b))


@pytest.mark.parametrize(("rate", "traffic"), [(0.5, 0.5), (0.97, 0.5), (0.05, 0.1)])
def test_false_alarms_stay_below_alpha_when_looking_after_each_observation(rate: float, traffic: float):
    assert np.mean((log_evidence(*counts_over_time(rate, rate, traffic)) >= LIMIT).any(axis=1)) <= ALPHA


def test_a_fixed_test_looked_at_after_each_observation_alarms_falsely():
    s_a, n_a, s_b, n_b = counts_over_time(0.5, 0.5)
    pooled = (s_a + s_b) / (n_a + n_b)
    with np.errstate(all="ignore"):
        z = (s_b / n_b - s_a / n_a) / np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    assert np.mean((np.abs(z) > norm.ppf(1 - ALPHA / 2)).any(axis=1)) > 0.3


def test_false_alarms_stay_below_alpha_when_traffic_follows_the_outcomes():
    rng = np.random.default_rng(9)
    s, n = np.zeros((2, TESTS)), np.zeros((2, TESTS))
    alarmed = np.zeros(TESTS, dtype=bool)
    for _ in range(50):
        means = (s + 0.5) / (n + 1)
        n_b = rng.binomial(20, np.clip(0.5 + 3 * (means[1] - means[0]), 0.05, 0.95))
        trials = np.stack([20 - n_b, n_b])
        n += trials
        s += rng.binomial(trials, 0.3)
        alarmed |= log_evidence(s[0], n[0], s[1], n[1]) >= LIMIT
    assert alarmed.mean() <= ALPHA


def test_a_real_difference_is_found_with_about_twice_the_samples_of_a_fixed_test():
    is_found = log_evidence(*counts_over_time(0.5, 0.7)) >= LIMIT
    assert is_found.any(axis=1).mean() > 0.98
    assert np.median(is_found.argmax(axis=1) + 1) < 2.0 * sum(required_samples(0.5, 0.2, power=0.8))


def test_the_interval_covers_the_true_difference_at_all_times_at_once():
    looks = np.unique(np.geomspace(5, HORIZON, 30).astype(int)) - 1
    lower, upper = difference_interval(*(counts[:, looks] for counts in counts_over_time(0.8, 0.9)), alpha=0.1)
    assert np.mean(((lower > 0.1) | (upper < 0.1)).any(axis=1)) <= 0.1


@pytest.mark.parametrize(
    ("a", "b"), [((50, 100), (60, 100)), ((500, 1000), (600, 1000)), ((0, 40), (40, 40)), ((9, 10), (980, 1000)), ((300, 310), (0, 2))]
)
@pytest.mark.parametrize("margin", [0.0, 0.05, -0.3])
def test_the_interval_leaves_a_difference_out_exactly_when_the_evidence_says_so(a: tuple[int, int], b: tuple[int, int], margin: float):
    for alpha in (0.2, 0.05, 0.001):
        low, high = difference_interval(*a, *b, alpha)
        assert (low > margin or high < margin) == (float(log_evidence(*a, *b, margin)) > math.log(1 / alpha))
        assert low < b[0] / b[1] - a[0] / a[1] < high or {low, high} & {-1.0, 1.0}


def test_the_evidence_is_the_least_over_all_pairs_of_rates():
    rng = np.random.default_rng(13)
    for _ in range(200):
        n_a, n_b = (int(10 ** rng.uniform(0, 5)) for _ in range(2))
        s_a, s_b = int(rng.integers(n_a + 1)), int(rng.integers(n_b + 1))
        if rng.random() < 0.3:
            s_a, s_b = min(s_a, 2), max(s_b, n_b - 1)
        d = float(rng.choice([0.0, rng.uniform(-0.99, 0.99)]))

        def surprise(p: float, d: float = d, s_a: int = s_a, n_a: int = n_a, s_b: int = s_b, n_b: int = n_b) -> float:
            return -float(xlogy(s_a, p) + xlogy(n_a - s_a, 1 - p) + xlogy(s_b, p + d) + xlogy(n_b - s_b, 1 - p - d))

        least = minimize_scalar(surprise, bounds=(max(0, -d), min(1, 1 - d)), method="bounded", options={"xatol": 1e-12}).fun
        mixtures = sum(math.lgamma(s + 0.5) + math.lgamma(n - s + 0.5) - math.lgamma(n + 1) for s, n in ((s_a, n_a), (s_b, n_b)))
        assert float(log_evidence(s_a, n_a, s_b, n_b, d)) == pytest.approx(mixtures - 2 * math.log(math.pi) + least, abs=1e-4, rel=1e-6)


def test_the_interval_narrows_and_is_symmetric():
    wide, narrow = difference_interval(50, 100, 60, 100), difference_interval(5_000, 10_000, 6_000, 10_000)
    assert narrow[1] - narrow[0] < 0.2 * (wide[1] - wide[0])
    assert difference_interval(60, 100, 50, 100) == pytest.approx((-wide[1], -wide[0]), abs=1e-9)


def test_nothing_is_concluded_from_nothing():
    assert compare((0, 0), (0, 0), 0.05) == Difference(None, -1.0, 1.0, 1.0)
    nothing = Moments.of([])
    assert compare_means(nothing, nothing) == Difference(None, -math.inf, math.inf, 1.0)
    nobody = Moments.of([], [], [])
    assert compare_adjusted(nobody, nobody).estimate is None


# --- Means ------------------------------------------------------------------------------------------------------


def streamed(is_member: np.ndarray, *columns: np.ndarray) -> Moments:
    """Moments of an arm after each observation, a batch [tests, HORIZON]."""
    count = np.cumsum(is_member, axis=1)
    rows = np.stack(columns, axis=-1) * is_member[..., None]
    mean = np.cumsum(rows, axis=1) / np.maximum(count, 1)[..., None]
    products = np.cumsum(rows[..., :, None] * rows[..., None, :], axis=1)
    return Moments(count, mean, products - count[..., None, None] * mean[..., :, None] * mean[..., None, :])


def in_chunks(simulate: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]) -> np.ndarray:
    """Simulate TESTS experiments of HORIZON observations, some at a time."""
    rng = np.random.default_rng(7)
    return np.concatenate([simulate(rng, (TESTS // 8, HORIZON)) for _ in range(8)])


def excludes(difference: Difference, value: float = 0.0) -> np.ndarray:
    return (np.asarray(difference.lower) > value) | (np.asarray(difference.upper) < value)


@pytest.mark.parametrize("traffic", [0.5, 0.1])
@pytest.mark.parametrize("kind", ["exponential", "2 % failures"])
def test_means_of_skewed_outcomes_alarm_falsely_at_most_alpha(kind: str, traffic: float):
    def simulate(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        outcome = rng.exponential(size=shape) if kind == "exponential" else (rng.random(shape) > 0.02).astype(float)
        in_b = rng.random(shape) < traffic
        return excludes(compare_means(streamed(~in_b, outcome), streamed(in_b, outcome), ALPHA)).any(axis=1)

    assert in_chunks(simulate).mean() <= ALPHA


def test_a_difference_of_means_is_found_with_about_twice_the_outcomes_of_a_fixed_test():
    def simulate(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        in_b = rng.random(shape) < 0.5
        outcome = rng.exponential(np.where(in_b, 1.3, 1.0))
        return excludes(compare_means(streamed(~in_b, outcome), streamed(in_b, outcome), ALPHA, tuned_for=500))

    is_found = in_chunks(simulate)
    assert is_found.any(axis=1).mean() > 0.8
    deviation = math.sqrt((1.0**2 + 1.3**2) / 2)
    assert np.median(np.where(is_found.any(axis=1), is_found.argmax(axis=1), HORIZON) + 1) < 2.0 * z_test_size(0.3, deviation)


def test_before_the_burn_in_the_interval_is_infinite():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 500), rng.normal(5, 1, 500)
    early = compare_means(Moments.of(a), Moments.of(b[: BURN_IN - 1]))
    assert (early.lower, early.upper, early.p_value) == (-math.inf, math.inf, 1.0)
    assert early.estimate == pytest.approx(5, abs=0.5)
    assert compare_means(Moments.of(a), Moments.of(b[:BURN_IN])).lower > 4
    assert compare_means(Moments.of(a), Moments.of(b[:20]), burn_in=20).lower > 3
    constant = Moments.of(np.ones(500))  # has not varied yet, which does not mean that it cannot
    assert compare_means(constant, constant).upper == math.inf


def test_the_interval_is_tightest_for_the_sample_size_it_is_tuned_for():
    rng = np.random.default_rng(2)
    a, b = Moments.of(rng.normal(size=5_000)), Moments.of(rng.normal(size=5_000))

    def width(tuned_for: float) -> float:
        difference = compare_means(a, b, tuned_for=tuned_for)
        return difference.upper - difference.lower

    assert width(10_000) < min(width(5_000), width(20_000)) < 1.02 * width(10_000)
    assert (width(1_000) / width(10_000), width(100_000) / width(10_000)) == pytest.approx((1.07, 1.26), abs=0.01)


def test_the_p_value_is_below_alpha_exactly_when_the_interval_leaves_zero_out():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=1_000), rng.normal(size=1_000)
    differences = [compare_means(Moments.of(a), Moments.of(b + shift), ALPHA) for shift in np.linspace(0, 0.3, 31)]
    assert [difference.p_value < ALPHA for difference in differences] == [bool(excludes(difference)) for difference in differences]
    assert (differences[0].p_value, differences[-1].p_value) == (pytest.approx(1, abs=0.3), pytest.approx(0, abs=1e-4))


def test_moments_merge_and_lose_no_digits_far_from_zero():
    rng = np.random.default_rng(4)
    times, values = 1e9 + rng.normal(size=900), rng.exponential(size=900)
    parts = Moments.of(times[:100], values[:100]).merge(Moments.of([], [])).merge(Moments.of(times[100:], values[100:]))
    assert parts.count == 900
    np.testing.assert_allclose(parts.mean, [times.mean(), values.mean()])
    np.testing.assert_allclose(parts.covariance, np.cov(times, values), rtol=1e-6)


# --- A covariate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traffic", [0.5, 0.2])
def test_adjusted_differences_alarm_falsely_at_most_alpha(traffic: float):
    def simulate(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        before = rng.exponential(size=shape)
        outcome, in_b, ones = before + rng.exponential(0.4, size=shape), rng.random(shape) < traffic, np.ones(shape)
        arms = (streamed(members, outcome, ones, before) for members in (~in_b, in_b))
        return excludes(compare_adjusted(*arms, ALPHA)).any(axis=1)

    assert in_chunks(simulate).mean() <= ALPHA


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_covariate_narrows_the_interval_as_its_correlation_says(rho: float):
    rng = np.random.default_rng(5)

    def arm(n: int, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        before = rng.normal(10, 2, n)
        return effect + 3 * (rho * (before - 10) / 2 + math.sqrt(1 - rho**2) * rng.normal(size=n)), np.ones(n), before

    a, b = arm(20_000, 1.0), arm(5_000, 1.5)
    plain, adjusted = compare_clustered(Moments.of(*a[:2]), Moments.of(*b[:2])), compare_adjusted(Moments.of(*a), Moments.of(*b))
    assert (adjusted.upper - adjusted.lower) / (plain.upper - plain.lower) == pytest.approx(math.sqrt(1 - rho**2), rel=0.03)
    assert adjusted.variance_removed == pytest.approx(rho**2, abs=0.02)
    assert adjusted.theta == pytest.approx(3 * rho / 2, abs=0.03)
    assert adjusted.lower < 0.5 < adjusted.upper


def test_a_covariate_that_does_not_vary_changes_nothing():
    rng = np.random.default_rng(6)
    a, b, ones = rng.normal(size=400), rng.normal(size=400), np.ones(400)
    adjusted = compare_adjusted(Moments.of(a, ones, ones), Moments.of(b, ones, ones))
    plain = compare_means(Moments.of(a), Moments.of(b))
    assert (adjusted.theta, adjusted.variance_removed) == (0.0, 0.0)
    assert (adjusted.estimate, adjusted.lower) == pytest.approx((plain.estimate, plain.lower))


# --- Many outcomes of one user ----------------------------------------------------------------------------------


def returning_users(
    users: int, rate_of: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], requests: int
) -> tuple[float, float]:
    """Simulate experiments in which the same users come back at random; looks after each request.

    Returns the rates of false alarms of `compare_clustered`, which must have come to an interval in all of them, and of a
    comparison that takes requests for independent.
    """
    rng = np.random.default_rng(8)
    rate, arm_of, tests = rate_of(rng, (TESTS, users)), rng.integers(2, size=(TESTS, users)), np.arange(TESTS)
    rows = np.zeros((TESTS, users, 2))
    count, sums, products = np.zeros((2, TESTS)), np.zeros((2, TESTS, 2)), np.zeros((2, TESTS, 2, 2))
    alarmed, alarmed_naively = np.zeros(TESTS, dtype=bool), np.zeros(TESTS, dtype=bool)
    for _ in range(requests):
        user = rng.integers(users, size=TESTS)
        arm, old = arm_of[tests, user], rows[tests, user]
        new = old + np.stack([rng.random(TESTS) < rate[tests, user], np.ones(TESTS)], axis=-1)
        rows[tests, user] = new
        count[arm, tests] += old[:, 1] == 0
        sums[arm, tests] += new - old
        products[arm, tests] += new[:, :, None] * new[:, None, :] - old[:, :, None] * old[:, None, :]
        mean = sums / np.maximum(count, 1)[..., None]
        scatter = products - count[..., None, None] * mean[..., :, None] * mean[..., None, :]
        difference = compare_clustered(*(Moments(count[i], mean[i], scatter[i]) for i in (0, 1)), ALPHA)
        alarmed |= excludes(difference)
        alarmed_naively |= log_evidence(sums[0, :, 0], sums[0, :, 1], sums[1, :, 0], sums[1, :, 1]) >= LIMIT
    assert np.all(np.isfinite(difference.lower))
    return float(alarmed.mean()), float(alarmed_naively.mean())


def test_users_who_send_many_requests_alarm_falsely_at_most_alpha():
    clustered, naive = returning_users(320, lambda rng, shape: rng.beta(0.1, 0.1, shape), 1_500)
    assert clustered <= ALPHA
    assert naive > ALPHA  # which is what the clustered comparison is for


def test_users_who_do_not_differ_alarm_falsely_at_most_alpha():
    clustered, _ = returning_users(320, lambda rng, shape: np.full(shape, 0.5), 1_500)
    assert clustered <= ALPHA


def test_one_outcome_each_is_a_comparison_of_means():
    rng = np.random.default_rng(9)
    a, b, ones = rng.exponential(size=400), rng.exponential(1.5, size=400), np.ones(400)
    means, clustered = compare_means(Moments.of(a), Moments.of(b)), compare_clustered(Moments.of(a, ones), Moments.of(b, ones))
    assert (means.estimate, means.lower, means.upper, means.p_value) == pytest.approx(
        (clustered.estimate, clustered.lower, clustered.upper, clustered.p_value)
    )


def test_users_of_five_outcomes_each_count_as_users():
    rng = np.random.default_rng(10)
    sums_a, sums_b = rng.binomial(5, rng.beta(2, 2, (2, 500)))
    fives = np.full(500, 5)
    clustered = compare_clustered(Moments.of(sums_a, fives), Moments.of(sums_b, fives), tuned_for=25 * 1_000)
    means = compare_means(Moments.of(sums_a / 5), Moments.of(sums_b / 5), tuned_for=1_000)
    assert (clustered.estimate, clustered.lower, clustered.upper) == pytest.approx((means.estimate, means.lower, means.upper))


def test_the_variance_of_a_ratio_is_that_of_repeated_experiments():
    rng = np.random.default_rng(11)
    counts = rng.geometric(0.2, (TESTS, 2, 400))
    sums = rng.binomial(counts, rng.beta(2, 2, counts.shape))
    differences = [compare_clustered(*(Moments.of(s, n) for s, n in zip(*arms, strict=True))) for arms in zip(sums, counts, strict=True)]
    widths = np.array([d.upper - d.lower for d in differences])
    squares = np.sum(counts.astype(float) ** 2, axis=(1, 2))
    known = [compare_means(Moments.of([-1.0, 1.0] * 50), Moments.of([-1.0, 1.0] * 50), tuned_for=5_000 / (s / 200)) for s in squares]
    deviations = widths / np.array([d.upper - d.lower for d in known]) * math.sqrt(2 / 99)
    assert deviations.mean() == pytest.approx(np.std([d.estimate for d in differences]), rel=0.06)


def test_a_robot_does_not_count_as_many_users():
    rng = np.random.default_rng(12)
    sums, counts = rng.binomial(1, 0.5, 200), np.ones(200)
    with_robot = Moments.of(np.append(sums, 5_000), np.append(counts, 10_000))
    assert compare_clustered(Moments.of(sums, counts), with_robot).upper == math.inf
    assert compare_clustered(Moments.of(sums, counts), Moments.of(sums, counts)).upper < 1


# --- Guardrails -------------------------------------------------------------------------------------------------


def test_a_rate_that_rose_just_to_the_margin_breaches_falsely_at_most_alpha():
    s_a, n_a, s_b, n_b = counts_over_time(0.02, 0.05, traffic=0.3)
    is_above = s_b / np.maximum(n_b, 1) - s_a / np.maximum(n_a, 1) > 0.03
    alarmed = (log_evidence(s_a, n_a, s_b, n_b, 0.03) >= LIMIT) & is_above
    assert alarmed.any(axis=1).mean() <= ALPHA
    # `rose` says the same, where it is asked.
    for test in range(20):
        at = test, HORIZON - 1 - 40 * test
        verdict = rose(compare((s_a[at], n_a[at]), (s_b[at], n_b[at]), ALPHA), 0.03, "error rate")
        assert verdict.is_breached == alarmed[at]


def test_a_rate_that_fell_just_to_the_margin_in_each_slice_breaches_falsely_at_most_alpha():
    s_a, n_a, s_b, n_b = (counts.reshape(3, TESTS, 300) for counts in counts_over_time(0.9, 0.85, tests=3 * TESTS, horizon=300))
    is_below = s_b / np.maximum(n_b, 1) - s_a / np.maximum(n_a, 1) < -0.05
    alarmed = (log_evidence(s_a, n_a, s_b, n_b, -0.05) >= math.log(3 / ALPHA)) & is_below
    assert alarmed.any(axis=(0, 2)).mean() <= ALPHA


def test_slices_share_alpha_and_the_one_that_fell_is_named():
    control = {"cat": (950, 1_000), "dog": (950, 1_000), "frog": (0, 0)}
    verdicts = slices_fell(control, {"cat": (948, 1_000), "dog": (800, 1_000)}, 0.05, ALPHA, "recall")
    assert [name for name, verdict in verdicts.items() if verdict.is_breached] == ["dog"]
    assert verdicts["dog"].bound == compare((950, 1_000), (800, 1_000), ALPHA / 3).upper
    assert "recall of dog" in verdicts["dog"].reason
    assert verdicts["frog"].estimate is None
    assert "no outcome yet" in verdicts["frog"].reason


def test_a_mean_confidence_that_drifted_just_to_the_margin_breaches_falsely_at_most_alpha():
    def simulate(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        in_b = rng.random(shape) < 0.5
        confidence = np.where(in_b, rng.beta(8.5, 1.5, shape), rng.beta(9.0, 1.0, shape))
        difference = compare_means(streamed(~in_b, confidence), streamed(in_b, confidence), ALPHA)
        return ((np.asarray(difference.lower) > 0.05) | (np.asarray(difference.upper) < -0.05)).any(axis=1)

    assert in_chunks(simulate).mean() <= ALPHA


def test_what_went_wrong_is_said_with_its_numbers():
    errors = rose(compare((10, 2_000), (160, 2_000), ALPHA), 0.01, "error rate")
    assert errors.is_breached
    assert errors.bound > 0.01
    assert errors.reason.startswith("error rate: variant minus control is +0.0750, between +0.0")
    assert errors.reason.endswith("a rise of more than 0.01 is certain")
    fine = rose(compare((10, 2_000), (12, 2_000), ALPHA), 0.01, "error rate")
    assert not fine.is_breached
    assert fine.reason.endswith("is not certain")
    assert fell(compare((900, 1_000), (700, 1_000), ALPHA), 0.05, "success rate").is_breached
    assert not fell(compare((700, 1_000), (900, 1_000), ALPHA), 0.05, "success rate").is_breached
    early = drifted(compare_means(Moments.of([0.1, 0.2]), Moments.of([0.8, 0.9])), 0.05, "confidence")
    assert (early.is_breached, early.reason) == (False, "confidence: variant minus control is +0.7000, of too few outcomes yet")
    for sign in (1, -1):
        moved = drifted(Difference(0.1 * sign, min(0.06 * sign, 0.14 * sign), max(0.06 * sign, 0.14 * sign), 0.001), 0.05, "confidence")
        assert (moved.is_breached, moved.bound) == (True, 0.06 * sign)


def test_the_interval_of_a_quantile_covers_it_at_all_times_at_once():
    # Of the values 1 … n the interval's ends are ranks, so that one set of intervals serves all tests.
    ranks = [quantile_interval(np.arange(1, n + 1), 0.99, ALPHA) for n in range(1, HORIZON + 1)]
    lower, upper = np.array(ranks).T
    assert np.isfinite(lower[-1])
    assert np.isfinite(upper[-1])
    below = np.cumsum(np.random.default_rng(14).random((TESTS, HORIZON)) < 0.99, axis=1)
    assert np.mean(((below < lower) | (below >= upper)).any(axis=1)) <= ALPHA


def test_latency_that_rose_just_to_the_margin_breaches_falsely_at_most_alpha():
    rng = np.random.default_rng(15)
    a, b = np.round(rng.lognormal(3, 0.5, (TESTS, 2_000)), 1), np.round(1.5 * rng.lognormal(3, 0.5, (TESTS, 800)), 1)
    looks = [(200, 80), (800, 320), (2_000, 800)]
    alarmed = [any(latency_rose(x[:n], y[:m], 0.5, ALPHA).is_breached for n, m in looks) for x, y in zip(a, b, strict=True)]
    assert np.mean(alarmed) <= ALPHA


def test_a_slow_variant_is_found():
    rng = np.random.default_rng(16)
    control, variant = rng.lognormal(3, 0.3, 4_000), rng.lognormal(3, 0.3, 1_000)
    assert not latency_rose(control, variant, 0.2).is_breached
    slow = latency_rose(control, 3 * variant, 0.5)
    assert slow.is_breached
    assert slow.estimate == pytest.approx(2.0, abs=0.5)
    assert 0.5 < slow.bound < slow.estimate
    assert "p99 latency" in slow.reason
    assert not latency_rose(control[:50], 3 * variant, 0.5).is_breached  # 50 requests say nothing of the slowest hundredth
    assert latency_rose([], variant, 0.5).estimate is None


# --- Traffic ----------------------------------------------------------------------------------------------------


def test_sample_ratio_alarms_are_rare_under_constant_looking_and_certain_when_the_split_is_broken():
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.random((TESTS, HORIZON)) < 0.1, axis=1)
    looks = range(50, HORIZON, 50)
    alarms = [any(sample_ratio_p_value([n - int(row[n - 1]), int(row[n - 1])], [0.9, 0.1]) < 0.05 for n in looks) for row in arrivals]
    assert np.mean(alarms) <= 0.05
    assert sample_ratio_p_value([9_000, 1_300], [0.9, 0.1]) < 1e-6
    assert sample_ratio_p_value([100, 1], [1.0, 0.0]) == 0.0
    assert sample_ratio_p_value([0, 0], [0.5, 0.5]) == 1.0


@pytest.mark.parametrize(("successes", "trials"), [((3, 5), (10, 10)), ((40, 55, 50), (100, 110, 90)), ((0, 999_000), (3, 1_000_000))])
def test_thompson_weights_are_the_probabilities_of_being_best(successes: tuple[int, ...], trials: tuple[int, ...]):
    rng = np.random.default_rng(17)
    draws = rng.beta(np.array(successes) + 0.5, np.array(trials) - successes + 0.5, (400_000, len(trials)))
    expected = np.bincount(draws.argmax(axis=1), minlength=len(trials)) / len(draws)
    np.testing.assert_allclose(thompson_weights(successes, trials), expected, atol=1e-3 + 3 * 0.5 / math.sqrt(len(draws)))


def test_thompson_weights_keep_a_floor_for_each():
    assert thompson_weights([0, 0, 0], [0, 0, 0]) == pytest.approx([1 / 3] * 3)
    weights = thompson_weights([100, 900], [1_000, 1_000], floor=0.05)
    assert weights == pytest.approx([0.05, 0.95])
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(("successes", "trials", "floor"), [([1, 2], [2, 1], 0.0), ([1], [2, 1], 0.0), ([1, 1], [2, 2], 0.5)])
def test_impossible_counts_and_floors_are_refused(successes: list[int], trials: list[int], floor: float):
    with pytest.raises(ServingError, match=r"give both|lower it"):
        thompson_weights(successes, trials, floor)


# --- Sample sizes -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("comparison", ["trials", "users"])
def test_the_samples_of_a_watched_test_give_the_power_asked_for(comparison: Literal["trials", "users"]):
    needed = required_samples_sequential(0.5, 0.2, power=0.8, comparison=comparison)
    total = needed.control + needed.variant
    s_a, n_a, s_b, n_b = counts_over_time(0.5, 0.7, horizon=total)
    is_found = log_evidence(s_a, n_a, s_b, n_b) >= LIMIT
    if comparison == "users":
        in_b = np.diff(n_b, prepend=0, axis=1) > 0
        success = np.diff(s_a + s_b, prepend=0, axis=1) > 0
        is_found = excludes(compare_means(streamed(~in_b, success), streamed(in_b, success), ALPHA))
    assert is_found.any(axis=1).mean() == pytest.approx(0.8, abs=0.04)
    stopped = np.where(is_found.any(axis=1), is_found.argmax(axis=1) + 1, total)
    assert needed.expected == pytest.approx(stopped.mean(), rel=0.05)


def test_watching_costs_less_than_twice_the_samples_of_a_fixed_test_and_exactness_more():
    fixed = sum(required_samples(0.9, 0.02))
    users, trials = (required_samples_sequential(0.9, 0.02, comparison=comparison) for comparison in ("users", "trials"))
    assert users.expected < 1.1 * fixed < users.control + users.variant < 2 * fixed
    assert users.control + users.variant < trials.expected < trials.control + trials.variant < 5 * fixed
    assert required_samples_sequential(0.9, 0.02) == users
    skewed = required_samples_sequential(0.9, 0.02, traffic_fraction=0.1)
    assert skewed.variant / (skewed.control + skewed.variant) == pytest.approx(0.1, abs=0.001)
    with pytest.raises(ServingError, match="between 0 and 1"):
        required_samples_sequential(0.9, 0.2)


def test_heat_maps_are_compared_by_the_order_of_their_places():
    heat = np.arange(49.0).reshape(7, 7)
    assert saliency_similarity(heat, heat**3) == pytest.approx(1.0)
    assert saliency_similarity(heat, heat.max() - heat) == pytest.approx(-1.0)
    noise = np.random.default_rng(0).random((2, 40, 40))
    assert abs(saliency_similarity(*noise) or 1) < 0.1
    finer = np.kron(heat, np.ones((2, 2)))
    assert saliency_similarity(heat, finer) == saliency_similarity(finer, heat) > 0.95
    assert saliency_similarity(heat, np.zeros((7, 7))) is None
