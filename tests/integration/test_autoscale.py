"""Ray's autoscaler with its fake node provider: nodes come for the work that needs them, of the kind that is for it, and go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs.benchmarks.autoscale import GROUPS, GrowingCluster, Timeline, draw, grow_and_shrink, write_job

pytestmark = pytest.mark.slow

Seen = tuple[Timeline, dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Seen:
    """What happened, what `cluster status` said at times, and what the cluster had cost."""
    root = tmp_path_factory.mktemp("growing")
    job = write_job(root, num_trials=2)
    status: dict[str, str] = {}
    with GrowingCluster() as cluster, cluster.watched() as timeline:
        at = ("--address", cluster.jobs_address)
        grow_and_shrink(cluster, job, on_event=lambda event: status.setdefault(event, cluster.run("cluster", "status", *at)))
        description = str(repository / "cluster" / "cluster.yaml")
        cluster.run("cluster", "cost", description, "--cloud", "aws", *at, "--json", str(root / "cost.json"))
    return timeline, status, json.loads((root / "cost.json").read_text())


def test_a_search_has_all_the_nodes_that_it_may_and_leaves_none(seen: Seen) -> None:
    timeline, _, _ = seen
    submitted, ended, trained = (timeline.when(event) for event in ("search submitted", "search ended", "training submitted"))
    during = [nodes for at, nodes in timeline.samples if submitted <= at <= ended]
    assert timeline.samples[0][1].total() == 0, "there were nodes before there was work"
    assert max(nodes["train"] for nodes in during) == GROUPS["train"]["max"]
    assert all(nodes["serve"] == 0 for nodes in during), "a search has no business on nodes that serve"
    assert (
        timeline.first(lambda nodes: nodes.total() == 0, ended) is not None
        and timeline.first(lambda n: n.total() == 0, ended) < trained + 1
    )


def test_training_gives_its_nodes_back_while_the_endpoint_keeps_its_own(seen: Seen) -> None:
    timeline, _, _ = seen
    alone = timeline.first(lambda nodes: nodes["train"] == 0 and nodes["serve"] == 1, timeline.when("serving"))
    assert alone is not None and alone <= timeline.when("endpoint taken down") + 1
    assert timeline.samples[-1][1].total() == 0


def test_status_tells_of_nodes_and_jobs(seen: Seen) -> None:
    _, status, _ = seen
    rows = {line.split()[0]: line.split() for line in status["serving"].splitlines() if line.split()[:1] in (["head"], ["serve"])}
    assert rows["head"][1] == "1" and rows["serve"][1] == "1"
    assert float(rows["serve"][2]) == pytest.approx(0.3), "an ingress and a replica"
    assert "nothing waits for room" in status["empty"] and "train" not in status["empty"]


def test_each_job_has_its_share_of_the_cost(seen: Seen) -> None:
    _, _, cost = seen
    jobs = {job["run"]: job["usd"] for job in cost["jobs"]}
    assert jobs["search"] > 0 and jobs["run"] > 0
    assert set(cost["groups"]) == {"head", "train", "serve"}
    assert sum(job["usd"] for job in cost["jobs"]) + cost["idle_usd"] == pytest.approx(cost["total_usd"])


def test_the_timeline_can_be_drawn(seen: Seen, tmp_path: Path) -> None:
    draw(seen[0], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 5_000
