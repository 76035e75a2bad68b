"""Experiments: which variants there are, who gets which, and how an experiment changes and ends. Pure functions."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

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

    mirror: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """A shadow: it gets a copy of this fraction of the requests and answers nobody."""

    @model_validator(mode="after")
    def _answers_or_watches(self) -> Variant:
        if self.mirror and self.weight:
            raise ValueError(f"the shadow '{self.name}' has the weight {self.weight:g}; a shadow answers nobody, its weight is 0")
        return self

    @property
    def is_shadow(self) -> bool:
        return self.mirror > 0


class Guardrail(Section):
    """What no variant may do, compared with the control; a breach gives all traffic back to the control."""

    metric: Literal["error_rate", "p99_latency", "outcome", "recall", "confidence"]
    margin: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """What is still borne: more errors or lower rates, as a difference of fractions; slower answers, as a fraction
    of the control's latency; a changed mean confidence, as a difference in either direction."""

    label: str | None = None
    """The class whose recall must not fall."""

    @model_validator(mode="after")
    def _recall_is_of_a_class(self) -> Guardrail:
        if (self.metric == "recall") != (self.label is not None):
            raise ValueError("recall needs the label of a class, and no other metric has one")
        return self

    def __str__(self) -> str:
        return f"{self.metric} of {self.label}" if self.label else self.metric


DEFAULT_GUARDRAILS = (
    Guardrail(metric="error_rate", margin=0.01),
    Guardrail(metric="p99_latency", margin=1.0),
    Guardrail(metric="outcome", margin=0.05),
)


class RampStep(Section):
    """One step of a canary: the share of the users that the challenger gets, and for how long at least."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    hold_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


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
    reason: str | None = None
    """Why it ended, where a guardrail ended it."""

    outcome: Literal["proportion", "mean"] = "proportion"
    """What is compared: the rate of successes, or the mean of a number that the feedback brings."""

    policy: Literal["fixed", "thompson"] = "fixed"
    """`thompson` moves traffic to what looks best as outcomes arrive."""

    ramp: tuple[RampStep, ...] = ()
    """Steps by which the only challenger's share grows: the one in force, then those to come."""

    guardrails: tuple[Guardrail, ...] = ()
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
        if self.control.is_shadow:
            raise ValueError(f"the first variant, '{self.control.name}', is the control and cannot be a shadow")
        if self.ramp and len(self.contenders) != 2:
            raise ValueError(f"a ramp needs one challenger besides the control; variants: {', '.join(names)}")
        if self.policy == "thompson" and (self.ramp or self.outcome == "mean"):
            raise ValueError(
                "policy 'thompson' compares proportions and sets the weights by itself; leave the ramp out and outcome as it is"
            )
        return self

    @property
    def control(self) -> Variant:
        return self.variants[0]

    @property
    def contenders(self) -> tuple[Variant, ...]:
        """The variants that answer users: all but the shadows."""
        return tuple(variant for variant in self.variants if not variant.is_shadow)

    @property
    def answering(self) -> Variant:
        """The variant that answers all users once the experiment has ended, and the control as long as it runs."""
        return self.control if self.winner is None else self.variant(self.winner)

    @property
    def is_running(self) -> bool:
        return self.status == "running"

    @property
    def is_watched(self) -> bool:
        """Whether something may have to be decided while nobody looks."""
        return self.is_running and len(self.variants) > 1 and bool(self.guardrails or self.ramp or self.policy == "thompson")

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


def new_experiment(model: str, variants: Iterable[Variant], salt: str | None = None, **settings: Any) -> Experiment:
    """Return a running experiment that starts now; the first variant is the control.

    Args:
        settings: further fields of `Experiment`.

    Raises:
        ServingError: the settings do not fit each other.
    """
    now = datetime.now(UTC)
    name = f"{model}-{now:%Y%m%dt%H%M%S}-{secrets.token_hex(2)}"
    try:
        return Experiment(
            id=name, model=model, salt=salt or secrets.token_hex(16), variants=tuple(variants), started=now, revised=now, **settings
        )
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ServingError(f"an experiment on '{model}' cannot be so: {reasons}") from None


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
    """Return the experiment with other weights, as a new revision and without what was left of its ramp.

    Variants not named keep their weight.

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
        if weight and experiment.variant(name).is_shadow:
            raise ServingError(f"'{name}' is a shadow and answers nobody; promote it, or start an experiment with it as challenger")
    variants = tuple(v.model_copy(update={"weight": float(weights.get(v.name, v.weight))}) for v in experiment.variants)
    if sum(variant.weight for variant in variants) <= 0:
        raise ServingError(f"all weights of '{experiment.model}' would be zero; give one variant a positive weight")
    return experiment.model_copy(update={"variants": variants, "revision": experiment.revision + 1, "revised": now, "ramp": ()})


def next_ramp_step(experiment: Experiment, now: datetime) -> Experiment | None:
    """Return the experiment on the next step of its ramp, as a new revision; None before the step in force has been held."""
    if len(experiment.ramp) < 2 or (now - experiment.revised).total_seconds() < experiment.ramp[0].hold_s:
        return None
    steps = experiment.ramp[1:]
    control, challenger = experiment.contenders
    weights = {control.name: 1 - steps[0].share, challenger.name: steps[0].share}
    return with_weights(experiment, weights, now).model_copy(update={"ramp": steps})


def with_policy_weights(experiment: Experiment, weights: Mapping[str, float]) -> Experiment:
    """Return the experiment with the weights that its policy asks for, within the same revision.

    Outcomes before and after are compared together: that is what the policy learns from. A drift of the outcome over
    time may therefore look like a difference between variants; see docs.
    """
    variants = tuple(v.model_copy(update={"weight": weights.get(v.name, v.weight)}) for v in experiment.variants)
    return experiment.model_copy(update={"variants": variants})


def conclude(
    experiment: Experiment, winner: str, status: Literal["promoted", "aborted"], now: datetime, reason: str | None = None
) -> Experiment:
    """Return the experiment as ended, for what `reason`: all traffic goes to `winner`.

    Raises:
        ServingError: it has ended before, or there is no such variant.
    """
    if not experiment.is_running:
        raise ServingError(f"the experiment on '{experiment.model}' has already ended ({experiment.status})")
    experiment.variant(winner)
    return experiment.model_copy(update={"status": status, "winner": winner, "ended": now, "reason": reason})
