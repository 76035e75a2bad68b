"""When a run saves that has been told of nodes that will be taken away."""

import pytest
from ray.train import PreemptionInfo

from eagleray.training.progress import LAST_SAVE_S, DrainSaves

NOTICE = 100.0
DEADLINE = 130.0


def saves(looks: list[float], deadline: float | None = DEADLINE) -> list[float]:
    """Return the looks at which to save; the notice comes at 100 s."""
    drain = PreemptionInfo(None if deadline is None else int(deadline * 1000), {"node": [1]})
    due = DrainSaves()
    return [look for look in looks if due.is_due(look, drain if look >= NOTICE else None)]


@pytest.mark.parametrize("every", [0.5, 1.0, 4.0, 9.0])
def test_one_checkpoint_at_the_notice_and_one_that_is_early_enough(every: float) -> None:
    first, last = saves([50 + i * every for i in range(200) if 50 + i * every < DEADLINE])[:2]
    assert NOTICE <= first < NOTICE + every
    assert DEADLINE - LAST_SAVE_S - every <= last <= DEADLINE - LAST_SAVE_S


def test_a_long_pause_before_the_notice_does_not_cost_the_last_checkpoint() -> None:
    looks = [60.0, *(101.0 + i for i in range(29))]  # 41 s of validation or start-up between two looks
    assert saves(looks)[0] == 101.0
    assert saves(looks)[-1] >= DEADLINE - LAST_SAVE_S - 1.0


def test_notices_in_a_row_each_have_their_checkpoint() -> None:
    due = DrainSaves()
    drain = PreemptionInfo(10_000_000, {"node": [1]})
    told = [None, drain, drain, None, drain]
    assert [due.is_due(float(at), info) for at, info in enumerate(told)] == [False, True, False, False, True]


def test_without_a_deadline_there_is_one_checkpoint() -> None:
    assert saves([99.0, 101.0, 103.0, 105.0], deadline=None) == [101.0]


def test_a_run_that_has_just_begun_saves_at_once() -> None:
    assert saves([101.0]) == [101.0]
