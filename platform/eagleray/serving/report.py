"""An experiment's log as figures: shares, errors, latency, outcomes and what they prove."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eagleray.serving import statistics
from eagleray.serving.experiment import Experiment, Guardrail
from eagleray.serving.statistics import Moments

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p-value the split is called broken."""

LEAST_SHARE = 0.02
"""Of the users, that a policy leaves to each variant: what looks bad early may still turn out well."""


def experiment_report(experiment: Experiment, assignments: pa.Table, outcomes: pa.Table) -> dict[str, Any]:
    """Summarise what happened under the current weights (revision), as plain JSON values.

    `share` and the sample-ratio check count distinct routing keys, for those are what is split. A difference counts
    each outcome as an independent trial, which they are where each user has one, and is exact from the first on. `by_user`
    compares with users as the trials: needed where users come back, narrower in any case, and says nothing before 100 users.
    `adjusted` also uses what was known of the users before (CUPED).

    Args:
        assignments: columns of `outcomes.assignments_schema`, one row per request and variant that saw it.
        outcomes: columns of `outcomes.outcomes_schema`, one row per request.
    """
    assignments, outcomes = _of_revision(assignments, experiment.revision), _of_revision(outcomes, experiment.revision)
    arms = {variant.name: _Arm.of(variant.name, assignments, outcomes) for variant in experiment.contenders}
    control = arms[experiment.control.name]
    others = {name: arm for name, arm in arms.items() if arm is not control}
    # The other arms share alpha, so that none of the comparisons raises a false alarm with more than alpha (Bonferroni).
    alpha = experiment.alpha / max(1, len(others))
    return {
        "model": experiment.model,
        "experiment": experiment.id,
        "status": experiment.status,
        "winner": experiment.winner,
        "reason": experiment.reason,
        "started": experiment.started.isoformat(),
        "revision": experiment.revision,
        "revised": experiment.revised.isoformat(),
        "control": experiment.control.name,
        "outcome": experiment.outcome,
        "policy": experiment.policy,
        "variants": _variants(experiment, arms),
        "shadows": {v.name: _shadow(v.name, assignments, outcomes) | {"version": v.version} for v in experiment.variants if v.is_shadow},
        "differences": {name: _difference(experiment, control, arm, alpha) | {"alpha": alpha} for name, arm in others.items()},
        "guardrails": _guardrails(experiment, control, others),
        "policy_weights": _policy_weights(experiment, arms),
        "sample_ratio": _sample_ratio(experiment, arms),
    }


@dataclass(frozen=True)
class _Arm:
    """What one variant did: columns of its assignments, and of its outcomes joined with them, as arrays."""

    requests: int
    keys: int
    errors: int
    latency_ms: NDArray[np.float64]
    probability: NDArray[np.float64]
    askers: NDArray[np.int64]
    """Who got each answer, counted from 0."""
    values: NDArray[np.float64]
    """Outcomes, in the order in which they arrived."""
    labels: NDArray[np.object_]
    users: NDArray[np.int64]
    """Whose outcome it is, counted from 0."""
    covariates: NDArray[np.float64]
    """NaN where none was given."""

    @classmethod
    def of(cls, name: str, assignments: pa.Table, outcomes: pa.Table) -> _Arm:
        import pyarrow.compute as pc

        mine = assignments.filter(pc.field("variant") == name)
        answered = mine.filter(~pc.field("is_error"))
        known = mine.select(["request_id", "key_hash", "covariate"])
        judged = outcomes.filter(pc.field("variant") == name).join(known, "request_id", join_type="left outer").sort_by("time")
        # Where an assignment was lost with the router that made it, its request counts as a user's only one.
        users = pc.coalesce(judged["key_hash"], judged["request_id"])
        return cls(
            requests=mine.num_rows,
            keys=int(pc.count_distinct(mine["key_hash"]).as_py()),
            errors=mine.num_rows - answered.num_rows,
            latency_ms=_floats(answered["latency_ms"]),
            probability=_floats(answered["probability"]),
            askers=_numbered(answered["key_hash"]),
            values=_floats(judged["value"]),
            labels=judged["label"].to_numpy(),
            users=_numbered(users),
            covariates=_floats(judged["covariate"]),
        )

    @property
    def successes(self) -> int:
        return int(self.values.sum())

    @property
    def mean(self) -> float | None:
        return float(self.values.mean()) if self.values.size else None

    @property
    def has_returning_users(self) -> bool:
        return self.users.size > 0 and self.users.size > self.users.max() + 1

    @property
    def has_covariates(self) -> bool:
        return bool(np.isfinite(self.covariates).any())

    def recall(self, label: str | None) -> tuple[int, int]:
        """(answered so, seen) of the pictures that are of the class `label`."""
        of_class = self.values[self.labels == label]
        return int(of_class.sum()), of_class.size

    def confidence_of_users(self) -> Moments:
        """Rows (sum of the answers' probabilities, number of them), one per user."""
        return Moments.of(np.bincount(self.askers, self.probability), np.bincount(self.askers))

    def of_users(self) -> Moments:
        """Rows (sum of outcomes, number of them), one per user."""
        return Moments.of(np.bincount(self.users, self.values), np.bincount(self.users))

    def of_known_users(self) -> Moments:
        """Rows (sum of outcomes, number of them, mean covariate), one per user of whom something was known before."""
        is_known = np.isfinite(self.covariates)
        users = np.unique(self.users[is_known], return_inverse=True)[1]
        count = np.bincount(users)
        return Moments.of(np.bincount(users, self.values[is_known]), count, np.bincount(users, self.covariates[is_known]) / count)


def _variants(experiment: Experiment, arms: dict[str, _Arm]) -> dict[str, dict[str, Any]]:
    all_keys = sum(arm.keys for arm in arms.values())
    is_rate = experiment.outcome == "proportion"
    return {
        name: {
            "version": experiment.variant(name).version,
            "weight": experiment.variant(name).weight,
            "expected_share": experiment.shares[name],
            "share": arm.keys / all_keys if all_keys else None,
            "requests": arm.requests,
            "keys": arm.keys,
            "errors": arm.errors,
            "p50_ms": _percentile(arm.latency_ms, 50),
            "p99_ms": _percentile(arm.latency_ms, 99),
            "outcomes": arm.values.size,
            "successes": arm.successes if is_rate else None,
            "success_rate": arm.mean if is_rate else None,
            "mean": arm.mean,
        }
        for name, arm in arms.items()
    }


def _shadow(name: str, assignments: pa.Table, outcomes: pa.Table) -> dict[str, Any]:
    """Summarise what a shadow would have answered; its rate of successes needs feedback with the true label.

    `saliency_similarity` is the mean over a sample of the pictures: lower than usual, the shadow looks elsewhere, whatever it answers.
    """
    import pyarrow.compute as pc

    mine = assignments.filter(pc.field("variant") == name)
    answered = mine.filter(~pc.field("is_error"))
    truth = outcomes.filter(pc.is_valid(pc.field("label"))).select(["request_id", "label"]).rename_columns(["request_id", "truth"])
    judged = answered.join(truth, "request_id", join_type="inner")
    return {
        "requests": mine.num_rows,
        "errors": mine.num_rows - answered.num_rows,
        "p50_ms": _percentile(_floats(answered["latency_ms"]), 50),
        "p99_ms": _percentile(_floats(answered["latency_ms"]), 99),
        "agreement": pc.mean(pc.equal(answered["label"], answered["answered_label"]).cast("float64")).as_py(),
        "outcomes": judged.num_rows,
        "success_rate": pc.mean(pc.equal(judged["label"], judged["truth"]).cast("float64")).as_py(),
        "saliency_pictures": pc.count(mine["saliency_similarity"]).as_py(),
        "saliency_similarity": pc.mean(mine["saliency_similarity"]).as_py(),
    }


def _sample_ratio(experiment: Experiment, arms: dict[str, _Arm]) -> dict[str, Any]:
    if experiment.policy != "fixed":  # the shares were others before
        return {"p_value": None, "is_mismatch": False}
    p_value = statistics.sample_ratio_p_value([arm.keys for arm in arms.values()], [experiment.shares[name] for name in arms])
    return {"p_value": p_value, "is_mismatch": p_value < SAMPLE_RATIO_ALPHA}


# --- Comparisons ------------------------------------------------------------------------------------------------


def _difference(experiment: Experiment, control: _Arm, arm: _Arm, alpha: float) -> dict[str, Any]:
    figures = _plain(_by_outcome(experiment, control, arm, alpha))
    if experiment.policy != "fixed":  # the asymptotic intervals need shares that stay
        return figures
    figures["by_user"] = _plain(statistics.compare_clustered(control.of_users(), arm.of_users(), alpha))
    if control.has_covariates and arm.has_covariates:
        figures["adjusted"] = _plain(statistics.compare_adjusted(control.of_known_users(), arm.of_known_users(), alpha))
    return figures


def _by_outcome(experiment: Experiment, control: _Arm, arm: _Arm, alpha: float) -> statistics.Difference:
    if experiment.outcome == "proportion":
        return statistics.compare((control.successes, control.values.size), (arm.successes, arm.values.size), alpha)
    return statistics.compare_means(Moments.of(control.values), Moments.of(arm.values), alpha)


def _guardrails(experiment: Experiment, control: _Arm, others: dict[str, _Arm]) -> list[dict[str, Any]]:
    """Return how each guardrail stands for each variant; all together raise a false alarm with alpha at most (Bonferroni)."""
    alpha = experiment.alpha / max(1, len(experiment.guardrails) * len(others))
    return [
        {"variant": name, "metric": guard.metric, "label": guard.label, "margin": guard.margin}
        | _plain(verdict)
        | {"reason": f"{name}, {verdict.reason}"}
        for guard in experiment.guardrails
        for name, arm in others.items()
        for verdict in [_verdict(experiment, guard, control, arm, alpha)]
    ]


def _verdict(experiment: Experiment, guard: Guardrail, control: _Arm, arm: _Arm, alpha: float) -> statistics.Verdict:
    match guard.metric:
        case "error_rate":
            errors = statistics.compare((control.errors, control.requests), (arm.errors, arm.requests), alpha)
            return statistics.rose(errors, guard.margin, "error rate")
        case "p99_latency":
            return statistics.latency_rose(control.latency_ms, arm.latency_ms, guard.margin, alpha)
        case "confidence":
            means = statistics.compare_clustered(control.confidence_of_users(), arm.confidence_of_users(), alpha)
            return statistics.drifted(means, guard.margin, "mean confidence")
        case "recall":
            recall = statistics.compare(control.recall(guard.label), arm.recall(guard.label), alpha)
            return statistics.fell(recall, guard.margin, f"recall of {guard.label}")
        case "outcome":
            repeats = experiment.policy == "fixed" and (control.has_returning_users or arm.has_returning_users)
            outcomes = (
                statistics.compare_clustered(control.of_users(), arm.of_users(), alpha)
                if repeats
                else _by_outcome(experiment, control, arm, alpha)
            )
            return statistics.fell(outcomes, guard.margin, "outcome")


def _policy_weights(experiment: Experiment, arms: dict[str, _Arm]) -> dict[str, float] | None:
    if experiment.policy != "thompson" or not experiment.is_running:
        return None
    successes, trials = [arm.successes for arm in arms.values()], [arm.values.size for arm in arms.values()]
    return dict(zip(arms, statistics.thompson_weights(successes, trials, LEAST_SHARE), strict=True))


# --- Values -----------------------------------------------------------------------------------------------------


def _of_revision(table: pa.Table, revision: int) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.field("revision") == revision)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64 [N], NaN where there is no value."""
    values: NDArray[np.float64] = column.to_numpy().astype(np.float64)
    return values


def _numbered(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Different texts as different numbers from 0, int64 [N]."""
    numbers: NDArray[np.int64] = column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return numbers


def _percentile(values: NDArray[np.float64], percent: float) -> float | None:
    return None if values.size == 0 else round(float(np.percentile(values, percent)), 2)


def _plain(figures: Any) -> dict[str, Any]:
    """Return a dataclass as JSON has it: None where a bound is infinite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(figures).items()}
