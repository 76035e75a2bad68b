"""The endpoint's HTTP face: unchanged clients of the Open Inference Protocol, keys, deadlines, slow clients, TLS."""

from __future__ import annotations

import gzip
import io
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from ray import serve
from serving_for_tests import CLASSES, free_port, package, picture, predict, wait_until
from tritonclient.utils import InferenceServerException

from eagleray.artifacts.registry import ModelVersion, Registry
from eagleray.config.schema import ModelConfig, ServingConfig, WorkspaceConfig
from eagleray.errors import ServingError
from eagleray.ports import check_port_free
from eagleray.serving import deployment, endpoint
from eagleray.serving.access import add_key, revoke_key
from eagleray.serving.experiment import Variant, new_experiment

UPLOAD_TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(WorkspaceConfig(root=str(tmp_path_factory.mktemp("workspace"))))
    for seed in (1, 2):
        registry.register("digits", package(f"{registry.workspace.models_uri}/digits-{seed}", seed), "", {})
    return registry


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    return ServingConfig(
        backend="torch-fp32",
        port=free_port(),
        grpc_port=free_port(),
        allow_anonymous=True,
        max_image_bytes=200_000,
        max_image_pixels=1_000_000,
        max_batch_size=8,
        max_json_bytes=100_000,
        upload_timeout_s=UPLOAD_TIMEOUT_S,
    )


def deploy(registry: Registry, config: ServingConfig) -> str:
    variants = [Variant(name="champion", version=1, weight=0.5), Variant(name="challenger", version=2, weight=0.5)]
    versions = {"champion": registry.resolve("digits:1"), "challenger": registry.resolve("digits:2")}
    return endpoint.deploy("digits", versions, new_experiment("digits", variants), config, registry.workspace.experiments_uri)


@pytest.fixture(scope="module")
def client(ray_cluster: Any, registry: Registry, config: ServingConfig) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deploy(registry, config), timeout=60.0) as client:
        yield client
    endpoint.shutdown()


# --- Open Inference Protocol, by an unchanged client ------------------------------------------------------------


@pytest.fixture
def triton_client(client: httpx.Client, config: ServingConfig) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{config.port}", network_timeout=60.0, connection_timeout=60.0) as protocol_client:
        yield protocol_client


def pixels(*seeds: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(picture(seed)))) for seed in seeds])


def images(values: np.ndarray, binary: bool = True) -> triton.InferInput:
    return triton.InferInput("images", list(values.shape), "UINT8").set_data_from_numpy(values, binary_data=binary)


def encoded(*pictures: bytes) -> triton.InferInput:
    values = np.array(pictures, dtype=object)
    return triton.InferInput("encoded", list(values.shape), "BYTES").set_data_from_numpy(values)


def test_triton_client_finds_server_model_and_versions(triton_client: triton.InferenceServerClient):
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert {"binary_tensor_data", "classification"} <= set(triton_client.get_server_metadata()["extensions"])
    assert triton_client.is_model_ready("digits")
    assert triton_client.is_model_ready("digits", "2")
    assert not triton_client.is_model_ready("digits", "9")
    assert not triton_client.is_model_ready("letters")
    metadata = triton_client.get_model_metadata("digits")
    assert metadata["versions"] == ["1", "2"]
    assert [(i["name"], i["datatype"], i["shape"]) for i in metadata["inputs"]] == [
        ("images", "UINT8", [-1, -1, -1, 3]),
        ("encoded", "BYTES", [-1]),
    ]
    assert [(o["name"], o["datatype"], o["shape"]) for o in metadata["outputs"]] == [
        ("probabilities", "FP32", [-1, 10]),
        ("request_ids", "BYTES", [-1]),
    ]
    assert triton_client.get_model_metadata("digits", "2")["parameters"]["classes"] == CLASSES


def test_triton_client_gets_the_same_answer_whichever_way_it_sends(client: httpx.Client, triton_client: triton.InferenceServerClient):
    expected = [client.post("/predict/digits?top_k=10", content=picture(i), headers={"X-Variant": "challenger"}).json() for i in (3, 4)]
    rows = [{p["label"]: p["probability"] for p in answer["predictions"]} for answer in expected]
    wanted = np.array([[row[label] for label in CLASSES] for row in rows])
    json_output = [triton.InferRequestedOutput("probabilities", binary_data=False)]
    ways: list[dict[str, Any]] = [
        {"inputs": [images(pixels(3, 4))]},
        {"inputs": [images(pixels(3, 4), binary=False)]},
        {"inputs": [images(pixels(3, 4), binary=False)], "outputs": json_output},
        {"inputs": [images(pixels(3, 4))], "outputs": json_output},
        {"inputs": [encoded(picture(3), picture(4))]},
        {"inputs": [encoded(picture(3), picture(4))], "request_compression_algorithm": "gzip"},
        {"inputs": [images(pixels(3, 4))], "request_compression_algorithm": "deflate", "response_compression_algorithm": "gzip"},
    ]
    for way in ways:
        result = triton_client.infer("digits", model_version="2", request_id="mine", **way)
        answer = result.get_response()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("digits", "2", "mine")
        assert answer["parameters"]["variant"] == "challenger"
        probabilities = result.as_numpy("probabilities")
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, wanted, atol=1e-5)


@pytest.fixture
def grpc_client(client: httpx.Client, config: ServingConfig) -> Iterator[triton_grpc.InferenceServerClient]:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{config.grpc_port}") as protocol_client:
        yield protocol_client


def grpc_images(values: np.ndarray) -> triton_grpc.InferInput:
    return triton_grpc.InferInput("images", list(values.shape), "UINT8").set_data_from_numpy(values)


def grpc_encoded(*pictures: bytes) -> triton_grpc.InferInput:
    return triton_grpc.InferInput("encoded", [len(pictures)], "BYTES").set_data_from_numpy(np.array(pictures, dtype=object))


def test_the_same_protocol_over_grpc(client: httpx.Client, triton_client: Any, grpc_client: triton_grpc.InferenceServerClient):
    assert grpc_client.is_server_live() and grpc_client.is_server_ready()
    assert grpc_client.is_model_ready("digits", "2")
    metadata = grpc_client.get_model_metadata("digits", as_json=True)
    assert metadata["versions"] == ["1", "2"]
    assert [(i["name"], i["datatype"], [int(n) for n in i["shape"]]) for i in metadata["inputs"]] == [
        ("images", "UINT8", [-1, -1, -1, 3]),
        ("encoded", "BYTES", [-1]),
    ]
    over_http = triton_client.infer("digits", [images(pixels(3, 4))], model_version="2").as_numpy("probabilities")
    for tensor in (grpc_images(pixels(3, 4)), grpc_encoded(picture(3), picture(4))):
        answer = grpc_client.infer("digits", [tensor], model_version="2", request_id="mine")
        np.testing.assert_allclose(answer.as_numpy("probabilities"), over_http, atol=1e-5)
        message = answer.get_response(as_json=True)
        assert (message["model_name"], message["model_version"], message["id"]) == ("digits", "2", "mine")
        assert message["parameters"]["variant"]["string_param"] == "challenger"
    (request_id, _) = answer.as_numpy("request_ids").astype(str)
    assert client.post("/feedback", json={"request_id": request_id, "outcome": True}).status_code == 200
    classes = triton_grpc.InferRequestedOutput("probabilities", class_count=3)
    best = grpc_client.infer("digits", [grpc_encoded(picture(3))], model_version="2", outputs=[classes]).as_numpy("probabilities")
    assert best.shape == (1, 3) and int(best[0, 0].split(b":")[1]) == over_http[0].argmax()
    variants = {
        key: {
            grpc_client.infer("digits", [grpc_encoded(picture())], headers={"x-routing-key": key}).get_response().model_version
            for _ in range(5)
        }
        for key in (f"user-{number}" for number in range(12))
    }
    assert all(len(versions) == 1 for versions in variants.values()) and set.union(*variants.values()) == {"1", "2"}


@pytest.mark.parametrize(
    ("model", "version", "tensor", "headers", "status", "reason"),
    [
        ("letters", "", grpc_encoded(picture()), {}, "NOT_FOUND", "no model 'letters' is served here"),
        ("digits", "9", grpc_encoded(picture()), {}, "NOT_FOUND", "'digits' has no version 9 up"),
        ("digits", "new", grpc_encoded(picture()), {}, "INVALID_ARGUMENT", "model_version 'new': give a number"),
        ("digits", "", grpc_encoded(b"no picture"), {}, "INVALID_ARGUMENT", "picture 0 is not a JPEG, PNG or WebP picture"),
        ("digits", "", grpc_images(np.zeros((9, 4, 4, 3), np.uint8)), {}, "INVALID_ARGUMENT", "1 to 8 pictures"),
        ("digits", "", grpc_encoded(picture()), {"x-covariate": "nan"}, "INVALID_ARGUMENT", "x-covariate"),
        ("digits", "", grpc_encoded(picture()), {"x-timeout-ms": "1"}, "DEADLINE_EXCEEDED", "no answer in the time"),
    ],
)
def test_grpc_refuses_as_http_does(
    grpc_client: triton_grpc.InferenceServerClient,
    model: str,
    version: str,
    tensor: triton_grpc.InferInput,
    headers: dict[str, str],
    status: str,
    reason: str,
):
    with pytest.raises(InferenceServerException, match=reason) as refused:
        grpc_client.infer(model, [tensor], model_version=version, headers=headers)
    assert refused.value.status() == f"StatusCode.{status}"


def test_triton_client_gets_classes_with_labels(triton_client: triton.InferenceServerClient):
    for binary in (True, False):
        outputs = [
            triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3),
            triton.InferRequestedOutput("request_ids", binary_data=binary),
        ]
        result = triton_client.infer("digits", [encoded(picture(5), picture(6))], model_version="1", outputs=outputs)
        classes = result.as_numpy("probabilities").astype(str)
        assert classes.shape == (2, 3)
        for row in classes:
            values, indices, labels = zip(*(text.split(":") for text in row), strict=True)
            assert list(labels) == [CLASSES[int(index)] for index in indices]
            assert [float(value) for value in values] == sorted(map(float, values), reverse=True)


def test_feedback_goes_with_the_request_ids_that_triton_client_gets(client: httpx.Client, triton_client: triton.InferenceServerClient):
    result = triton_client.infer("digits", [images(pixels(7, 8))], headers={"X-Routing-Key": "user-1"})
    best = result.as_numpy("probabilities").argmax(axis=1)
    for request_id, index in zip(result.as_numpy("request_ids").astype(str), best, strict=True):
        sent = client.post("/feedback", json={"request_id": request_id, "label": CLASSES[index]})
        assert sent.json()["outcome"] is True


def test_triton_client_sticks_to_its_variant(client: httpx.Client, triton_client: triton.InferenceServerClient):
    for user in range(10):
        result = triton_client.infer("digits", [images(pixels(1))], headers={"X-Routing-Key": f"user-{user}"})
        assert result.get_response()["parameters"]["variant"] == predict(client, f"user-{user}")["variant"]


def wrong_name() -> list[triton.InferInput]:
    return [triton.InferInput("input", [1, 2], "UINT8").set_data_from_numpy(np.zeros((1, 2), np.uint8))]


def in_shared_memory() -> list[triton.InferInput]:
    tensor = triton.InferInput("images", [1, 2, 2, 3], "UINT8")
    tensor.set_shared_memory("region", 12)
    return [tensor]


@pytest.mark.parametrize(
    ("model", "version", "inputs", "options", "status", "reason"),
    [
        ("letters", "", lambda: [images(pixels(1))], {}, "404", "no model 'letters'"),
        ("digits", "9", lambda: [images(pixels(1))], {}, "404", "version 9"),
        ("digits", "", wrong_name, {}, "400", "give images as UINT8"),
        ("digits", "", in_shared_memory, {}, "400", "shared memory"),
        ("digits", "", lambda: [images(pixels(1)), images(pixels(1))], {}, "400", "inputs"),
        ("digits", "", lambda: [images(pixels(*range(9)))], {}, "422", "1 to 8 pictures"),
        ("digits", "", lambda: [images(np.zeros((1, 1001, 1000, 3), np.uint8))], {}, "413", "limit"),
        ("digits", "", lambda: [encoded(b"hello")], {}, "415", "picture 0 is not a JPEG"),
        ("digits", "", lambda: [encoded(picture(), picture()[:200])], {}, "422", "picture 1: "),
        ("digits", "", lambda: [images(pixels(1))], {"outputs": [triton.InferRequestedOutput("scores")]}, "400", "no output 'scores'"),
        ("digits", "", lambda: [images(np.zeros((1, 200, 200, 3), np.uint8), binary=False)], {}, "413", "binary data"),
    ],
)
def test_triton_client_is_told_what_is_wrong(
    triton_client: triton.InferenceServerClient, model: str, version: str, inputs: Any, options: dict[str, Any], status: str, reason: str
):
    with pytest.raises(InferenceServerException) as refused:
        triton_client.infer(model, inputs(), model_version=version, **options)
    assert reason in refused.value.message()
    assert refused.value.status() == status
    assert triton_client.infer("digits", [images(pixels(1))]).as_numpy("probabilities").shape == (1, 10)


# --- Limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "request_", "status", "reason"),
    [
        ("/predict/digits", {"content": gzip.compress(b"\0" * 10_000_000), "headers": {"Content-Encoding": "gzip"}}, 413, "200000"),
        ("/predict/digits", {"content": gzip.compress(picture())[:-20], "headers": {"Content-Encoding": "gzip"}}, 400, "truncated"),
        ("/predict/digits", {"content": picture(), "headers": {"Content-Encoding": "gzip"}}, 400, "cannot be decompressed"),
        ("/predict/digits", {"content": picture(), "headers": {"Content-Encoding": "br"}}, 415, "use gzip or deflate"),
        ("/predict/digits", {"content": picture(), "headers": {"X-Timeout-Ms": "0"}}, 422, "X-Timeout-Ms"),
        ("/predict/digits", {"content": picture(), "headers": {"X-Routing-Key": "k" * 600}}, 422, "X-Routing-Key"),
        ("/feedback", {"content": b"[" * 60_000}, 422, "recursion"),
        ("/feedback", {"content": b" " * 70_000}, 413, "65536"),
        ("/v2/models/digits/infer", {"content": b" " * 150_000}, 413, "100000"),
        ("/v2/models/digits/infer", {"content": b"{}", "headers": {"Inference-Header-Content-Length": "200000"}}, 413, "100000"),
        ("/v2/models/digits/infer", {"content": b"{}", "headers": {"Inference-Header-Content-Length": "x"}}, 400, "size of the JSON"),
    ],
)
def test_what_is_too_much_is_refused_with_the_reason(client: httpx.Client, path: str, request_: dict[str, Any], status: int, reason: str):
    response = client.post(path, **request_)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert reason in response.json()["error"]


def test_a_compressed_picture_is_understood(client: httpx.Client):
    response = client.post("/predict/digits", content=gzip.compress(picture()), headers={"Content-Encoding": "gzip"})
    assert response.status_code == 200, response.text


# --- Slow clients and deadlines ---------------------------------------------------------------------------------


def trickle(port: int) -> tuple[bytes, float]:
    """Send a picture of 100 kB a byte at a time until the server ends the connection; returns its answer and the seconds that took."""
    begun = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        connection.sendall(b"POST /predict/digits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n\xff\xd8\xff")
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() - begun < 30:
            try:
                received = connection.recv(65536)
            except TimeoutError:
                connection.sendall(b"x")
                continue
            except ConnectionResetError:
                break
            if not received:
                break
            answer += received
    return answer, time.monotonic() - begun


def test_slow_clients_are_let_go_and_harm_nobody(client: httpx.Client, config: ServingConfig):
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(trickle, config.port) for _ in range(20)]
        seconds = []
        while not all(one.done() for one in slow):
            begun = time.monotonic()
            predict(client, "quick")
            seconds.append(time.monotonic() - begun)
    for one in slow:
        answer, took = one.result()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408"), answer
        assert f"after {UPLOAD_TIMEOUT_S:g} s" in json.loads(body)["error"]
        assert UPLOAD_TIMEOUT_S <= took < UPLOAD_TIMEOUT_S + 10
    assert len(seconds) > 10
    assert float(np.median(seconds)) < 0.5


STEP_S = 0.4


@pytest.fixture(scope="module")
def slow_model(client: httpx.Client, registry: Registry, config: ServingConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second model that classifies a batch of four in `STEP_S`, eight requests at a replica; the name of its application."""
    model = ModelConfig(name="models_for_tests:slow", params={"step_s": 0.0, "eval_s": STEP_S})
    uri = package(str(tmp_path_factory.mktemp("slow") / "package"), 5, "slow", model)
    version = ModelVersion("slow", 1, uri, "", (), datetime.now(UTC), {})
    narrow = config.model_copy(update={"max_batch_size": 4, "max_queued_requests": 100})
    only = new_experiment("slow", [Variant(name="champion", version=1, weight=1.0)])
    endpoint.deploy("slow", {"champion": version}, only, narrow, registry.workspace.experiments_uri)
    return "slow-v1"


def test_requests_that_come_while_a_batch_runs_share_the_next_one(client: httpx.Client, slow_model: str):
    classifier = serve.get_deployment_handle(deployment.NAME, app_name=slow_model)
    before = classifier.batch_counts.remote().result()
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: client.post("/predict/slow", content=picture()).status_code, range(16)))
    after = classifier.batch_counts.remote().result()
    assert statuses == [200] * 16
    assert after["pictures"] - before["pictures"] == 16
    assert after["batches"] - before["batches"] <= 6  # one that found it idle, and then four at a time


def test_a_replica_is_kept_busy_while_many_wait_for_it(client: httpx.Client, slow_model: str):
    """Who has waited long looks for room as often as who has just come; else a replica idles, and its batches are not full."""
    classifier = serve.get_deployment_handle(deployment.NAME, app_name=slow_model)
    before = classifier.batch_counts.remote().result()["batches"]
    with ThreadPoolExecutor(80) as pool:
        statuses = list(pool.map(lambda _: client.post("/predict/slow", content=picture(), timeout=60).status_code, range(80)))
    assert statuses == [200] * 80
    assert classifier.batch_counts.remote().result()["batches"] - before <= 25  # 20 if all are full


def test_what_is_not_begun_by_its_deadline_is_never_done(client: httpx.Client, slow_model: str):
    classifier = serve.get_deployment_handle(deployment.NAME, app_name=slow_model)
    before = classifier.batch_counts.remote().result()["pictures"]

    def ask(_: int) -> httpx.Response:
        files = [("image", (f"{i}.png", picture(i))) for i in range(4)]
        return client.post("/predict/slow", files=files, headers={"X-Timeout-Ms": "1000"})

    begun = time.monotonic()
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(ask, range(24)))
    took = time.monotonic() - begun
    late = [response for response in responses if response.status_code == 504]
    assert {response.status_code for response in responses} == {200, 504}
    assert all("in the time that the request has" in response.json()["error"] for response in late)
    assert len(late) > 12
    assert took < 10 * STEP_S
    begun = time.monotonic()
    assert client.post("/predict/slow", content=picture()).status_code == 200
    assert time.monotonic() - begun < 6 * STEP_S
    assert classifier.batch_counts.remote().result()["pictures"] - before <= 4 * 5  # of 97
    assert client.get("/ab/slow").json()["variants"]["champion"]["errors"] == len(late)


def test_the_protocols_timeout_is_a_deadline_too(triton_client: triton.InferenceServerClient, slow_model: str):
    with pytest.raises(InferenceServerException, match="in the time that the request has") as late:
        triton_client.infer("slow", [images(pixels(1))], timeout=50_000)
    assert late.value.status() == "504"
    assert triton_client.infer("slow", [images(pixels(1))], timeout=30_000_000).as_numpy("probabilities").shape == (1, 10)


def test_others_are_answered_while_a_version_that_is_taken_down_answers_what_waits_for_it(
    client: httpx.Client, slow_model: str, registry: Registry, config: ServingConfig, tmp_path: Path
) -> None:
    """80 requests are with a version, eight seconds' work, when the next one takes over."""
    quick = package(str(tmp_path / "package"), 6, "slow")
    version = ModelVersion("slow", 2, quick, "", (), datetime.now(UTC), {})
    only = new_experiment("slow", [Variant(name="champion", version=2, weight=1.0)])
    ended = threading.Event()
    statuses: set[int] = set()
    seconds: list[float] = []

    def ask_slow() -> None:
        while not ended.is_set():
            statuses.add(client.post("/predict/slow", content=picture(), timeout=60).status_code)

    def ask_other() -> None:
        while not ended.is_set():
            begun = time.monotonic()
            statuses.add(client.post("/predict/digits", content=picture(), timeout=60).status_code)
            seconds.append(time.monotonic() - begun)
            time.sleep(0.05)

    with ThreadPoolExecutor(81) as pool:
        asking = [pool.submit(ask) for ask in (*[ask_slow] * 80, ask_other)]
        try:
            time.sleep(1.0)
            endpoint.deploy("slow", {"champion": version}, only, config, registry.workspace.experiments_uri)
        finally:
            ended.set()
        for asked in asking:
            asked.result()
    assert statuses == {200}
    assert max(seconds) < 4.0
    assert client.get("/v2/models/slow").json()["versions"] == ["2"]


# --- API keys ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keys_uri(client: httpx.Client, registry: Registry, config: ServingConfig, tmp_path: Path) -> Iterator[str]:
    uri = str(tmp_path / "keys")
    deploy(registry, config.model_copy(update={"keys_uri": uri}))
    yield uri
    deploy(registry, config.model_copy(update={"allow_anonymous": True}))


def test_keys_open_the_endpoint_until_they_are_revoked(
    client: httpx.Client,
    config: ServingConfig,
    registry: Registry,
    keys_uri: str,
    triton_client: triton.InferenceServerClient,
    grpc_client: triton_grpc.InferenceServerClient,
):
    def ask(secret: str | None, path: str = "/predict/digits", **options: Any) -> httpx.Response:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        return client.request("GET" if "ab" in path else "POST", path, headers=headers, **({"content": picture()} | options))

    missing = ask(None)
    assert (missing.status_code, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "needs an API key" in missing.json()["error"]
    assert client.get("/v2/health/ready").status_code == 200

    user, admin = add_key(keys_uri, "user", "predict"), add_key(keys_uri, "boss", "admin")
    limited = add_key(keys_uri, "limited", "predict", requests_per_s=0.5)
    wait_until(lambda: ask(limited).status_code in (200, 429), timeout_s=10)
    answer = ask(user).json()
    assert ask(user, "/feedback", content=None, json={"request_id": answer["request_id"], "outcome": True}).status_code == 200
    forbidden = ask(user, "/ab/digits", content=None)
    assert (forbidden.status_code, ask(admin, "/ab/digits", content=None).status_code) == (403, 200)
    assert "role admin" in forbidden.json()["error"]
    too_many = [ask(limited) for _ in range(3)][-1]
    assert too_many.status_code == 429
    assert 1 <= int(too_many.headers["Retry-After"]) <= 2
    assert "0.5 requests per second" in too_many.json()["error"]
    assert ask(user).status_code == 200

    with pytest.raises(InferenceServerException, match="needs an API key"):
        triton_client.infer("digits", [images(pixels(1))])
    assert triton_client.infer("digits", [images(pixels(1))], headers={"Authorization": f"Bearer {user}"}).get_response()["outputs"]
    with pytest.raises(InferenceServerException, match="needs an API key") as refused:
        grpc_client.infer("digits", [grpc_encoded(picture())])
    assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
    assert grpc_client.infer("digits", [grpc_encoded(picture())], headers={"authorization": f"Bearer {user}"}).get_response().outputs

    with pytest.raises(ServingError, match="the endpoint asks for API keys"):
        deploy(registry, config.model_copy(update={"allow_anonymous": False}))
    revoke_key(keys_uri, "user")
    wait_until(lambda: ask(user).status_code == 401, timeout_s=10)
    assert ask(admin).status_code == 200


def test_a_refused_client_is_told_before_it_has_sent_its_picture(config: ServingConfig, keys_uri: str):
    with closing(socket.create_connection(("127.0.0.1", config.port), timeout=10)) as connection:
        connection.sendall(b"POST /predict/digits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


# --- TLS; ends the endpoint of the tests above ------------------------------------------------------------------


def self_signed(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "eagleray test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths


def test_where_requests_go_through_haproxy_a_certificate_is_refused(
    client: httpx.Client, registry: Registry, config: ServingConfig, tmp_path: Path
):
    certificate, key = self_signed(tmp_path)
    with_tls = config.model_copy(update={"tls_cert_path": str(certificate), "tls_key_path": str(key), "grpc_port": None})
    with pytest.raises(ServingError, match="already runs on this cluster with None"):
        deploy(registry, with_tls)
    endpoint.shutdown()
    with pytest.raises(ServingError, match="give a certificate and its key"):
        deploy(registry, with_tls.model_copy(update={"tls_cert_path": str(key)}))
    with pytest.raises(ServingError, match="has no HTTPS; start them without it"):
        deploy(registry, with_tls)


# --- On a Ray of the command's own ------------------------------------------------------------------------------


@contextmanager
def deployed(registry: Registry, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """`eagleray serve deploy` without a cluster; once it serves, yields its process, its port and what it has said."""
    port, job = free_port(), folder / "job.yaml"
    document = {"name": "digits", "workspace": {"root": registry.workspace.root}, "data": {"train": "-", "val": "-"}}
    job.write_text(json.dumps(document | {"serve": {"backend": "torch-fp32", "port": port}}))
    command = [sys.executable, "-m", "eagleray", "serve", "deploy", "digits:1", "--job", str(job), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = []
        while said[-1:] != ["Serving until Ctrl-C.\n"]:
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        yield process, port, "".join(said)
    finally:
        process.kill()
        process.wait()


def test_with_a_certificate_the_endpoint_speaks_https_alone(registry: Registry, tmp_path: Path):
    certificate, key = self_signed(tmp_path)
    with deployed(registry, tmp_path, "--tls", str(certificate), str(key)) as (process, port, said):
        address = f"https://127.0.0.1:{port}"
        assert f"endpoint {address}\n" in said
        with httpx.Client(base_url=address, verify=ssl.create_default_context(cafile=certificate), timeout=60.0) as trusting:
            assert predict(trusting, "user")["model"] == "digits"
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{address}/v2/health/live")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/v2/health/live")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_where_the_command_is_killed_its_port_is_free_again(registry: Registry, tmp_path: Path):
    with deployed(registry, tmp_path) as (process, port, _):
        proxies = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "haproxy"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            assert predict(client, "user")["model"] == "digits"
        process.kill()
        assert proxies and not psutil.wait_procs(proxies, timeout=60)[1]
        check_port_free("127.0.0.1", port)
