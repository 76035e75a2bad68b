"""Whose the cost of a node is."""

from __future__ import annotations

import random

import pytest

from eagleray.cluster.cost import Holding, Rental, share_out

HOUR = 3600.0


def node(name: str = "a", hours: float = 10.0, usd: float = 2.0, group: str = "train") -> Rental:
    return Rental(name, group, usd, 0.0, hours * HOUR)


def held(job: str, start: float, end: float, *, gpus: float = 0.0, cpus: float = 1.0, on: str = "a") -> Holding:
    return Holding(job, on, gpus, cpus, start * HOUR, end * HOUR)


def test_a_job_pays_for_the_time_it_holds_and_the_rest_is_idle() -> None:
    costs = share_out([node()], [held("j", 1, 4, gpus=1)])
    assert costs.jobs == {"j": pytest.approx(6.0)} and costs.idle == pytest.approx(14.0) and costs.total == pytest.approx(20.0)
    assert costs.gpu_hours["j"] == pytest.approx(3.0) and costs.node_hours["train"] == pytest.approx(10.0)


def test_two_jobs_share_by_their_gpus_while_both_hold_some() -> None:
    costs = share_out([node()], [held("big", 0, 10, gpus=3), held("small", 5, 10, gpus=1)])
    assert costs.jobs["big"] == pytest.approx(10 + 7.5) and costs.jobs["small"] == pytest.approx(2.5) and costs.idle == 0


def test_who_holds_one_gpu_of_four_alone_pays_for_the_node() -> None:
    assert share_out([node()], [held("j", 0, 10, gpus=1)]).jobs["j"] == pytest.approx(20.0)


def test_cpus_count_only_where_nobody_holds_a_gpu() -> None:
    costs = share_out([node()], [held("decoding", 0, 10, cpus=8), held("training", 2, 4, gpus=1)])
    assert costs.jobs["training"] == pytest.approx(4.0) and costs.jobs["decoding"] == pytest.approx(16.0)


def test_several_workers_of_a_job_are_one_job() -> None:
    costs = share_out([node("a"), node("b")], [held("j", 0, 10, gpus=1), held("j", 0, 10, gpus=1, on="b"), held("j", 0, 1, gpus=1)])
    assert costs.jobs == {"j": pytest.approx(40.0)} and costs.gpu_hours["j"] == pytest.approx(21.0)


def test_what_is_held_before_a_node_is_known_or_after_it_went_costs_nothing_more() -> None:
    costs = share_out([node(hours=2)], [held("j", -5, 50, gpus=1)])
    assert costs.jobs["j"] == pytest.approx(4.0) and costs.idle == 0


def test_nothing_is_lost_or_paid_twice() -> None:
    draw = random.Random(0)
    rentals = [
        Rental(f"n{i}", "train", draw.uniform(0.1, 30), start := draw.uniform(0, 1e5), start + draw.uniform(0, 1e5)) for i in range(20)
    ]
    holdings = []
    for _ in range(300):
        start = draw.uniform(0, 2e5)
        node_id, job = f"n{draw.randrange(20)}", f"j{draw.randrange(9)}"
        holdings.append(Holding(job, node_id, draw.choice([0, 0, 1, 4]), draw.choice([0.5, 1]), start, start + draw.uniform(0, 5e4)))
    costs = share_out(rentals, holdings)
    assert sum(costs.jobs.values()) + costs.idle == pytest.approx(costs.total)
    assert costs.total == pytest.approx(sum((r.end - r.start) / HOUR * r.usd_per_hour for r in rentals))
