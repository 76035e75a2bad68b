"""Experiments: who gets which variant, and what may be concluded from the outcomes. Pure functions.

Everything here may be looked at after each observation: the intervals and p-values are anytime-valid,
so that watching an experiment and stopping when it is clear does not raise the rate of false alarms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from eagleray.config.schema import Section
from eagleray.errors import ServingError, near_miss

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
NOT_COUNTED = 0
"""Revision of requests that are not part of the comparison: testers' overrides, and traffic after the end."""


class Variant(Section):
    """One of the versions that an experiment compares."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1)]
    weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """Traffic relative to the other variants' weights."""


class Experiment(Section):
    """A split of a model's traffic; the first variant is the control the others are compared with."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,126}$")]
    model: Annotated[str, Field(pattern=NAME_PATTERN)]
    salt: Annotated[str, Field(min_length=8)]
    """Makes assignments of different experiments independent of each other."""

    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    status: Literal["running", "promoted", "aborted"] = "running"
    winner: str | None = None
    """The variant that gets all traffic once the experiment has ended."""

    started: datetime
    revision: Annotated[int, Field(ge=1)] = 1
    """Counts changes of weights. Outcomes are compared within one revision: pooled over several, a drift
    of the outcome over time would look like a difference between variants."""

    revised: datetime
    """When the current weights came into force."""

    ended: datetime | None = None
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Probability of ever reporting a difference where there is none."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants have the same name: {', '.join(sorted(names))}")
        if sum(variant.weight for variant in self.variants) <= 0:
            raise ValueError("all weights are zero; give one variant a positive weight")
        if (self.status == "running") != (self.winner is None):
            raise ValueError("a running experiment has no winner, and an ended one has")
        if self.winner is not None and self.winner not in names:
            raise ValueError(f"the winner '{self.winner}' is none of the variants {', '.join(names)}")
        return self

    @property
    def control(self) -> Variant:
        return self.variants[0]

    @property
    def is_running(self) -> bool:
        return self.status == "running"

    @property
    def shares(self) -> dict[str, float]:
        """Expected fraction of routing keys by variant."""
        total = sum(variant.weight for variant in self.variants)
        return {variant.name: variant.weight / total for variant in self.variants}

    def variant(self, name: str) -> Variant:
        """Return the variant called `name`.

        Raises:
            ServingError: there is none; names the nearest.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = [variant.name for variant in self.variants]
        raise ServingError(f"'{self.model}' has no variant '{name}'{near_miss(name, names)}; variants: {', '.join(names)}")


def assign(experiment: Experiment, routing_key: str) -> Variant:
    """Return the variant of a user: always the same for the same salt, key and weights.

    Weighted rendezvous hashing (Thaler & Ravishankar 1998; Schindelhauer & Schomaker 2005): each variant
    draws an exponential waiting time at rate `weight` from hash(salt, variant, key) and the shortest wins.
    When the weight of one variant changes, keys move to it or from it and between no others: exactly
    the change of its share, the least that is possible.
    """
    if experiment.winner is not None:
        return experiment.variant(experiment.winner)
    candidates = [variant for variant in experiment.variants if variant.weight > 0]
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda variant: -math.log(_uniform(experiment.salt, variant.name, routing_key)) / variant.weight)


def _uniform(salt: str, variant: str, routing_key: str) -> float:
    """Return a number in (0, 1) that depends on all three."""
    salt_digest = hashlib.sha256(salt.encode()).digest()
    digest = hashlib.blake2b(f"{variant}\0{routing_key}".encode(), key=salt_digest, digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / (2**64 + 1)


def with_weights(experiment: Experiment, weights: Mapping[str, float], now: datetime) -> Experiment:
    """Return the experiment with other weights, as a new revision; variants not named keep theirs.

    Raises:
        ServingError: the experiment has ended, a variant is unknown, or the weights cannot be.
    """
    if not experiment.is_running:
        raise ServingError(f"the experiment on '{experiment.model}' has ended ({experiment.status}); start a new one")
    for name in weights:
        experiment.variant(name)
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ServingError(f"weight of '{name}': {weight} is not a number from 0 up")
    variants = tuple(v.model_copy(update={"weight": float(weights.get(v.name, v.weight))}) for v in experiment.variants)
    if sum(variant.weight for variant in variants) <= 0:
        raise ServingError(f"all weights of '{experiment.model}' would be zero; give one variant a positive weight")
    return experiment.model_copy(update={"variants": variants, "revision": experiment.revision + 1, "revised": now})


def conclude(experiment: Experiment, winner: str, status: Literal["promoted", "aborted"], now: datetime) -> Experiment:
    """Return the experiment as ended: all traffic goes to `winner`.

    Raises:
        ServingError: it has ended before, or there is no such variant.
    """
    if not experiment.is_running:
        raise ServingError(f"the experiment on '{experiment.model}' has already ended ({experiment.status})")
    experiment.variant(winner)
    return experiment.model_copy(update={"status": status, "winner": winner, "ended": now})


# --- Statistics -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What the outcomes say about the success rate of a variant minus that of the control."""

    estimate: float | None
    """Observed difference; None while one of them has no outcome."""
    lower: float
    upper: float
    """Confidence sequence: covers the true difference at all times at once, with probability 1 - alpha."""
    p_value: float
    """Anytime-valid p-value of "no difference"."""


def compare(control: tuple[int, int], variant: tuple[int, int], alpha: float) -> Difference:
    """Compare two success rates given (successes, trials) of each; see `difference_interval`."""
    (s_a, n_a), (s_b, n_b) = control, variant
    lower, upper = difference_interval(s_a, n_a, s_b, n_b, alpha)
    p_value = min(1.0, math.exp(-max(0.0, float(log_evidence(s_a, n_a, s_b, n_b)))))
    return Difference(s_b / n_b - s_a / n_a if n_a and n_b else None, lower, upper, p_value)


def difference_interval(s_a: int, n_a: int, s_b: int, n_b: int, alpha: float = 0.05) -> tuple[float, float]:
    """Return a confidence sequence for p_b - p_a from `s` successes in `n` trials of each arm.

    For one arm, the beta-binomial mixture M(p) = B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^(n - s))
    is a non-negative martingale when p is the true rate (Robbins 1970; Howard, Ramdas, McAuliffe & Sekhon 2021,
    "Time-uniform, nonparametric, nonasymptotic confidence sequences"; Waudby-Smith & Ramdas 2020 as the
    "prior-posterior ratio"). Arms are independent, hence so is the product M_a(p_a) M_b(p_b), in whatever order the
    trials arrive, and by Ville's inequality it ever reaches 1/alpha with probability at most alpha. The interval is the
    projection of {(p_a, p_b): M_a M_b < 1/alpha} on p_b - p_a (as Turner & Grünwald 2023 do for their e-variables).

    Trials must be independent Bernoulli trials. No burn-in, no asymptotics.
    """
    limit = math.log(1.0 / alpha)
    constant = _log_mixture(s_a, n_a) + _log_mixture(s_b, n_b)

    def is_inside(delta: float) -> bool:
        return constant + _least_surprise(delta, s_a, n_a, s_b, n_b) < limit

    # The region is convex; the observed rates lie in it, and where an arm has no trials any rate of it does.
    centre = (s_b / n_b if n_b else 0.5) - (s_a / n_a if n_a else 0.5)
    return _edge(is_inside, centre, -1.0), _edge(is_inside, centre, 1.0)


def log_evidence(s_a: ArrayLike, n_a: ArrayLike, s_b: ArrayLike, n_b: ArrayLike) -> NDArray[np.float64]:
    """Return the logarithm of the e-value against p_a = p_b; arrays broadcast.

    It is above log(1/alpha) exactly when `difference_interval` at `alpha` leaves zero out.
    """
    from scipy.special import betaln, xlogy

    s_a, n_a, s_b, n_b = (np.asarray(x, dtype=np.float64) for x in (s_a, n_a, s_b, n_b))
    successes, trials = s_a + s_b, n_a + n_b
    failures = trials - successes
    # The pooled rate is the p for which M_a(p) M_b(p) is least.
    pooled = successes / np.maximum(trials, 1)
    mixtures = betaln(s_a + 0.5, n_a - s_a + 0.5) + betaln(s_b + 0.5, n_b - s_b + 0.5) - 2 * betaln(0.5, 0.5)
    evidence: NDArray[np.float64] = mixtures - xlogy(successes, pooled) - xlogy(failures, 1 - pooled)
    return evidence


def _log_mixture(s: int, n: int) -> float:
    """log(B(s + 1/2, n - s + 1/2) / B(1/2, 1/2))."""
    return math.lgamma(s + 0.5) + math.lgamma(n - s + 0.5) - math.lgamma(n + 1) - math.log(math.pi)


def _least_surprise(delta: float, s_a: int, n_a: int, s_b: int, n_b: int) -> float:
    """Return the minimum over p of -log likelihood of rates (p, p + delta): convex in p, so its slope is bisected."""
    low, high = max(0.0, -delta), min(1.0, 1.0 - delta)
    for _ in range(60):
        p = (low + high) / 2
        slope = _ratio(n_a - s_a, 1 - p) - _ratio(s_a, p) + _ratio(n_b - s_b, 1 - p - delta) - _ratio(s_b, p + delta)
        low, high = (low, p) if slope > 0 else (p, high)
    p = (low + high) / 2
    return -(_xlogy(s_a, p) + _xlogy(n_a - s_a, 1 - p) + _xlogy(s_b, p + delta) + _xlogy(n_b - s_b, 1 - p - delta))


def _ratio(count: int, probability: float) -> float:
    return count / max(probability, 1e-300) if count else 0.0


def _xlogy(count: int, probability: float) -> float:
    return count * math.log(max(probability, 1e-300)) if count else 0.0


def _edge(is_inside: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the end of a convex set between a point in it and the end of the range."""
    if is_inside(outside):
        return outside
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_inside(middle) else (inside, middle)
    return outside


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


def required_samples(
    baseline: float, difference: float, power: float = 0.8, alpha: float = 0.05, traffic_fraction: float = 0.5
) -> tuple[int, int]:
    """Return the (control, variant) trials with which a fixed-horizon two-sided z-test finds a difference.

    The classical formula for two proportions with unequal allocation (Fleiss, Levin & Paik 2003, section 4.2, without
    continuity correction). A confidence sequence may be watched all along and needs more; see docs.

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
