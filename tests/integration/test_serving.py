"""The endpoint as users meet it: a real Ray Serve application, asked over HTTP."""

from __future__ import annotations

import asyncio
import io
import math
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle
from serving_for_tests import CLASSES, constant_load, free_port, package, picture, predict, replica_pids, wait_until

from eagleray.artifacts.package import WEIGHTS_NAME
from eagleray.artifacts.registry import ModelVersion, Registry
from eagleray.config.schema import BACKENDS, AutoscaledReplicas, ModelConfig, ServingConfig, WorkspaceConfig
from eagleray.errors import RegistryError, ServingError
from eagleray.serving import ab, deployment, endpoint
from eagleray.serving.backends import sample_pictures
from eagleray.serving.experiment import Experiment, Variant, new_experiment, with_weights
from eagleray.serving.outcomes import ExperimentLog, LogReader, load_signing_key
from eagleray.serving.predictor import Predictor

LIMITS = {"max_image_bytes": 200_000, "max_image_pixels": 1_000_000, "max_batch_size": 8}


# --- Set-up -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(WorkspaceConfig(root=str(tmp_path_factory.mktemp("workspace"))))
    for seed in (1, 2, 3):
        registry.register("digits", package(f"{registry.workspace.models_uri}/digits-{seed}", seed), "", {})
    registry.set_alias("digits", "champion", 1)
    return registry


@pytest.fixture(scope="module")
def versions(registry: Registry) -> dict[str, ModelVersion]:
    return {"champion": registry.resolve("digits:1"), "challenger": registry.resolve("digits:2")}


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    return ServingConfig(port=free_port(), backend="torch-fp32", placement="replicas", **LIMITS)


@pytest.fixture(scope="module")
def client(ray_cluster: Any, registry: Registry, versions: dict[str, ModelVersion], config: ServingConfig) -> Iterator[httpx.Client]:
    address = endpoint.deploy("digits", versions, split(0.5), config, registry.workspace.experiments_uri)
    with httpx.Client(base_url=address, timeout=60.0) as client:
        yield client
    endpoint.shutdown()


def split(challenger: float) -> Experiment:
    variants = [Variant(name="champion", version=1, weight=1 - challenger), Variant(name="challenger", version=2, weight=challenger)]
    return new_experiment("digits", variants)


@pytest.fixture
def experiment(client: httpx.Client, registry: Registry, versions: dict[str, ModelVersion], config: ServingConfig) -> Experiment:
    """A fresh even split, whatever the tests before left."""
    fresh = split(0.5)
    endpoint.deploy("digits", versions, fresh, config, registry.workspace.experiments_uri)
    return fresh


# --- Answers ----------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_version_that_it_names(client: httpx.Client, versions: dict[str, ModelVersion]):
    for variant, version in versions.items():
        answer = client.post("/predict/digits?top_k=3", content=picture(5), headers={"X-Variant": variant}).json()
        expected = Predictor(version.package_uri, 1).predict([picture(5)], top_k=3)[0]
        assert (answer["model"], answer["variant"], answer["version"]) == ("digits", variant, version.version)
        assert [p["label"] for p in answer["predictions"]] == [p["label"] for p in expected]
        assert [p["probability"] for p in answer["predictions"]] == pytest.approx([p["probability"] for p in expected], abs=1e-5)
        assert answer["latency_ms"] > 0


def test_auto_takes_the_fastest_back_end_that_is_right_and_measures_once(
    client: httpx.Client, registry: Registry, config: ServingConfig
) -> None:
    resnet = ModelConfig(name="resnet_cifar", params={"depth": 14, "width": 16})
    uri = package(f"{registry.workspace.models_uri}/letters", 4, "letters", resnet, sample_pictures(32))
    version = registry.register("letters", uri, "", {})
    experiment = new_experiment("letters", [Variant(name="champion", version=version.version, weight=1)])

    def deploy(backend: str) -> dict[str, Any]:
        asked = config.model_copy(update={"backend": backend, "backend_tolerance": 0.05, "int8_agreement": 0.5})
        endpoint.deploy("letters", {"champion": version}, experiment, asked, registry.workspace.experiments_uri)
        row: dict[str, Any] = endpoint.status()["models"]["letters"]["variants"]["champion"]
        return row

    row = deploy("auto")
    measured = {tried["backend"]: tried for tried in row["measured"]}
    assert set(measured) == set(BACKENDS)
    right = {name: tried for name, tried in measured.items() if tried["refused"] is None}
    assert all(tried["drift"] <= 0.05 or (name == "openvino-int8" and tried["agreement"] >= 0.5) for name, tried in right.items())
    assert row["backend"] == max(right, key=lambda name: math.prod(right[name]["images_per_s"].values()))
    assert client.get("/v2/models/letters").json()["parameters"]["backend"] == row["backend"]

    def answered_by(predictor: Predictor, tolerance: float) -> bool:
        told = client.post("/predict/letters?top_k=10", content=picture(5)).json()["predictions"]
        expected = {p["label"]: p["probability"] for p in predictor.predict([picture(5)], top_k=10)[0]}
        return {p["label"]: p["probability"] for p in told} == pytest.approx(expected, abs=tolerance)

    assert answered_by(Predictor(version.package_uri, 1), 0.05)
    assert deploy("auto") == row
    again = registry.register(
        "letters", package(f"{registry.workspace.models_uri}/again", 6, "letters", resnet, sample_pictures(32)), "", {}
    )
    versions, pair = {"champion": version, "challenger": again}, [*experiment.variants, Variant(name="challenger", version=2, weight=1)]
    asked = config.model_copy(update={"backend": "auto", "backend_tolerance": 0.05, "int8_agreement": 0.5})
    endpoint.deploy("letters", versions, new_experiment("letters", pair), asked, registry.workspace.experiments_uri)
    challenger = endpoint.status()["models"]["letters"]["variants"]["challenger"]
    assert row["backend"] in {tried["backend"] for tried in challenger["measured"]}
    if challenger["backend"] == row["backend"]:  # what is right for one is most likely so for the other
        assert {tried["backend"] for tried in challenger["measured"]} == {"torch-fp32", row["backend"]}
    assert deploy("openvino-int8")["backend"] == "openvino-int8"
    assert client.get("/v2/models/letters").json()["platform"] == "openvino"
    assert answered_by(Predictor(version.package_uri, 1, backend="openvino-int8"), 1e-3)
    assert not answered_by(Predictor(version.package_uri, 1), 1e-5)


@pytest.mark.slow
def test_a_model_that_nobody_asks_has_no_replica_and_who_asks_brings_one_up(
    client: httpx.Client, registry: Registry, config: ServingConfig
) -> None:
    version = registry.register("rare", package(f"{registry.workspace.models_uri}/rare", 5, "rare"), "", {})
    experiment = new_experiment("rare", [Variant(name="champion", version=version.version, weight=1)])
    scaled = config.model_copy(update={"num_replicas": AutoscaledReplicas(min=0, max=1, idle_s=1.0)})
    endpoint.deploy("rare", {"champion": version}, experiment, scaled, registry.workspace.experiments_uri)
    application = endpoint.status()["models"]["rare"]["variants"]["champion"]
    assert application["state"] == "RUNNING"
    wait_until(lambda: not replica_pids("rare-v1"), timeout_s=90)
    answer = client.post("/predict/rare", content=picture(5))
    assert answer.status_code == 200 and answer.json()["model"] == "rare"
    assert len(replica_pids("rare-v1")) == 1


def test_several_pictures_in_one_form_are_answered_in_order(client: httpx.Client):
    files = [("image", (f"{i}.png", picture(i))) for i in range(3)]
    answer = client.post("/predict/digits", files=files, headers={"X-Variant": "champion"}).json()
    single = [client.post("/predict/digits", content=picture(i), headers={"X-Variant": "champion"}).json()["predictions"] for i in range(3)]
    for several, alone in zip(answer["predictions"], single, strict=True):
        assert several[0]["label"] == alone[0]["label"]
        assert several[0]["probability"] == pytest.approx(alone[0]["probability"], abs=1e-5)
    assert len(set(answer["request_ids"])) == 3


@pytest.fixture
def batches(client: httpx.Client) -> Callable[[], tuple[int, int]]:
    """(batches, pictures) that the champion has run so far."""
    classifier = serve.get_deployment_handle(deployment.NAME, app_name="digits-v1")
    return lambda: tuple(classifier.batch_counts.remote().result().values())


def test_pictures_of_one_request_are_one_batch(client: httpx.Client, batches: Callable[[], tuple[int, int]]):
    before = batches()
    files = [("image", (f"{i}.png", picture(i))) for i in range(8)]
    assert client.post("/predict/digits", files=files, headers={"X-Variant": "champion"}).status_code == 200
    assert tuple(np.subtract(batches(), before)) == (1, 8)


def test_the_open_inference_protocol_answers_for_tensors(client: httpx.Client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").status_code == 200
    metadata = client.get("/v2/models/digits").json()
    assert metadata["versions"] == ["1", "2"]
    assert metadata["parameters"]["classes"] == CLASSES
    pixels = np.asarray(Image.open(io.BytesIO(picture(5))))[None]
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    answer = client.post("/v2/models/digits/versions/2/infer", json={"id": "mine", "inputs": [tensor]}).json()
    top = client.post("/predict/digits", content=picture(5), headers={"X-Variant": "challenger"}).json()["predictions"][0]
    probabilities = answer["outputs"][0]["data"]
    assert (answer["id"], answer["model_version"], answer["outputs"][0]["shape"]) == ("mine", "2", [1, 10])
    assert CLASSES[int(np.argmax(probabilities))] == top["label"]
    assert max(probabilities) == pytest.approx(top["probability"], abs=1e-4)


def test_the_documentation_page_names_every_route(client: httpx.Client):
    assert client.get("/", follow_redirects=True).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/predict/{model}", "/feedback", "/ab/{model}", "/v2/models/{model}/infer"} <= set(paths)


# --- Refusals ---------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A small PNG that says it has side × side pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 10_000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)


def chunked(size: int) -> Iterator[bytes]:
    yield b"\xff\xd8\xff"
    for _ in range(size // 10_000):
        yield b"\0" * 10_000


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"content": b"hello, world"}, 415, "not a JPEG, PNG or WebP"),
        ({"content": b""}, 400, "empty"),
        ({"content": bomb(10_000)}, 422, "more than the limit of 1000000"),
        ({"content": bomb(60_000)}, 422, "limit is 1000000"),
        ({"content": picture()[:200]}, 422, "truncated"),
        ({"content": b"\xff\xd8\xff" + b"\0" * 300_000}, 413, "200000"),
        ({"content": chunked(400_000)}, 413, "200000"),
        ({"files": [("image", ("a.txt", b"text"))]}, 415, "not a JPEG"),
        ({"files": [("picture", ("a.png", picture()))]}, 400, "fields named 'image'"),
        ({"files": [("image", (f"{i}.png", picture())) for i in range(9)]}, 400, "up to 8 files"),
        ({"files": [("image", ("a.png", picture())), ("image", ("b.png", bomb(10_000)))]}, 422, "picture 1: "),
        ({"content": picture(), "params": {"top_k": 0}}, 422, "top_k"),
        ({"content": picture(), "headers": {"X-Variant": "nobody"}}, 404, "champion (version 1)"),
        ({"data": {"url": "http://127.0.0.1:9/a.png"}}, 415, "not a JPEG"),
    ],
    ids=[
        "text",
        "empty",
        "bomb",
        "great-bomb",
        "truncated",
        "large",
        "large-chunked",
        "text-file",
        "field",
        "many",
        "second-bad",
        "top_k",
        "variant",
        "url",
    ],
)
def test_bad_pictures_are_refused_with_the_reason(client: httpx.Client, request_: dict[str, Any], status: int, reason: str):
    response = client.post("/predict/digits", **request_)
    assert response.status_code == status, response.text
    assert reason in response.json()["error"]


def test_an_unknown_model_is_named_with_the_nearest(client: httpx.Client):
    response = client.post("/predict/digitz", content=picture())
    assert response.status_code == 404
    assert "did you mean 'digits'?" in response.json()["error"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ({"data": [1] * 11}, "does not fit"),
        ({"data": [256] * 12}, "0 to 255"),
        ({"shape": [1, 100_000, 100_000, 3]}, "pixels each"),
        ({"datatype": "FP32"}, "datatype"),
    ],
)
def test_bad_tensors_are_refused_with_the_reason(client: httpx.Client, tensor: dict[str, Any], reason: str):
    body = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [1] * 12} | tensor]}
    response = client.post("/v2/models/digits/infer", json=body)
    assert 400 <= response.status_code < 500
    assert reason in response.json()["error"]


def test_a_full_queue_is_refused_with_a_time_to_come_back(client: httpx.Client, registry: Registry, config: ServingConfig, tmp_path: Path):
    """A second model on the same endpoint, with room for few."""
    version = ModelVersion("narrow", 1, package(str(tmp_path / "narrow"), 9, "narrow"), "", (), datetime.now(UTC), {})
    narrow = config.model_copy(update={"max_batch_size": 1, "max_queued_requests": 1, "max_image_pixels": 50_000_000})
    only = new_experiment("narrow", [Variant(name="champion", version=1, weight=1.0)])
    endpoint.deploy("narrow", {"champion": version}, only, narrow, registry.workspace.experiments_uri)
    buffer = io.BytesIO()
    Image.new("RGB", (6_000, 6_000)).save(buffer, "PNG")  # takes a while to decode
    body = buffer.getvalue()
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: client.post("/predict/narrow", content=body), range(16)))
    refused = [response for response in responses if response.status_code == 503]
    assert {response.status_code for response in responses} == {200, 503}
    assert all(response.headers["Retry-After"] == "1" and "too many requests" in response.json()["error"] for response in refused)
    assert predict(client, "the other model goes on")["model"] == "digits"
    assert client.get("/ab/narrow").json()["variants"]["champion"]["errors"] == len(refused)


# --- Small networks, answered where requests come in ----------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A model with a copy in the ingress, and its one replica."""

    version: ModelVersion
    replica: DeploymentHandle[Any]
    deploy: Callable[..., None]
    """With these settings."""

    def pictures_by_replica(self) -> int:
        return int(self.replica.batch_counts.remote().result()["pictures"])


@pytest.fixture(scope="module")
def small_model(client: httpx.Client, registry: Registry, config: ServingConfig) -> Small:
    version = registry.register("small", package(f"{registry.workspace.models_uri}/small", 4, "small"), "", {})
    only = new_experiment("small", [Variant(name="champion", version=version.version, weight=1.0)])

    def deploy(**settings: Any) -> None:
        asked = config.model_copy(update={"placement": "auto", "max_image_pixels": 50_000_000, "max_batch_size": 4, **settings})
        endpoint.deploy("small", {"champion": version}, only, asked, registry.workspace.experiments_uri)

    deploy()
    return Small(version, serve.get_deployment_handle(deployment.NAME, app_name=f"small-v{version.version}"), deploy)


@pytest.fixture
def small(client: httpx.Client, small_model: Small) -> Small:
    """The model, with its copy up."""

    def is_answered_here() -> bool:
        before = small_model.pictures_by_replica()
        assert client.post("/predict/small", content=picture()).status_code == 200
        return small_model.pictures_by_replica() == before

    wait_until(is_answered_here)
    return small_model


def test_a_small_network_answers_where_requests_come_in_and_as_its_replica_does(client: httpx.Client, small: Small):
    before = small.pictures_by_replica()
    for seed in range(8):
        answered = client.post("/predict/small?top_k=10", content=picture(seed)).json()["predictions"]
        expected = Predictor(small.version.package_uri, 1).predict([picture(seed)], top_k=10)[0]
        assert [p["label"] for p in answered] == [p["label"] for p in expected]
        assert [p["probability"] for p in answered] == pytest.approx([p["probability"] for p in expected], abs=1e-5)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [1] * 12}
    assert client.post("/v2/models/small/infer", json={"inputs": [tensor]}).status_code == 200
    assert small.pictures_by_replica() == before


def test_large_pictures_are_the_replicas_work(client: httpx.Client, small: Small):
    before = small.pictures_by_replica()
    buffer = io.BytesIO()
    Image.new("RGB", (1_500, 1_500)).save(buffer, "PNG")
    assert client.post("/predict/small", content=buffer.getvalue()).status_code == 200
    assert small.pictures_by_replica() == before + 1


def test_what_neither_can_decode_is_refused_with_the_reason(client: httpx.Client, small: Small):
    answer = client.post("/predict/small", content=picture()[:200])
    assert answer.status_code == 422 and "truncated" in answer.json()["error"]


def test_what_is_beyond_a_batch_goes_to_the_replicas(client: httpx.Client, small: Small):
    before = small.pictures_by_replica()
    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(lambda seed: client.post("/predict/small", content=picture(seed, 200, 200)).status_code, range(96)))
    assert statuses == [200] * 96
    assert 0 < small.pictures_by_replica() - before < 96


def test_it_answers_while_its_replica_is_replaced(client: httpx.Client, small: Small):
    (victim,) = replica_pids(f"small-v{small.version.version}")
    os.kill(victim, signal.SIGKILL)
    assert [client.post("/predict/small", content=picture()).status_code for _ in range(50)] == [200] * 50
    wait_until(lambda: replica_pids(f"small-v{small.version.version}") not in ([], [victim]))


def test_a_placement_takes_effect_without_a_failed_request(client: httpx.Client, small: Small):
    with constant_load(client, "small") as results:
        small.deploy(placement="replicas")
        before = small.pictures_by_replica()
        assert client.post("/predict/small", content=picture()).status_code == 200
        assert small.pictures_by_replica() > before
        small.deploy()
    assert {status for status, _ in results} == {200}, [result for result in results if result[0] != 200]


# --- Experiment -------------------------------------------------------------------------------------------------


def test_users_stick_to_their_variant_and_split_evenly(client: httpx.Client, experiment: Experiment):
    first = {f"user-{i}": predict(client, f"user-{i}")["variant"] for i in range(200)}
    assert {key: predict(client, key)["variant"] for key in first} == first
    report = client.get("/ab/digits").json()
    champion, challenger = report["variants"]["champion"], report["variants"]["challenger"]
    assert champion["requests"] + challenger["requests"] == 400
    assert champion["keys"] == list(first.values()).count("champion")
    assert champion["share"] == pytest.approx(0.5, abs=0.15)
    assert report["sample_ratio"]["p_value"] > 0.001
    assert 0 < champion["p50_ms"] <= champion["p99_ms"]
    assert champion["errors"] == 0


def test_a_cookie_serves_as_the_key(client: httpx.Client, experiment: Experiment):
    for i in range(8):
        response = client.post("/predict/digits", content=picture(), headers={"Cookie": f"routing_key=user-{i}"})
        assert response.json()["variant"] == predict(client, f"user-{i}")["variant"]


def test_testers_choose_their_variant_and_are_not_counted(client: httpx.Client, experiment: Experiment):
    for variant in ("champion", "challenger") * 5:
        answer = predict(client, "tester", **{"X-Variant": variant})
        assert answer["variant"] == variant
        assert client.post("/feedback", json={"request_id": answer["request_id"], "outcome": True}).status_code == 200
    report = client.get("/ab/digits").json()
    assert [(v["requests"], v["outcomes"]) for v in report["variants"].values()] == [(0, 0), (0, 0)]


def test_feedback_is_durable_and_counts_at_once(client: httpx.Client, registry: Registry, experiment: Experiment):
    right = {"champion": 0, "challenger": 0}
    given = {"champion": 0, "challenger": 0}
    for i in range(40):
        answer = predict(client, f"user-{i}")
        label = answer["predictions"][0 if i % 3 else 1]["label"]
        response = client.post("/feedback", json={"request_id": answer["request_id"], "label": label})
        assert response.json() == {"request_id": answer["request_id"], "outcome": bool(i % 3)}
        right[answer["variant"]] += bool(i % 3)
        given[answer["variant"]] += 1
    assert LogReader(registry.workspace.experiments_uri, experiment.id).outcomes().num_rows == 40
    report = client.get("/ab/digits").json()
    assert {name: v["successes"] for name, v in report["variants"].items()} == right
    assert {name: v["outcomes"] for name, v in report["variants"].items()} == given
    difference = report["differences"]["challenger"]
    assert difference["lower"] <= difference["estimate"] <= difference["upper"]
    assert difference["lower"] < 0 < difference["upper"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"request_id": "made.up"}, "not issued"),
        ({"label": "digit-77"}, "did you mean"),
        ({"label": None}, "either label or outcome"),
        ({"outcome": True}, "either label or outcome"),
        ({"lable": "digit-7"}, "lable"),
    ],
)
def test_bad_feedback_is_refused_with_the_reason(client: httpx.Client, change: dict[str, Any], reason: str):
    body = {"request_id": predict(client, "user")["request_id"], "label": "digit-7"} | change
    response = client.post("/feedback", json=body)
    assert response.status_code == 422
    assert reason in response.json()["error"]


def test_outcomes_are_durable_on_s3(s3_store: Any):
    async def run() -> None:
        log = ExperimentLog(s3_store.bucket_uri, "digits-1")
        rows = [
            {"request_id": f"r{i}", "time": datetime.now(UTC), "variant": "champion", "revision": 1, "label": None, "value": 1.0}
            for i in range(50)
        ]
        await asyncio.gather(*(log.outcomes.add_durably(row) for row in rows))
        await log.outcomes.add_durably(rows[0])

    assert load_signing_key(s3_store.bucket_uri) == load_signing_key(s3_store.bucket_uri)
    asyncio.run(run())
    assert LogReader(s3_store.bucket_uri, "digits-1").outcomes().num_rows == 50


# --- Changes under load -----------------------------------------------------------------------------------------


def test_weights_change_under_load_without_a_failed_request(client: httpx.Client, experiment: Experiment):
    with constant_load(client) as results:
        wait_until(lambda: {"champion", "challenger"} <= {variant for _, variant in results})
        endpoint.update_experiment(with_weights(experiment, {"champion": 0.0, "challenger": 1.0}, datetime.now(UTC)))
        changed = len(results)
        wait_until(lambda: len(results) > changed + 50)
    assert {status for status, _ in results} == {200}, results
    assert {variant for _, variant in results[changed + 8 :]} == {"challenger"}
    assert client.get("/ab/digits").json()["revision"] == 2


def test_a_killed_replica_fails_no_request(client: httpx.Client, experiment: Experiment):
    (victim,) = replica_pids("digits-v2")
    with constant_load(client) as results:
        wait_until(lambda: any(variant == "challenger" for _, variant in results))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: replica_pids("digits-v2") not in ([], [victim]))
        killed = len(results)
        wait_until(lambda: any(variant == "challenger" for _, variant in results[killed:]))
    assert {status for status, _ in results} == {200}, [result for result in results if result[0] != 200]


def test_feedback_counts_though_the_router_was_killed_before_it_logged_the_request(client: httpx.Client, experiment: Experiment):
    answer = predict(client, "user")
    (victim,) = replica_pids(endpoint.INGRESS_APPLICATION)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: replica_pids(endpoint.INGRESS_APPLICATION) not in ([], [victim]))
    body = {"request_id": answer["request_id"], "label": answer["predictions"][0]["label"]}
    wait_until(lambda: client.post("/feedback", json=body).status_code == 200)
    variant = client.get("/ab/digits").json()["variants"][answer["variant"]]
    assert (variant["outcomes"], variant["successes"]) == (1, 1)
    assert predict(client, "user")["variant"] == answer["variant"]


# --- Driver -----------------------------------------------------------------------------------------------------


def test_the_status_names_what_is_served(client: httpx.Client, experiment: Experiment):
    status = endpoint.status()
    assert status["address"] == str(client.base_url).rstrip("/")
    variants = status["models"]["digits"]["variants"]
    assert {name: (v["version"], v["state"], v["traffic"]) for name, v in variants.items()} == {
        "champion": (1, "RUNNING", 0.5),
        "challenger": (2, "RUNNING", 0.5),
    }


def test_another_port_than_the_one_in_use_is_refused(
    client: httpx.Client, versions: dict[str, ModelVersion], config: ServingConfig, registry: Registry
):
    other = config.model_copy(update={"port": free_port()})
    with pytest.raises(ServingError, match=f"already runs on this cluster with port {config.port}"):
        endpoint.deploy("digits", versions, split(0.5), other, registry.workspace.experiments_uri)


def test_applications_of_others_on_the_cluster_are_left_alone(client: httpx.Client, experiment: Experiment):
    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    def neighbour() -> str:
        return "still here"

    handle = serve.run(neighbour.bind(), name="neighbour", route_prefix=None)
    endpoint.update_experiment(with_weights(experiment, {"challenger": 0.0}, datetime.now(UTC)))
    assert handle.remote().result() == "still here"
    serve.delete("neighbour")


def test_a_damaged_version_does_not_come_up_and_the_others_serve_on(
    client: httpx.Client,
    experiment: Experiment,
    versions: dict[str, ModelVersion],
    config: ServingConfig,
    registry: Registry,
    tmp_path: Path,
):
    uri = package(str(tmp_path / "damaged"), 8)
    weights = tmp_path / "damaged" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = ModelVersion("digits", 8, uri, "", (), datetime.now(UTC), {})
    variants = [Variant(name="champion", version=1, weight=0.5), Variant(name="challenger", version=8, weight=0.5)]
    changed = new_experiment("digits", variants)
    with pytest.raises(ServingError, match=r"digits-v8.*do not match the digest"):
        endpoint.deploy("digits", {**versions, "challenger": damaged}, changed, config, registry.workspace.experiments_uri)
    assert {predict(client, f"user-{i}")["version"] for i in range(20)} == {1, 2}
    wait_until(lambda: "digits-v8" not in serve.status().applications)


def test_an_experiment_is_run_and_promoted_and_another_aborted_under_load(
    client: httpx.Client, registry: Registry, versions: dict[str, ModelVersion], config: ServingConfig
):
    only = new_experiment("digits", [Variant(name="champion", version=1, weight=1.0)])
    endpoint.deploy("digits", {"champion": versions["champion"]}, only, config, registry.workspace.experiments_uri)
    with pytest.raises(ServingError, match="no experiment is running"):
        ab.promote(registry, "digits")
    with pytest.raises(ServingError, match="served already"):
        ab.start(registry, "digits", {"challenger": "digits@champion"}, {"challenger": 0.1})
    with pytest.raises(RegistryError, match="no version '9'"):
        ab.start(registry, "digits", {"challenger": "9"}, {"challenger": 0.1})

    with constant_load(client) as results:
        started = ab.start(registry, "digits", {"challenger": "digits:3"}, {"challenger": 0.5}, guardrails=())
        assert registry.load_experiment("digits") == started.model_dump(mode="json")
        wait_until(lambda: any(variant == "challenger" for _, variant in results))
        with pytest.raises(ServingError, match="already running"):
            ab.start(registry, "digits", {"challenger": "2"}, {"challenger": 0.1})
        ab.promote(registry, "digits")
        promoted = len(results)
        wait_until(lambda: len(results) > promoted + 50)
        assert {variant for _, variant in results[promoted + 8 :]} == {"challenger"}
        assert registry.resolve("digits@champion").version == 3
        assert predict(client, "anybody")["version"] == 3

        ab.start(registry, "digits", {"challenger": "2"}, {"challenger": 0.5}, guardrails=())
        wait_until(lambda: predict(client, str(time.monotonic()))["version"] == 2)
        ab.abort(registry, "digits")
        assert {predict(client, f"user-{i}")["version"] for i in range(20)} == {3}
    assert {status for status, _ in results} == {200}, [result for result in results if result[0] != 200]

    assert registry.resolve("digits@champion").version == 3
    assert registry.load_experiment("digits") is None
    events = [event for event in registry.events("digits") if event["kind"].startswith("ab_")]
    assert [event["kind"] for event in events] == ["ab_start", "ab_promote", "ab_start", "ab_abort"]
    assert events[1]["report"]["variants"]["challenger"]["requests"] > 0
    wait_until(lambda: set(serve.status().applications) & {"digits-v1", "digits-v2"} == set())
    registry.set_alias("digits", "champion", 1)
