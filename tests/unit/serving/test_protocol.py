"""Open Inference Protocol messages, as bytes in and bytes out."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest

from eagleray.config.schema import ServingConfig
from eagleray.serving.limits import Refusal
from eagleray.serving.protocol import Answered, build_answer, header_length, parse_request

CONFIG = ServingConfig(max_batch_size=4, max_image_pixels=100, max_image_bytes=50)
PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 10
PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)


def request(tensor: dict[str, Any] | None = None, **fields: Any) -> bytes:
    images = {"name": "images", "datatype": "UINT8", "shape": [2, 2, 2, 3], "data": PIXELS.ravel().tolist()}
    return json.dumps({"inputs": [images if tensor is None else tensor], **fields}).encode()


def encoded(shape: list[int], **fields: Any) -> dict[str, Any]:
    return {"name": "encoded", "datatype": "BYTES", "shape": shape, **fields}


def with_binary(tensor: dict[str, Any], data: bytes) -> tuple[bytes, int]:
    text = request({**tensor, "parameters": {"binary_data_size": len(data)}})
    return text + data, len(text)


def elements(*pictures: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)


@pytest.mark.parametrize("data", [PIXELS.ravel().tolist(), PIXELS.tolist()], ids=["flat", "nested"])
def test_json_pixels_are_read_flat_or_nested(data: list[Any]):
    asked = parse_request(request({"name": "images", "datatype": "UINT8", "shape": [2, 2, 2, 3], "data": data}), None, CONFIG)
    np.testing.assert_array_equal(asked.pictures, PIXELS)


def test_binary_pixels_follow_the_json():
    asked = parse_request(*with_binary({"name": "images", "datatype": "UINT8", "shape": [2, 2, 2, 3]}, PIXELS.tobytes()), CONFIG)
    np.testing.assert_array_equal(asked.pictures, PIXELS)


def test_encoded_pictures_are_read_from_binary_and_from_base64():
    assert parse_request(*with_binary(encoded([2, 1]), elements(PNG, PNG + b"y")), CONFIG).pictures == [PNG, PNG + b"y"]
    text = base64.b64encode(PNG).decode()
    assert parse_request(request(encoded([2], data=[text, text])), None, CONFIG).pictures == [PNG, PNG]
    assert parse_request(request(encoded([1, 1], data=[[text]])), None, CONFIG).pictures == [PNG]


def test_id_and_timeout_are_the_requests_and_what_is_not_known_is_ignored():
    asked = parse_request(request(id="mine", parameters={"timeout": 2_500, "priority": 3}, extra=1), None, CONFIG)
    assert (asked.id, asked.timeout_s) == ("mine", 0.0025)
    assert parse_request(request(), None, CONFIG).timeout_s is None


IMAGES = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3]}


@pytest.mark.parametrize(
    ("body", "json_size", "status", "reason"),
    [
        (b"{", None, 400, "not an inference request"),
        (b'{"inputs": []}', None, 400, "inputs"),
        (b'{"inputs": [' + b"[" * 500 + b"]" * 500 + b"]}", None, 400, "recursion"),
        (request(id="x" * 513), None, 400, "id"),
        (request(), 10_000, 400, "bytes only"),
        (request(IMAGES), None, 400, "either data, or"),
        (request({**IMAGES, "parameters": {"binary_data_size": 3}}), None, 400, "0 bytes follow"),
        (request({**IMAGES, "data": [1, 2, 3], "parameters": {"binary_data_size": 3}}), None, 400, "either data, or"),
        (request({**IMAGES, "parameters": {"shared_memory_region": "r"}}), None, 400, "shared memory"),
        (request({**IMAGES, "name": "image", "data": [1, 2, 3]}), None, 400, "give images as UINT8"),
        (request({**IMAGES, "datatype": "FP32", "data": [1, 2, 3]}), None, 400, "datatype 'FP32'"),
        (request({**IMAGES, "shape": [1, 1, 3], "data": [1, 2, 3]}), None, 422, "[N, H, W, 3]"),
        (request({**IMAGES, "shape": [0, 1, 1, 3], "data": []}), None, 422, "1 to 4 pictures"),
        (request({**IMAGES, "shape": [5, 1, 1, 3], "data": [0] * 15}), None, 422, "1 to 4 pictures"),
        (request({**IMAGES, "shape": [1, 101, 1, 3], "data": []}), None, 422, "100 pixels each"),
        (request({**IMAGES, "data": [1, 2, 300]}), None, 422, "0 to 255"),
        (request({**IMAGES, "data": [1, 2, 0.5]}), None, 422, "whole numbers"),
        (request({**IMAGES, "data": ["1", "2", "3"]}), None, 422, "whole numbers"),
        (request({**IMAGES, "data": [[1, 2], [3]]}), None, 422, "does not fit"),
        (request({**IMAGES, "data": []}), None, 422, "whole numbers"),
        (*with_binary(IMAGES, b"1234"), 422, "does not fit"),
        (*with_binary(encoded([1]), b"12"), 422, "within an element's size"),
        (*with_binary(encoded([1]), struct.pack("<I", 99) + PNG), 422, "99 bytes by its size"),
        (*with_binary(encoded([1]), elements(PNG, PNG)), 422, "follow the last of 1"),
        (*with_binary(encoded([2]), elements(PNG)), 422, "there are 1 elements"),
        (*with_binary(encoded([1]), elements(b"GIF89a")), 415, "picture 0 is not a JPEG"),
        (*with_binary(encoded([1]), elements(PNG + b"x" * 50)), 413, "limit of 50"),
        (*with_binary(encoded([1]), elements(b"")), 400, "empty"),
        (request(encoded([1], data=["no base64!"])), None, 422, "Base64"),
        (request(encoded([1], data=[3])), None, 422, "Base64"),
        (request(encoded([1, 2], data=["", ""])), None, 422, "[N] or [N, 1]"),
        (request(outputs=[{"name": "scores"}]), None, 400, "there is no output 'scores'"),
        (request(outputs=[{"name": "probabilities"}] * 2), None, 400, "asked for twice"),
        (request(outputs=[{"name": "probabilities"}] * 3), None, 400, "outputs"),
        (request(outputs=[{"name": "probabilities", "parameters": {"classification": 0}}]), None, 400, "classification"),
        (request(outputs=[{"name": "request_ids", "parameters": {"classification": 1}}]), None, 400, "classification is for"),
        (request(outputs=[{"name": "probabilities", "parameters": {"shared_memory_region": "r"}}]), None, 400, "shared memory"),
        (request(parameters={"timeout": "soon"}), None, 400, "parameters.timeout"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(body: bytes, json_size: int | None, status: int, reason: str):
    with pytest.raises(Refusal) as refused:
        parse_request(body, json_size, CONFIG)
    assert refused.value.status == status
    assert reason in refused.value.reason


@pytest.mark.parametrize("header", ["", "-1", "1.5", "12x", "²", "9" * 20])
def test_a_header_length_that_is_none_is_refused(header: str):
    with pytest.raises(Refusal, match="size of the JSON"):
        header_length(header)


def answered() -> Answered:
    probabilities = np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], np.float32)
    return Answered("pets", 3, "champion", ["cat", "dog", "schräg"], probabilities, ["r1", "r2"])


def test_without_named_outputs_all_are_answered_as_json():
    body, json_size = build_answer(parse_request(request(), None, CONFIG), answered())
    answer = json.loads(body)
    assert json_size is None
    assert (answer["model_name"], answer["model_version"], answer["id"], answer["parameters"]) == (
        "pets",
        "3",
        "r1",
        {"variant": "champion"},
    )
    assert [(o["name"], o["datatype"], o["shape"]) for o in answer["outputs"]] == [
        ("probabilities", "FP32", [2, 3]),
        ("request_ids", "BYTES", [2]),
    ]
    assert answer["outputs"][0]["data"] == pytest.approx([0.25, 0.5, 0.25, 0.1, 0.2, 0.7])
    assert answer["outputs"][1]["data"] == ["r1", "r2"]


def test_classes_are_answered_as_value_index_and_label_most_probable_first():
    outputs = [{"name": "probabilities", "parameters": {"classification": 2, "binary_data": False}}]
    body, _ = build_answer(parse_request(request(outputs=outputs), None, CONFIG), answered())
    (output,) = json.loads(body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.500000:1:dog", "0.250000:0:cat", "0.700000:2:schräg", "0.200000:1:dog"]


def test_binary_outputs_follow_the_json_in_order_and_mix_with_json_ones():
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "request_ids"}]
    body, json_size = build_answer(parse_request(request(outputs=outputs), None, CONFIG), answered())
    header = json.loads(body[:json_size])
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 24}
    assert header["outputs"][1]["data"] == ["r1", "r2"]
    np.testing.assert_array_equal(np.frombuffer(body[json_size:], "<f4").reshape(2, 3), answered().probabilities)

    all_binary = parse_request(request(parameters={"binary_data_output": True}), None, CONFIG)
    body, json_size = build_answer(all_binary, answered())
    assert body[json_size:].endswith(elements(b"r1", b"r2"))
    assert json.loads(body[:json_size])["outputs"][1]["parameters"] == {"binary_data_size": 12}
