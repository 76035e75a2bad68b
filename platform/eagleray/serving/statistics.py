"""What may be concluded from the outcomes of an experiment. Pure functions.

Everything here may be looked at after each observation: the intervals and p-values are anytime-valid,
so that watching an experiment and stopping when it is clear does not raise the rate of false alarms.
Rates of independent trials are compared exactly; means, ratios and adjusted means asymptotically, from a burn-in on.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eagleray.errors import ServingError

FloatArray = NDArray[np.float64]

BURN_IN = 100
"""Independent outcomes of each arm before an asymptotic interval says anything. Cochran (1977, "Sampling Techniques",
section 2.15) asks of the normal approximation for 25 times the squared skewness: 100 for an exponential outcome
(skewness 2) or a rate of 1 in 7. Give more for outcomes that are more skewed; without, simulated
tests still reject "no difference" falsely less often than alpha (see `_variance`), but the size of a difference is less sure."""

TUNED_FOR = 5_000
"""Outcomes of both arms together at which an asymptotic interval is tightest. At ten times as many it is 7 % wider than
one tuned for that number, at a tenth 26 %."""


@dataclass(frozen=True)
class Difference:
    """What the outcomes say about a variant minus the control: of success rates, of means, or of ratios."""

    estimate: float | None
    """Observed difference; None while one of them has no outcome."""
    lower: float
    upper: float
    """Confidence sequence: covers the true difference at all times at once, with probability 1 - alpha. Infinite where
    nothing can be said yet."""
    p_value: float
    """Anytime-valid p-value of "no difference"."""


# --- Rates of independent trials ---------------------------------------------------------------------------------


def compare(control: tuple[int, int], variant: tuple[int, int], alpha: float) -> Difference:
    """Compare two success rates given (successes, trials) of each; see `difference_interval`."""
    (s_a, n_a), (s_b, n_b) = control, variant
    lower, upper = difference_interval(s_a, n_a, s_b, n_b, alpha)
    p_value = min(1.0, math.exp(-max(0.0, float(log_evidence(s_a, n_a, s_b, n_b)))))
    return Difference(s_b / n_b - s_a / n_a if n_a and n_b else None, lower, upper, p_value)


def difference_interval(s_a: ArrayLike, n_a: ArrayLike, s_b: ArrayLike, n_b: ArrayLike, alpha: float = 0.05) -> tuple[Any, Any]:
    """Return a confidence sequence for p_b - p_a from `s` successes in `n` trials of each arm; arrays broadcast.

    It holds the differences against which `log_evidence` stays below log(1/alpha). Trials must be independent Bernoulli
    trials; arms may share the traffic as they like, and differently over time. No burn-in, no asymptotics.
    """
    s_a, n_a, s_b, n_b = (np.asarray(x, dtype=np.float64)[..., None] for x in (s_a, n_a, s_b, n_b))
    mixture = _log_mixture(s_a, n_a) + _log_mixture(s_b, n_b)

    def is_inside(difference: FloatArray) -> NDArray[np.bool_]:
        return mixture - _log_likelihood(s_a, n_a, s_b, n_b, difference) < math.log(1 / alpha)

    # The region is convex; the observed rates lie in it, and where an arm has no trials any rate of it does. Both ends are bisected.
    centre = np.where(n_b > 0, s_b / np.maximum(n_b, 1), 0.5) - np.where(n_a > 0, s_a / np.maximum(n_a, 1), 0.5)
    inside, outside = np.broadcast_arrays(centre, np.array([-1.0, 1.0]))
    is_everything = is_inside(outside)
    for _ in range(40):
        middle = (inside + outside) / 2
        is_in = is_inside(middle)
        inside, outside = np.where(is_in, middle, inside), np.where(is_in, outside, middle)
    ends = np.where(is_everything, np.array([-1.0, 1.0]), outside)
    return _plain(ends[..., 0]), _plain(ends[..., 1])


def log_evidence(s_a: ArrayLike, n_a: ArrayLike, s_b: ArrayLike, n_b: ArrayLike, difference: ArrayLike = 0.0) -> FloatArray:
    """Return the logarithm of the e-value against p_b - p_a = `difference`; arrays broadcast.

    For one arm, the beta-binomial mixture M(p) = B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^(n - s))
    is a non-negative martingale when p is the true rate (Robbins 1970; Howard, Ramdas, McAuliffe & Sekhon 2021,
    "Time-uniform, nonparametric, nonasymptotic confidence sequences"; Waudby-Smith & Ramdas 2020 as the
    "prior-posterior ratio"). Arms are independent, hence so is the product M_a(p_a) M_b(p_b), in whatever order the
    trials arrive, and by Ville's inequality it ever reaches 1/alpha with probability at most alpha. The e-value is the least
    of it over all pairs of rates with that difference (as Turner & Grünwald 2023 do for their e-variables).
    """
    s_a, n_a, s_b, n_b, difference = (np.asarray(x, dtype=np.float64) for x in (s_a, n_a, s_b, n_b, difference))
    return _log_mixture(s_a, n_a) + _log_mixture(s_b, n_b) - _log_likelihood(s_a, n_a, s_b, n_b, difference)


def _log_mixture(s: FloatArray, n: FloatArray) -> FloatArray:
    """log(B(s + 1/2, n - s + 1/2) / B(1/2, 1/2))."""
    from scipy.special import betaln

    mixture: FloatArray = betaln(s + 0.5, n - s + 0.5) - math.log(math.pi)
    return mixture


def _log_likelihood(s_a: FloatArray, n_a: FloatArray, s_b: FloatArray, n_b: FloatArray, difference: FloatArray) -> FloatArray:
    """Return the greatest log likelihood of rates (p, p + difference), where p solves a cubic equation in closed form.

    Miettinen & Nurminen 1985, "Comparative analysis of two rates", appendix 1.
    """
    from scipy.special import xlog1py, xlogy

    n, s = np.maximum(n_a + n_b, 1), s_a + s_b
    third = ((n_b + 2 * n_a) * difference - n - s) / (3 * n)
    linear = ((n_a * difference - n - 2 * s_a) * difference + s) / n
    constant = s_a * difference * (1 - difference) / n
    cubed = third**3 - third * linear / 2 + constant / 2
    spread = np.copysign(np.sqrt(np.maximum(third**2 - linear / 3, 0)), cubed)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(spread == 0, 0.0, cubed / spread**3)
    p = 2 * spread * np.cos((math.pi + np.arccos(np.clip(cosine, -1, 1))) / 3) - third
    p = np.clip(p, np.maximum(0, -difference), np.minimum(1, 1 - difference))
    q = np.clip(p + difference, 0, 1)
    likelihood: FloatArray = xlogy(s_a, p) + xlog1py(n_a - s_a, -p) + xlogy(s_b, q) + xlog1py(n_b - s_b, -q)
    return likelihood


# --- Means, ratios, adjusted means ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """What the comparisons below need of an arm's rows, K numbers each; grows with the stream and merges.

    Sums of squares are kept about the mean (Chan, Golub & LeVeque 1983), so that numbers far from zero lose no digits.
    Fields may have leading axes, a batch of arms; then what is computed of them has these axes too.
    """

    count: Any
    """int [...]"""
    mean: FloatArray
    """float64 [..., K]"""
    scatter: FloatArray
    """Sums of products of the deviations from the mean, float64 [..., K, K]."""

    @classmethod
    def of(cls, *columns: ArrayLike) -> Moments:
        """Moments of rows given as K columns of one length [N]."""
        rows = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=-1)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(len(columns))
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both together."""
        count = self.count + other.count
        share = np.asarray(other.count / np.maximum(count, 1))[..., None]
        shift = other.mean - self.mean
        between = (self.count * share)[..., None] * shift[..., :, None] * shift[..., None, :]
        return Moments(count, self.mean + share * shift, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> FloatArray:
        """Unbiased, float64 [..., K, K]."""
        covariance: FloatArray = self.scatter / np.maximum(np.asarray(self.count) - 1, 1)[..., None, None]
        return covariance


@dataclass(frozen=True)
class AdjustedDifference(Difference):
    """A difference from which what a covariate explains has been taken."""

    theta: float
    """Difference in outcome that goes with a difference of one in the covariate."""
    variance_removed: float
    """Share of the variance of the unadjusted difference."""


def compare_means(
    control: Moments, variant: Moments, alpha: float = 0.05, *, tuned_for: float = TUNED_FOR, burn_in: int = BURN_IN
) -> Difference:
    """Compare the means of a real-valued outcome, one row (outcome) per independent outcome; see `_sequence`.

    Args:
        tuned_for: number of outcomes, both arms together, at which the interval is to be tightest.
        burn_in: outcomes that each arm must have; before, the interval is infinite.
    """
    pooled, one = _pooled_covariance(control, variant), np.ones(1)
    arms = [_Arm(m.mean[..., 0], _variance(m, one, pooled), m.count, m.count) for m in (control, variant)]
    return Difference(*_sequence(arms, alpha, tuned_for, burn_in))


def compare_clustered(
    control: Moments, variant: Moments, alpha: float = 0.05, *, tuned_for: float = TUNED_FOR, burn_in: int = BURN_IN
) -> Difference:
    """Compare the mean outcome per request where a user sends many: one row (sum of outcomes, number of them) per user.

    Outcomes of one user resemble each other; users are independent. The variance of the ratio of the two sums is taken
    over users by the delta method (Deng, Knoblich & Lu 2018, "Applying the delta method in metric analytics").

    A user's row grows as the user returns, so that the difference is no random walk in the number of users. Its increments
    of one user are positively correlated, hence by Slepian's inequality it crosses a boundary at most as often as
    a random walk whose variance has grown alike. The sum of the squared numbers per user grows at least as fast as that
    variance whatever users resemble, and is what `_sequence` is given as its clock: an interval a little wider, but
    honest, when a few users send all the traffic.

    Args:
        tuned_for: sum of squares of the users' numbers of outcomes at which the interval is to be tightest.
        burn_in: effective users that each arm must have: (sum of numbers)^2 / sum of squares (Kish 1965), so that
            one robot among a hundred users does not count as a hundred. Before, the interval is infinite.
    """
    pooled = _pooled_covariance(control, variant)
    arms = [_ratio_arm(m, _ratio_gradient(m), pooled) for m in (control, variant)]
    return Difference(*_sequence(arms, alpha, tuned_for, burn_in))


def compare_adjusted(
    control: Moments, variant: Moments, alpha: float = 0.05, *, tuned_for: float = TUNED_FOR, burn_in: int = BURN_IN
) -> AdjustedDifference:
    """Compare as `compare_clustered`, less what a covariate explains: rows (sum of outcomes, number of them, covariate) per user.

    The covariate must be known before the experiment, so that the variant cannot have changed it (CUPED: Deng, Xu, Kohavi &
    Walker 2013, "Improving the sensitivity of online controlled experiments by utilizing pre-experiment data"). From the
    difference is taken theta times the difference of the mean covariates, with one theta for both arms, that which leaves the
    least variance: 1 - rho^2 of it where the correlation is rho.

    Theta is estimated from the same rows, so that this is asymptotic as `_sequence` is. Assignment at random makes
    the covariates' difference zero in expectation whatever theta is; the error of theta, of order 1/sqrt(t), meets a difference
    of the same order, and their product vanishes beside the width of the interval (Waudby-Smith et al., as below, on
    regression adjustment; Lin 2013, "Agnostic notes on regression adjustments to experimental data").

    Args are those of `compare_clustered`. Leave users without the covariate out of both arms.
    """
    covariate = np.array([0.0, 0.0, 1.0])
    arms = [(m, _ratio_gradient(m)) for m in (control, variant)]
    shared = sum(_covariance(m, gradient, covariate) for m, gradient in arms)
    spread = sum(_covariance(m, covariate, covariate) for m, _ in arms)
    plain = sum(_covariance(m, gradient, gradient) for m, gradient in arms)
    theta = _divide(shared, spread)
    removed = np.clip(_divide(shared**2, spread * plain), 0.0, 1.0)
    pooled = _pooled_covariance(control, variant)
    adjusted = [_ratio_arm(m, gradient - theta[..., None] * covariate, pooled, theta * m.mean[..., 2]) for m, gradient in arms]
    return AdjustedDifference(*_sequence(adjusted, alpha, tuned_for, burn_in), _plain(theta), _plain(removed))


class _Arm(NamedTuple):
    """An asymptotically linear estimate."""

    value: FloatArray
    variance: FloatArray
    clock: FloatArray
    """What the variance of the sum behind the estimate grows with; see `_sequence`."""
    effective: FloatArray
    """Number of outcomes that a normal approximation can count on."""


def _ratio_arm(m: Moments, gradient: FloatArray, pooled: FloatArray, offset: ArrayLike = 0.0) -> _Arm:
    totals = m.count * m.mean[..., 1]
    squares = m.scatter[..., 1, 1] + m.count * m.mean[..., 1] ** 2
    ratio = _divide(m.mean[..., 0], m.mean[..., 1])
    return _Arm(ratio - offset, _variance(m, gradient, pooled), squares, _divide(totals**2, squares))


def _ratio_gradient(m: Moments) -> FloatArray:
    """Derivative of mean 0 / mean 1 by the means, float64 [..., K]."""
    ratio = _divide(m.mean[..., 0], m.mean[..., 1])
    gradient = np.zeros(m.mean.shape)
    gradient[..., 0] = _divide(np.ones_like(ratio), m.mean[..., 1])
    gradient[..., 1] = _divide(-ratio, m.mean[..., 1])
    return gradient


def _covariance(m: Moments, left: FloatArray, right: FloatArray) -> FloatArray:
    """Covariance of two linear functions of an arm's means, float64 [...]."""
    covariance: FloatArray = np.einsum("...i,...ij,...j->...", left, m.covariance, right) / np.maximum(m.count, 1)
    return covariance


def _variance(m: Moments, gradient: FloatArray, pooled: FloatArray) -> FloatArray:
    """Variance of a linear function of an arm's means, float64 [...]: by its own covariance or that of both arms, what is more.

    A small arm that has seen none of the rare outcomes yet would otherwise be sure that there are none.
    """
    shared: FloatArray = np.einsum("...i,...ij,...j->...", gradient, pooled, gradient) / np.maximum(m.count, 1)
    return np.maximum(_covariance(m, gradient, gradient), shared)


def _pooled_covariance(control: Moments, variant: Moments) -> FloatArray:
    """Covariance within the arms, float64 [..., K, K]."""
    degrees = np.maximum(np.asarray(control.count + variant.count) - 2, 1)
    pooled: FloatArray = (control.scatter + variant.scatter) / degrees[..., None, None]
    return pooled


def _sequence(arms: Sequence[_Arm], alpha: float, tuned_for: float, burn_in: int) -> tuple[Any, Any, Any, Any]:
    """Return (estimate, lower, upper, p-value) of an asymptotic confidence sequence for the second arm minus the first.

    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, "Time-uniform central limit theory and asymptotic confidence
    sequences" (arXiv 2103.06476, 2021; Annals of Statistics 2024), the two-sided mixture boundary:
    standard error × sqrt(2 (t r + 1) / (t r) · log(sqrt(t r + 1) / alpha)), with r tuned for t = `tuned_for`.

    What is asymptotic: the sums behind the estimate are taken for a Brownian motion (a strong approximation, so that it
    holds for all later times at once) and the variances for known. The probability of ever missing the true difference after the
    burn-in tends to at most alpha as the burn-in grows; it needs outcomes with more than two moments, independent of
    each other, and shares of traffic that stay. The clock t is the number of outcomes of both arms.
    """
    control, variant = arms
    t_r = (control.clock + variant.clock) * _mixture_rate(alpha, tuned_for)
    estimate, variance = variant.value - control.value, variant.variance + control.variance
    effective = np.minimum(control.effective, variant.effective)
    # Outcomes that are all the same so far say nothing about how far they may vary.
    is_ready = (effective >= burn_in) & (variance > 0)
    log_e_value = _divide(estimate**2, variance) * t_r / (2 * (t_r + 1)) - np.log1p(t_r) / 2
    radius = np.sqrt(2 * np.maximum(variance, 0) * (1 + _divide(np.ones_like(t_r), t_r)) * (np.log1p(t_r) / 2 - math.log(alpha)))
    radius = np.where(is_ready, radius, np.inf)
    p_value = np.where(is_ready, np.exp(-np.maximum(log_e_value, 0)), 1.0)
    estimate = np.where(effective > 0, estimate, np.nan)
    centre = np.where(effective > 0, estimate, 0.0)
    return _plain(estimate), _plain(centre - radius), _plain(centre + radius), _plain(p_value)


def _mixture_rate(alpha: float, tuned_for: float) -> float:
    """The r for which the boundary of `_sequence` is least at t = `tuned_for`: t r = -W_{-1}(-alpha^2 / e) - 1."""
    from scipy.special import lambertw

    return float(-lambertw(-(alpha**2) / math.e, k=-1).real - 1) / tuned_for


def _divide(numerator: Any, denominator: Any) -> Any:
    """Quotient, and 0 where the denominator is."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.where(denominator == 0, 0.0, numerator / np.where(denominator == 0, 1.0, denominator))


def _plain(value: Any) -> Any:
    """A float, or None for what is not a number; a batch stays an array."""
    if np.ndim(value):
        return value
    return None if np.isnan(value) else float(value)


# --- Guardrails -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether a variant did what it must not."""

    is_breached: bool
    """Certain at the level of the comparison, at whatever moment one looks: false alarms have at most probability alpha."""
    estimate: float | None
    """What was observed; None where there is nothing yet."""
    bound: float
    """The end of the confidence sequence that must not lie beyond the margin."""
    reason: str


def rose(difference: Difference, margin: float, metric: str) -> Verdict:
    """Whether `metric` is higher for the variant by more than `margin` (error rate, say): the lower end is above it.

    The difference comes from the comparison that fits the metric, at the alpha that the guardrail may spend:
    `compare` for independent requests, `compare_clustered` where users send many.
    """
    is_breached = difference.lower > margin
    return Verdict(
        is_breached, difference.estimate, difference.lower, _reason(metric, difference, f"a rise of more than {margin:g}", is_breached)
    )


def fell(difference: Difference, margin: float, metric: str) -> Verdict:
    """Whether `metric` is lower for the variant by more than `margin` (success rate, say): the upper end is below its negative."""
    is_breached = difference.upper < -margin
    return Verdict(
        is_breached, difference.estimate, difference.upper, _reason(metric, difference, f"a fall of more than {margin:g}", is_breached)
    )


def drifted(difference: Difference, margin: float, metric: str) -> Verdict:
    """Whether `metric` differs by more than `margin` in either direction (mean confidence, say); `bound` is the end nearer to zero."""
    is_breached = difference.lower > margin or difference.upper < -margin
    bound = difference.lower if (difference.estimate or 0.0) >= 0 else difference.upper
    return Verdict(is_breached, difference.estimate, bound, _reason(metric, difference, f"a change of more than {margin:g}", is_breached))


def _reason(metric: str, difference: Difference, event: str, is_breached: bool) -> str:
    if difference.estimate is None:
        return f"{metric}: one of the variants has no outcome yet"
    observed = f"{metric}: variant minus control is {difference.estimate:+.4f}"
    if math.isinf(difference.lower):
        return f"{observed}, of too few outcomes yet"
    verdict = "is certain" if is_breached else "is not certain"
    return f"{observed}, between {difference.lower:+.4f} and {difference.upper:+.4f}; {event} {verdict}"


def slices_fell(
    control: Mapping[str, tuple[int, int]], variant: Mapping[str, tuple[int, int]], margin: float, alpha: float, metric: str
) -> dict[str, Verdict]:
    """Whether a rate fell in any of several slices (recall by class, say), given (successes, trials) by slice of each arm.

    Each slice is tested at alpha / number of slices (Bonferroni), so that the probability of any false alarm is at most alpha.
    """
    share = alpha / max(1, len(control))
    return {name: fell(compare(control[name], variant.get(name, (0, 0)), share), margin, f"{metric} of {name}") for name in control}


def latency_rose(control_ms: ArrayLike, variant_ms: ArrayLike, margin: float, alpha: float = 0.05, quantile: float = 0.99) -> Verdict:
    """Whether a quantile of the variant's latency is above the control's by more than the fraction `margin` of it.

    The lower end of the variant's quantile must be above 1 + margin times the upper end of the control's; each end holds with
    probability 1 - alpha / 2, hence both do with 1 - alpha. `estimate` and `bound` are fractions of the control's latency too.
    Requests are taken for independent: a stall that delays many at once counts for more than it should.

    Args:
        control_ms: latencies of all requests so far, float [N], above zero.
        variant_ms: of the variant, float [M].
    """
    metric = f"p{quantile * 100:g} latency"
    control_ms, variant_ms = np.asarray(control_ms, dtype=np.float64), np.asarray(variant_ms, dtype=np.float64)
    if not (control_ms.size and variant_ms.size):
        return Verdict(False, None, -1.0, f"{metric}: one of the variants has no answer yet")
    upper = quantile_interval(control_ms, quantile, alpha / 2)[1]
    lower = max(0.0, quantile_interval(variant_ms, quantile, alpha / 2)[0])
    before, after = float(np.quantile(control_ms, quantile)), float(np.quantile(variant_ms, quantile))
    estimate, bound = after / before - 1, lower / upper - 1
    verdict = "is certain" if bound > margin else "is not certain"
    reason = (
        f"{metric}: the variant's {after:.1f} ms are {estimate:+.1%} against the control's {before:.1f} ms, at least {bound:+.1%}; "
        f"a rise of more than {margin:.1%} {verdict}"
    )
    return Verdict(bound > margin, estimate, bound, reason)


def quantile_interval(values: ArrayLike, quantile: float, alpha: float = 0.05) -> tuple[float, float]:
    """Return a confidence sequence for a quantile of independent values [N], from two of them; infinite where there are too few.

    Howard & Ramdas 2022, "Sequential estimation of quantiles with applications to A/B testing and best-arm identification":
    the number of values up to the quantile is a sum of Bernoulli trials of that rate, and the interval is made of the order
    statistics whose ranks the beta-binomial mixture of `log_evidence` leaves possible. Ties do no harm: broken at random,
    they make the count such a sum.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)

    def is_impossible(rank: int) -> bool:
        mixture = float(_log_mixture(np.asarray(float(rank)), np.asarray(float(n))))
        return mixture - rank * math.log(quantile) - (n - rank) * math.log1p(-quantile) >= math.log(1 / alpha)

    centre = round(n * quantile)
    lowest = bisect_left(range(centre), True, key=lambda rank: not is_impossible(rank))
    highest = centre + bisect_left(range(centre, n + 1), True, key=is_impossible) - 1
    ranked = np.partition(values, sorted({max(lowest - 1, 0), min(highest, n - 1)})) if n else values
    return float(ranked[lowest - 1]) if lowest else -math.inf, float(ranked[highest]) if highest < n else math.inf


# --- Traffic --------------------------------------------------------------------------------------------------------


def sample_ratio_p_value(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return an anytime-valid p-value of "the keys were split by `shares`".

    A small one (below 0.001, say) means that the split itself is broken and no outcome can be trusted.
    Lindon & Malek 2022, "Anytime-valid inference for multinomial count data": the Bayes factor of a
    Dirichlet-multinomial, concentrated around the shares, against the multinomial of the shares.

    Args:
        counts: distinct routing keys by variant.
        shares: expected fraction by variant; they add up to one.
    """
    expected = [(count, share) for count, share in zip(counts, shares, strict=True) if share > 0]
    if sum(counts) > sum(count for count, _ in expected):
        return 0.0  # keys where none can be
    concentration = 100.0
    total = sum(count for count, _ in expected)
    log_factor = math.lgamma(concentration) - math.lgamma(concentration + total)
    for count, share in expected:
        prior = concentration * share
        log_factor += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return min(1.0, math.exp(-max(0.0, log_factor)))


def thompson_weights(successes: Sequence[int], trials: Sequence[int], floor: float = 0.0) -> list[float]:
    """Return traffic weights, adding up to one: the probability of each variant to be the best.

    Thompson 1933, "On the likelihood that one unknown probability exceeds another"; as shares of traffic, Scott 2010, "A modern
    Bayesian look at the multi-armed bandit". Rates have independent Beta(1/2, 1/2) priors. The probability is the mean, over the
    variant's own posterior, of the product of the others' distribution functions: along its quantiles that rises from
    0 to 1, so that the midpoint rule with 1,000 points is off by at most 1/2000.

    Args:
        successes: by variant.
        trials: by variant.
        floor: least share of each, so that learning goes on; the rest is split by the probabilities.

    Raises:
        ServingError: counts that cannot be, or floors that take all traffic.
    """
    from scipy.special import betainc, betaincinv

    s, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if not (s.shape == n.shape and s.ndim == 1 and s.size and np.all((s >= 0) & (s <= n))):
        raise ServingError(f"successes {successes} of trials {trials}: give both for each variant, with 0 ≤ successes ≤ trials")
    if not (floor >= 0 and floor * s.size < 1):
        raise ServingError(f"floor {floor} for {s.size} variants must lie between 0 and 1/{s.size}; lower it")
    a, b = s + 0.5, n - s + 0.5
    points = (np.arange(1_000) + 0.5) / 1_000
    quantiles = betaincinv(a[:, None], b[:, None], points)
    below = betainc(a[:, None, None], b[:, None, None], quantiles)  # [of, at the quantiles of, points]
    below[np.diag_indices(s.size)] = 1.0
    is_best = below.prod(axis=0).mean(axis=1)
    weights: list[float] = (floor + (1 - floor * s.size) * is_best / is_best.sum()).tolist()
    return weights


# --- Heat maps --------------------------------------------------------------------------------------------------


def saliency_similarity(one: ArrayLike, other: ArrayLike) -> float | None:
    """Return how alike the places are that two heat maps, [h, w] each, point at: Spearman's rank correlation.

    As Adebayo et al. 2018, "Sanity checks for saliency maps" (arXiv:1810.03292): 1 is the same order of places, 0 an unrelated
    one. The coarser map is interpolated to the places of the finer one. None where one of them is flat.
    """
    from scipy.ndimage import zoom
    from scipy.stats import rankdata

    coarse, fine = sorted((np.asarray(heat, dtype=np.float64) for heat in (one, other)), key=lambda heat: heat.size)
    scale = tuple(np.divide(fine.shape, coarse.shape))
    ranks = [rankdata(heat) for heat in (zoom(coarse, scale, order=1, mode="nearest", grid_mode=True), fine)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


# --- Sample sizes -----------------------------------------------------------------------------------------------


def required_samples(
    baseline: float, difference: float, power: float = 0.8, alpha: float = 0.05, traffic_fraction: float = 0.5
) -> tuple[int, int]:
    """Return the (control, variant) trials with which a fixed-horizon two-sided z-test finds a difference.

    The classical formula for two proportions with unequal allocation (Fleiss, Levin & Paik 2003, section 4.2, without
    continuity correction). A confidence sequence may be watched all along and needs more: `required_samples_sequential`.

    Args:
        baseline: success rate of the control.
        difference: rate of the variant minus `baseline`.
        traffic_fraction: share of the variant.

    Raises:
        ServingError: a rate, power or share outside its range.
    """
    from scipy.stats import norm

    rate = baseline + difference
    if not (0 < baseline < 1 and 0 <= rate <= 1 and difference != 0):
        raise ServingError(f"baseline {baseline} and difference {difference}: both rates must lie between 0 and 1 and differ")
    for name, value in (("power", power), ("alpha", alpha), ("traffic_fraction", traffic_fraction)):
        if not 0 < value < 1:
            raise ServingError(f"{name} {value} must lie between 0 and 1")
    ratio = traffic_fraction / (1 - traffic_fraction)
    pooled = (baseline + ratio * rate) / (1 + ratio)
    spread_null = math.sqrt((1 + 1 / ratio) * pooled * (1 - pooled))
    spread_alternative = math.sqrt(baseline * (1 - baseline) + rate * (1 - rate) / ratio)
    control = ((norm.ppf(1 - alpha / 2) * spread_null + norm.ppf(power) * spread_alternative) / difference) ** 2
    return math.ceil(control), math.ceil(control * ratio)


@dataclass(frozen=True)
class SequentialSamples:
    """How long a test that is watched all along may take."""

    control: int
    variant: int
    """Trials by which the difference has been found with the probability asked for."""
    expected: int
    """Mean number of trials, both together, when the test stops: at the finding, or there."""


SIMULATED_TESTS = 4_000


def required_samples_sequential(
    baseline: float,
    difference: float,
    power: float = 0.8,
    alpha: float = 0.05,
    traffic_fraction: float = 0.5,
    comparison: Literal["trials", "users"] = "users",
    seed: int = 0,
) -> SequentialSamples:
    """Return the trials with which a confidence sequence that is watched all along finds a difference of rates.

    Simulates tests with that difference and takes the `power` quantile of their stopping times. They look at 1.5 % steps
    of the number of trials; the standard error of the power is 0.8 % at most.

    Args:
        baseline, difference, power, alpha, traffic_fraction: as of `required_samples`.
        comparison: `trials` for `compare`, which is exact and pays for it; `users` for `compare_clustered` where each
            user has one outcome.

    Raises:
        ServingError: a rate, power or share outside its range.
    """
    fixed = sum(required_samples(baseline, difference, power, alpha, traffic_fraction))
    horizon = 4 * fixed
    while True:
        looks = np.unique(np.geomspace(max(2, fixed / 50), horizon, math.ceil(math.log(50 * horizon / fixed) / 0.015)).astype(np.int64))
        n_b = np.rint(looks * traffic_fraction).astype(np.int64)
        n_a = looks - n_b
        rng = np.random.default_rng(seed)
        s_a, s_b = _simulated_successes(rng, n_a, baseline), _simulated_successes(rng, n_b, baseline + difference)
        is_found = (_is_different if comparison == "users" else _is_surely_different)(s_a, n_a, s_b, n_b, alpha)
        stopped = np.where(is_found.any(axis=1), is_found.argmax(axis=1), len(looks))
        last = int(np.quantile(stopped, power, method="higher"))
        if last < len(looks):
            return SequentialSamples(int(n_a[last]), int(n_b[last]), math.ceil(looks[np.minimum(stopped, last)].mean()))
        horizon *= 4


def _simulated_successes(rng: np.random.Generator, trials: NDArray[np.int64], rate: float) -> NDArray[np.int64]:
    """Successes after so many trials, int64 [SIMULATED_TESTS, looks]."""
    return np.cumsum(rng.binomial(np.diff(trials, prepend=0), rate, (SIMULATED_TESTS, len(trials))), axis=1)


def _is_surely_different(s_a: ArrayLike, n_a: ArrayLike, s_b: ArrayLike, n_b: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    is_different: NDArray[np.bool_] = log_evidence(s_a, n_a, s_b, n_b) >= math.log(1 / alpha)
    return is_different


def _is_different(
    s_a: NDArray[np.int64], n_a: NDArray[np.int64], s_b: NDArray[np.int64], n_b: NDArray[np.int64], alpha: float
) -> NDArray[np.bool_]:
    difference = compare_means(_moments_of_trials(s_a, n_a), _moments_of_trials(s_b, n_b), alpha)
    is_different: NDArray[np.bool_] = np.asarray(difference.p_value) < alpha
    return is_different


def _moments_of_trials(successes: NDArray[np.int64], trials: NDArray[np.int64]) -> Moments:
    rate = successes / np.maximum(trials, 1)
    return Moments(np.broadcast_to(trials, rate.shape), rate[..., None], (successes * (1 - rate))[..., None, None])
