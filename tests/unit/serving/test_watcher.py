from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from eagleray.errors import ServingError
from eagleray.serving.experiment import Experiment, Guardrail, RampStep, Variant, with_weights
from eagleray.serving.watcher import decide

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALM: dict[str, Any] = {"guardrails": [{"is_breached": False, "reason": "fine"}], "policy_weights": None}


def experiment(challenger_weight: float = 0.1, **settings: Any) -> Experiment:
    variants = (
        Variant(name="champion", version=1, weight=1 - challenger_weight),
        Variant(name="challenger", version=2, weight=challenger_weight),
    )
    return Experiment(id="e", model="digits", salt="0123456789", variants=variants, started=NOW, revised=NOW, **settings)


def test_nothing_is_done_while_nothing_is_due():
    assert decide(experiment(), CALM, NOW + timedelta(days=9)) is None


def test_a_broken_guardrail_gives_all_traffic_back_with_its_reason():
    figures = CALM | {"guardrails": [{"is_breached": True, "reason": "slow"}, {"is_breached": True, "reason": "wrong"}]}
    changed = decide(experiment(ramp=(RampStep(share=0.1, hold_s=1), RampStep(share=0.2, hold_s=1))), figures, NOW + timedelta(days=1))
    assert changed is not None
    assert (changed.status, changed.winner, changed.reason, changed.ended) == (
        "aborted",
        "champion",
        "slow; wrong",
        NOW + timedelta(days=1),
    )
    assert changed.answering.name == "champion"


def test_a_ramp_goes_on_only_after_its_step_was_held_and_stays_on_the_last():
    steps = (RampStep(share=0.1, hold_s=60), RampStep(share=0.5, hold_s=60))
    first = experiment(0.1, ramp=steps)
    assert decide(first, CALM, NOW + timedelta(seconds=59)) is None
    second = decide(first, CALM, NOW + timedelta(seconds=60))
    assert second is not None
    assert second.shares == pytest.approx({"champion": 0.5, "challenger": 0.5})
    assert (second.revision, second.revised, second.ramp) == (2, NOW + timedelta(seconds=60), steps[1:])
    assert decide(second, CALM, NOW + timedelta(days=1)) is None


def test_weights_set_by_hand_end_the_ramp():
    ramped = experiment(ramp=(RampStep(share=0.1, hold_s=1), RampStep(share=0.5, hold_s=1)))
    assert with_weights(ramped, {"challenger": 0.3}, NOW).ramp == ()


def test_a_policys_weights_come_into_force_where_they_differ():
    thompson = experiment(0.5, policy="thompson")
    assert decide(thompson, CALM | {"policy_weights": {"champion": 0.495, "challenger": 0.505}}, NOW) is None
    changed = decide(thompson, CALM | {"policy_weights": {"champion": 0.2, "challenger": 0.8}}, NOW)
    assert changed is not None
    assert changed.shares == pytest.approx({"champion": 0.2, "challenger": 0.8})
    assert changed.revision == thompson.revision  # what was learned counts on


def test_only_experiments_in_which_something_may_be_due_are_watched():
    assert not experiment().is_watched
    assert experiment(guardrails=(Guardrail(metric="error_rate", margin=0.01),)).is_watched
    assert experiment(policy="thompson").is_watched
    assert experiment(ramp=(RampStep(share=0.1, hold_s=1),)).is_watched


def test_shadows_answer_nobody():
    with pytest.raises(ValidationError, match="answers nobody"):
        Variant(name="shadow", version=3, weight=0.1, mirror=0.5)
    variants = (Variant(name="champion", version=1, weight=1), Variant(name="shadow", version=3, weight=0, mirror=1))
    shadowed = Experiment(id="e", model="digits", salt="0123456789", variants=variants, started=NOW, revised=NOW)
    assert [variant.name for variant in shadowed.contenders] == ["champion"]
    with pytest.raises(ServingError, match="answers nobody"):
        with_weights(shadowed, {"shadow": 0.1}, NOW)
    with pytest.raises(ValidationError, match="cannot be a shadow"):
        Experiment(id="e", model="digits", salt="0123456789", variants=variants[::-1], started=NOW, revised=NOW)


@pytest.mark.parametrize("guard", [{"metric": "recall", "margin": 0.1}, {"metric": "outcome", "margin": 0.1, "label": "stop-sign"}])
def test_recall_and_only_recall_is_of_a_class(guard: dict[str, Any]):
    with pytest.raises(ValidationError, match="label of a class"):
        Guardrail.model_validate(guard)
