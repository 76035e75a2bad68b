"""Experiments that nobody looks at: what ends them, moves them, and watches beside them, on a real endpoint."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from serving_for_tests import CLASSES, constant_load, free_port, package, picture, predict, replica_pids, wait_until

from eagleray.artifacts.registry import Registry
from eagleray.config.schema import ServingConfig, WorkspaceConfig
from eagleray.errors import ServingError
from eagleray.serving import ab, endpoint, watcher
from eagleray.serving.experiment import Experiment, Guardrail, RampStep, Variant, new_experiment
from eagleray.serving.statistics import saliency_similarity

OUTCOME_FALLS = Guardrail(metric="outcome", margin=0.05)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(WorkspaceConfig(root=str(tmp_path_factory.mktemp("workspace"))))
    for seed in (1, 2, 3):
        registry.register("digits", package(f"{registry.workspace.models_uri}/digits-{seed}", seed), "", {})
    return registry


@pytest.fixture(scope="module")
def client(ray_cluster: Any, registry: Registry) -> Iterator[httpx.Client]:
    config = ServingConfig(port=free_port(), backend="torch-fp32")
    only = new_experiment("digits", [Variant(name="champion", version=1, weight=1.0)])
    address = endpoint.deploy("digits", {"champion": registry.resolve("digits:1")}, only, config, registry.workspace.experiments_uri)
    with httpx.Client(base_url=address, timeout=60.0) as client:
        yield client
    endpoint.shutdown()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "INTERVAL_S", 0.3)


@pytest.fixture
def start(client: httpx.Client, registry: Registry) -> Iterator[Callable[..., Experiment]]:
    """Starts an experiment against version 1; ends it where the test has not."""
    registry.set_alias("digits", "champion", 1)
    yield lambda challengers, traffic, **settings: ab.start(registry, "digits", challengers, traffic, **settings)
    experiment = endpoint.experiment("digits")
    if experiment.is_running and len(experiment.variants) > 1:
        ab.abort(registry, "digits")


def tell(client: httpx.Client, number: int, what: Callable[[dict[str, Any]], dict[str, Any]], **headers: Any) -> list[dict[str, Any]]:
    """Ask as `number` users and send what `what` makes of each answer as feedback."""

    def one(user: int) -> dict[str, Any]:
        answer = predict(client, f"user-{user}", **{key: str(value(user)) for key, value in headers.items()})
        sent = client.post("/feedback", json={"request_id": answer["request_id"], **what(answer)})
        assert sent.status_code == 200, sent.text
        return answer

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(number)))


def events(registry: Registry, experiment: Experiment) -> list[dict[str, Any]]:
    return [event for event in registry.events("digits") if event.get("experiment") == experiment.id]


def is_control(answer: dict[str, Any]) -> dict[str, Any]:
    return {"outcome": answer["variant"] == "champion"}


def test_a_variant_that_fails_its_users_is_taken_off_by_itself_without_a_failed_request(
    client: httpx.Client, registry: Registry, start: Callable[..., Experiment]
):
    experiment = start({"challenger": "2"}, {"challenger": 0.5}, guardrails=[OUTCOME_FALLS])
    with constant_load(client) as results:
        tell(client, 300, is_control)
        wait_until(lambda: not endpoint.experiment("digits").is_running)
        ended = len(results)
        wait_until(lambda: len(results) > ended + 30)
        assert {variant for _, variant in results[ended + 8 :]} == {"champion"}
    assert {status for status, _ in results} == {200}, [result for result in results if result[0] != 200]

    ended_experiment = endpoint.experiment("digits")
    assert (ended_experiment.status, ended_experiment.winner) == ("aborted", "champion")
    assert "outcome" in str(ended_experiment.reason)
    assert registry.load_experiment("digits") is None
    wait_until(lambda: len(events(registry, experiment)) == 2)
    started, aborted = events(registry, experiment)
    assert (started["kind"], aborted["kind"], aborted["by"]) == ("ab_start", "ab_guardrail", "watcher")
    assert aborted["reason"] == ended_experiment.reason
    assert aborted["report"]["variants"]["challenger"]["outcomes"] >= 5
    assert aborted["report"]["guardrails"][0]["is_breached"]


def test_a_variant_that_is_as_good_is_left_alone_and_a_dead_watcher_comes_back(
    client: httpx.Client, start: Callable[..., Experiment], registry: Registry
):
    start({"challenger": "2"}, {"challenger": 0.5}, guardrails=[OUTCOME_FALLS])
    tell(client, 100, lambda answer: {"outcome": True})
    (victim,) = replica_pids(endpoint.WATCHER_APPLICATION)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: replica_pids(endpoint.WATCHER_APPLICATION) not in ([], [victim]))
    assert endpoint.experiment("digits").is_running
    tell(client, 400, is_control)  # each user's later answer counts as well
    wait_until(lambda: not endpoint.experiment("digits").is_running)


def test_a_canary_grows_by_its_steps_and_only_after_they_were_held(
    client: httpx.Client, registry: Registry, start: Callable[..., Experiment]
):
    steps = [RampStep(share=0.1, hold_s=1.5), RampStep(share=0.3, hold_s=1.5), RampStep(share=0.6, hold_s=60.0)]
    experiment = start({"challenger": "2"}, {}, ramp=steps)
    assert experiment.shares == pytest.approx({"champion": 0.9, "challenger": 0.1})
    before = {f"user-{i}": predict(client, f"user-{i}")["variant"] for i in range(60)}
    wait_until(lambda: endpoint.experiment("digits").revision == 3)
    grown = endpoint.experiment("digits")
    assert grown.shares == pytest.approx({"champion": 0.4, "challenger": 0.6})
    assert (grown.revised - experiment.started).total_seconds() >= 3.0
    after = {user: predict(client, user)["variant"] for user in before}
    assert all(after[user] == "challenger" for user in before if before[user] == "challenger")  # nobody is moved back
    wait_until(lambda: len(events(registry, experiment)) == 3)
    assert [event["weights"]["challenger"] for event in events(registry, experiment)] == pytest.approx([0.1, 0.3, 0.6])


def test_thompson_sampling_moves_users_to_what_looks_best(client: httpx.Client, registry: Registry, start: Callable[..., Experiment]):
    experiment = start({"challenger": "2"}, {"challenger": 0.5}, policy="thompson", guardrails=[])
    tell(client, 200, lambda answer: {"outcome": answer["variant"] == "challenger"})
    wait_until(lambda: endpoint.experiment("digits").shares["challenger"] > 0.9)
    now = endpoint.experiment("digits")
    assert now.shares["champion"] > 0 and now.revision == experiment.revision
    report = ab.status(registry, "digits")
    assert report["differences"]["challenger"]["lower"] > 0.5
    assert report["sample_ratio"]["p_value"] is None  # the split has no shares to be compared with


def test_a_shadow_gets_copies_and_answers_nobody(client: httpx.Client, registry: Registry, start: Callable[..., Experiment]):
    start({"shadow": "3"}, {}, shadows={"shadow": 1.0}, guardrails=[])
    told = tell(client, 60, lambda answer: {"label": CLASSES[0]})
    assert {answer["variant"] for answer in told} == {"champion"}

    def seen() -> dict[str, Any]:
        figures: dict[str, Any] = client.get("/ab/digits").json()["shadows"]["shadow"]
        return figures

    wait_until(lambda: seen()["requests"] == 60)

    def heat(variant: str) -> list[list[float]]:
        label = told[0]["predictions"][0]["label"]
        answer = client.post("/explain/digits", params={"label": label}, content=picture(), headers={"X-Variant": variant})
        heat_map: list[list[float]] = answer.json()["heat_map"]
        return heat_map

    shadow = seen()
    direct = [predict(client, "tester", **{"X-Variant": "shadow"})["predictions"][0]["label"]]
    assert shadow["agreement"] == (1.0 if direct[0] == told[0]["predictions"][0]["label"] else 0.0)
    assert shadow["success_rate"] == (1.0 if direct[0] == CLASSES[0] else 0.0)
    assert shadow["errors"] == 0 and shadow["p50_ms"] > 0
    assert 1 <= shadow["saliency_pictures"] < 60
    assert shadow["saliency_similarity"] == pytest.approx(saliency_similarity(heat("champion"), heat("shadow")), abs=1e-6)
    report = client.get("/ab/digits").json()
    assert "shadow" not in report["differences"] and "shadow" not in report["variants"]
    with pytest.raises(ServingError, match="answers nobody"):
        ab.set_weights(registry, "digits", {"shadow": 0.5})


def test_the_dashboards_figures_are_on_rays_metrics_port(
    client: httpx.Client, registry: Registry, start: Callable[..., Experiment]
) -> None:
    dashboard = (Path(__file__).parents[2] / "cluster" / "monitoring" / "eagleray-serving.json").read_text()
    named = set(re.findall(r"\bray_\w+", dashboard))
    assert len(named) > 10
    start({"challenger": "2"}, {"challenger": 0.5})
    tell(client, 60, lambda answer: {"outcome": True})
    refused = client.post("/predict/digits", content=b"no picture")
    assert refused.status_code == 415
    statuses = (client.post("/predict/digits", content=picture(), headers={"X-Timeout-Ms": str(ms)}).status_code for ms in range(1, 40))
    assert 504 in statuses

    def scraped() -> str:
        (node,) = ray.nodes()
        return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text

    def missing() -> set[str]:
        text = scraped()
        return {name for name in named if not re.search(rf"^{name}\b", text, re.MULTILINE)}

    wait_until(lambda: not missing(), timeout_s=90)
    answers = re.findall(r'^ray_eagleray_answers_total\{.*variant="(\w+)".*\} ([\d.]+)', scraped(), re.MULTILINE)
    assert {variant for variant, _ in answers} >= {"champion", "challenger"}


def test_a_mean_is_compared_and_a_covariate_sharpens_it(client: httpx.Client, registry: Registry, start: Callable[..., Experiment]):
    start({"challenger": "2"}, {"challenger": 0.5}, outcome="mean", guardrails=[])
    rng = np.random.default_rng(0)
    before = rng.normal(10.0, 3.0, 400)
    noise = rng.normal(0.0, 0.5, 400)
    users = iter(range(400))

    def spent(answer: dict[str, Any]) -> dict[str, Any]:
        user = next(users)
        return {"value": float(before[user] + noise[user] + (1.0 if answer["variant"] == "challenger" else 0.0))}

    for user in range(400):
        answer = predict(client, f"user-{user}", **{"X-Covariate": str(before[user])})
        assert client.post("/feedback", json={"request_id": answer["request_id"], **spent(answer)}).status_code == 200
    difference = client.get("/ab/digits").json()["differences"]["challenger"]
    adjusted = difference["adjusted"]
    assert difference["lower"] < 1.0 < difference["upper"]
    assert adjusted["lower"] < 1.0 < adjusted["upper"] and adjusted["lower"] > 0.5
    assert adjusted["upper"] - adjusted["lower"] < 0.4 * (difference["upper"] - difference["lower"])
    refused = client.post("/predict/digits", content=picture(), headers={"X-Covariate": "many"})
    assert refused.status_code == 422 and "X-Covariate" in refused.json()["error"]


@pytest.mark.parametrize(
    ("challengers", "traffic", "settings", "message"),
    [
        ({"challenger": "2"}, {"challenger": 0.0}, {}, "between 0 and 1"),
        ({"a": "2", "b": "3"}, {"a": 0.5, "b": 0.5}, {}, "leave a share"),
        ({"challenger": "2"}, {"chalenger": 0.1}, {}, "no version given"),
        ({"challenger": "2"}, {"challenger": 0.1}, {"policy": "thompson", "outcome": "mean"}, "compares proportions"),
        ({"a": "2", "b": "3"}, {}, {"ramp": [RampStep(share=0.1, hold_s=1)]}, "one challenger"),
        ({"challenger": "2"}, {"challenger": 0.1}, {"salt": "short"}, "at least 8"),
    ],
)
def test_experiments_that_cannot_be_are_refused(
    start: Callable[..., Experiment],
    challengers: dict[str, str],
    traffic: dict[str, float],
    settings: dict[str, Any],
    message: str,
):
    with pytest.raises(ServingError, match=message):
        start(challengers, traffic, **settings)
    assert len(endpoint.experiment("digits").contenders) == 1 or not endpoint.experiment("digits").is_running


def test_the_same_salt_gives_users_the_same_variants_again(client: httpx.Client, start: Callable[..., Experiment], registry: Registry):
    salt = start({"challenger": "2"}, {"challenger": 0.5}, guardrails=[]).salt
    before = [predict(client, f"user-{i}")["variant"] for i in range(40)]
    ab.abort(registry, "digits")
    start({"challenger": "3"}, {"challenger": 0.5}, guardrails=[], salt=salt)
    assert [predict(client, f"user-{i}")["variant"] for i in range(40)] == before
