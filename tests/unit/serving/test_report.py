from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from eagleray.serving.experiment import Experiment, Guardrail, Variant
from eagleray.serving.outcomes import assignments_schema, outcomes_schema
from eagleray.serving.report import experiment_report

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = ("champion", "challenger")


class Log:
    """Rows as the router would write them, every other request to the challenger."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.assignments: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []

    def request(self, variant: str, user: str | None = None, **columns: Any) -> str:
        request_id = f"r{len(self.assignments)}"
        row = {"request_id": request_id, "time": NOW, "variant": variant, "version": 1, "revision": 1, "label": "7", "probability": 0.9}
        row |= {"key_hash": user or request_id, "latency_ms": 10.0, "is_error": False}
        self.assignments.append(row | columns)
        return request_id

    def outcome(self, request_id: str, variant: str, value: float, label: str | None = None) -> None:
        time = NOW + timedelta(seconds=len(self.outcomes))
        self.outcomes.append({"request_id": request_id, "time": time, "variant": variant, "revision": 1, "label": label, "value": value})

    def report(self, *guardrails: Guardrail, shadow: bool = False, **settings: Any) -> dict[str, Any]:
        variants = [Variant(name=name, version=number + 1, weight=1) for number, name in enumerate(NAMES)]
        variants += [Variant(name="shadow", version=3, weight=0, mirror=1)] if shadow else []
        experiment = Experiment(
            id="e", model="digits", salt="0123456789", variants=tuple(variants), started=NOW, revised=NOW, guardrails=guardrails, **settings
        )
        tables = pa.Table.from_pylist(self.assignments, assignments_schema()), pa.Table.from_pylist(self.outcomes, outcomes_schema())
        report = experiment_report(experiment, *tables)
        json.dumps(report, allow_nan=False)  # as the endpoint answers it
        return report


def guard(metric: str, margin: float, label: str | None = None) -> Guardrail:
    return Guardrail.model_validate({"metric": metric, "margin": margin, "label": label})


def test_an_empty_log_proves_nothing():
    report = Log().report(*(guard(m, 0.01) for m in ("error_rate", "p99_latency", "outcome", "confidence")), guard("recall", 0.01, "7"))
    assert not any(g["is_breached"] for g in report["guardrails"]) and len(report["guardrails"]) == 5
    assert report["differences"]["challenger"]["estimate"] is None
    assert report["variants"]["challenger"]["share"] is None


@pytest.mark.parametrize(
    ("metric", "margin", "worse"),
    [
        ("error_rate", 0.01, {"is_error": True, "latency_ms": None, "probability": None, "label": None}),
        ("p99_latency", 1.0, {"latency_ms": 100.0}),
        ("confidence", 0.1, {"probability": 0.5}),
    ],
)
def test_a_guardrail_breaks_where_its_metric_is_worse_and_only_then(metric: str, margin: float, worse: dict[str, Any]):
    log = Log()
    for number in range(4_000):
        name = NAMES[number % 2]
        is_worse = name == "challenger" and number % 10 == 1
        log.request(
            name,
            **{"probability": 0.9 + log.rng.normal(0, 0.01)}
            | (worse if is_worse or (metric == "confidence" and name == "challenger") else {}),
        )
    others = {"error_rate", "p99_latency", "confidence"} - {metric}
    report = log.report(guard(metric, margin), *(guard(other, 1.0) for other in sorted(others)))
    broken = {g["metric"] for g in report["guardrails"] if g["is_breached"]}
    assert broken == {metric}
    assert report["guardrails"][0]["reason"].startswith("challenger, ")


def test_recall_of_one_class_may_fall_while_the_outcome_as_a_whole_does_not():
    log = Log()
    for number in range(6_000):
        name, is_stop = NAMES[number % 2], number % 6 < 2
        right = log.rng.random() < (0.5 if name == "challenger" and is_stop else 0.95)
        log.outcome(log.request(name), name, float(right), "stop-sign" if is_stop else "other")
    report = log.report(guard("recall", 0.02, "stop-sign"), guard("recall", 0.02, "other"), guard("outcome", 0.3))
    assert [g["is_breached"] for g in report["guardrails"]] == [True, False, False]


def test_users_who_send_much_do_not_prove_much():
    log = Log()
    for user in range(120):
        name = NAMES[user % 2]
        likes = float(log.rng.random() < 0.5)
        for _ in range(50):
            log.outcome(log.request(name, user=f"user-{user}"), name, likes)
    difference = log.report()["differences"]["challenger"]
    by_user = difference["by_user"]
    assert by_user["estimate"] == pytest.approx(difference["estimate"])
    # 60 users in each arm are too few for an asymptotic interval; of 3,000 trials each it would be narrow and wrong.
    assert by_user["lower"] is None and difference["upper"] - difference["lower"] < 0.2


def test_a_covariate_makes_the_interval_narrower():
    log = Log()
    for user in range(2_000):
        name, before = NAMES[user % 2], log.rng.normal(50, 10)
        value = before + log.rng.normal(0, 2) + (1.0 if name == "challenger" else 0.0)
        log.outcome(log.request(name, covariate=before), name, value)
    difference = log.report(outcome="mean")["differences"]["challenger"]
    adjusted = difference["adjusted"]
    assert adjusted["lower"] < 1.0 < adjusted["upper"]
    assert adjusted["upper"] - adjusted["lower"] < 0.3 * (difference["upper"] - difference["lower"])
    assert adjusted["variance_removed"] > 0.9 and adjusted["theta"] == pytest.approx(1.0, abs=0.1)
    assert log.report(outcome="mean")["variants"]["champion"]["success_rate"] is None


def test_a_shadow_is_judged_by_the_answers_to_others():
    log = Log()
    for number in range(100):
        request_id = log.request("champion", label="7")
        shadow = {"request_id": request_id, "label": "7" if number % 4 else "1", "answered_label": "7", "is_error": number == 0}
        shadow |= {"saliency_similarity": 0.25 if number % 2 else 0.75} if number < 10 else {}
        log.assignments.append(log.assignments[-1] | {"variant": "shadow"} | shadow)
        log.outcome(request_id, "champion", 1.0, "7")
    report = log.report(shadow=True)
    shadow = report["shadows"]["shadow"]
    assert (shadow["requests"], shadow["errors"], shadow["outcomes"]) == (100, 1, 99)
    assert shadow["agreement"] == shadow["success_rate"] == pytest.approx(75 / 99)
    assert (shadow["saliency_pictures"], shadow["saliency_similarity"]) == (10, 0.5)
    assert set(report["variants"]) == set(NAMES) and set(report["differences"]) == {"challenger"}


def test_thompson_sampling_leaves_a_share_to_what_looks_worse():
    log = Log()
    for number in range(400):
        name = NAMES[number % 2]
        log.outcome(log.request(name), name, float(name == "challenger"))
    report = log.report(policy="thompson")
    assert report["policy_weights"] == pytest.approx({"champion": 0.02, "challenger": 0.98}, abs=1e-3)
    assert report["sample_ratio"] == {"p_value": None, "is_mismatch": False}
    assert "by_user" not in report["differences"]["challenger"]
