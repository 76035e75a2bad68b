"""How many replicas there are to be, by the requests with them and how busy they are."""

from __future__ import annotations

import time

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from eagleray.serving.autoscaling import BUSY, BusyTime, replicas_for_load


def replicas(running: int, requests: float, busy: float | None) -> float:
    """What is wanted where so many replicas run, each busy for that share of its time (None: not told yet), a request wanting one."""
    deployment = DeploymentID(name="version")
    ids = [ReplicaID(unique_id=str(number), deployment_id=deployment) for number in range(running)]
    context = AutoscalingContext(
        deployment_id=deployment,
        deployment_name="version",
        app_name="version",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={} if busy is None else {BUSY: dict.fromkeys(ids, busy)},
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=0, max_replicas=8, initial_replicas=1, target_ongoing_requests=1),
    )
    return replicas_for_load(context)[0]


def test_requests_that_wait_ask_for_more_replicas():
    assert replicas(running=2, requests=5.0, busy=1.0) == 5


def test_a_replica_that_the_others_could_not_do_without_stays():
    assert replicas(running=2, requests=0.9, busy=0.45) == 2  # one of them would be busy for 90 % of its time
    assert replicas(running=2, requests=0.5, busy=0.25) == 1  # for 50 %
    assert replicas(running=4, requests=1.5, busy=0.38) == 3


def test_being_busy_alone_asks_for_no_more_of_them():
    assert replicas(running=2, requests=1.9, busy=1.0) == 2


def test_where_nobody_asks_none_is_left():
    assert replicas(running=1, requests=0.0, busy=0.0) == 0


def test_ray_serves_own_rule_holds_until_replicas_have_told_how_busy_they_are():
    assert replicas(running=3, requests=1.5, busy=None) == 1.5


def test_what_is_under_way_counts_as_busy(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    busy = BusyTime()
    with busy:
        now = 101.0
        assert busy.share(now) == 1.0
        now = 101.5
    now = 102.0
    assert busy.share(now) == 0.5
    now = 104.0
    assert busy.share(now) == 0.0
