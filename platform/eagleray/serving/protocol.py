"""Requests and answers of the Open Inference Protocol v2, as bytes: JSON, and the extension for binary tensors.

- The protocol: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
- Binary tensors: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
- Classification: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
- `timeout`, in µs: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_schedule_policy.md

A request gives one of two tensors: `images`, UINT8 [N, H, W, 3], RGB as displayed; or `encoded`, BYTES [N] or [N, 1], JPEG,
PNG or WebP pictures, which in JSON are Base64, since JSON holds text alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagleray.config.schema import ServingConfig
from eagleray.serving.limits import Refusal, check_picture

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header with the size in bytes of the JSON; what follows it in the body is binary tensors."""

EXTENSIONS = ["binary_tensor_data", "classification", "schedule_policy"]

IMAGES = "images"
ENCODED = "encoded"
PROBABILITIES = "probabilities"
REQUEST_IDS = "request_ids"

_MAX_ID = 512
_NO_SHARED_MEMORY = "shared memory is not supported; send the data"


class _Message(BaseModel):
    """Values must have their types as they are; what the protocol leaves to others is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class InputParameters(_Message):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    shared_memory_region: str | None = None


class InputTensor(_Message):
    name: Annotated[str, Field(max_length=_MAX_ID)]
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(_Message):
    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=1)] | None = None
    shared_memory_region: str | None = None


class RequestedOutput(_Message):
    name: Annotated[str, Field(max_length=_MAX_ID)]
    parameters: OutputParameters = OutputParameters()


class RequestParameters(_Message):
    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0)] = 0
    """µs; 0: none."""


class InferRequest(_Message):
    """An inference request of the Open Inference Protocol."""

    id: Annotated[str, Field(max_length=_MAX_ID)] | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=2)] = []


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    id: str | None
    pictures: NDArray[np.uint8] | list[bytes]
    """uint8 [N, H, W, 3], or N encoded pictures."""
    outputs: list[RequestedOutput]
    timeout_s: float | None


@dataclass(frozen=True)
class Answered:
    """What is told about a request."""

    model: str
    version: int
    variant: str
    classes: list[str]
    probabilities: NDArray[np.float32]
    """float32 [N, C]."""
    request_ids: list[str]


def model_metadata(
    model: str, versions: list[int], classes: list[str], weights_sha256: str, image_size: int, backend: str
) -> dict[str, Any]:
    return {
        "name": model,
        "versions": [str(version) for version in versions],
        "platform": "openvino" if backend.startswith("openvino") else "pytorch",
        "inputs": [
            {"name": IMAGES, "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
            {"name": ENCODED, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(classes)]},
            {"name": REQUEST_IDS, "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {"classes": classes, "weights_sha256": weights_sha256, "image_size": image_size, "backend": backend},
    }


# --- Requests ---------------------------------------------------------------------------------------------------


def header_length(header: str | None) -> int | None:
    """Return the size of the JSON that the header gives; None without header: all of the body. Raises Refusal."""
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < 16):
        raise Refusal(400, f"{HEADER_LENGTH} '{header[:32]}': give the size of the JSON in bytes")
    return int(header)


def parse_request(body: bytes, json_size: int | None, config: ServingConfig) -> Asked:
    """Understand a request.

    Args:
        json_size: bytes of JSON, what follows is binary tensors; None: all of it is JSON.

    Raises:
        Refusal: 400 not such a request, 413 or 415 an encoded picture that is too large or none, 422 a tensor that cannot be.
    """
    if json_size is not None and json_size > len(body):
        raise Refusal(400, f"{HEADER_LENGTH} {json_size}: the body has {len(body)} bytes only")
    try:
        request = InferRequest.model_validate_json(body[:json_size])
    except ValidationError as error:
        raise Refusal(400, f"not an inference request: {first_problem(error.errors())}") from None
    tensor = request.inputs[0]
    binary = _binary(tensor, memoryview(body)[len(body) if json_size is None else json_size :])
    timeout = request.parameters.timeout
    return Asked(request.id, _pictures(tensor, binary, config), _requested_outputs(request), timeout / 1e6 if timeout else None)


def _binary(tensor: InputTensor, rest: memoryview) -> memoryview | None:
    """Return the input's binary data: all that follows the JSON, as there is one input."""
    size = tensor.parameters.binary_data_size
    if tensor.parameters.shared_memory_region is not None:
        raise Refusal(400, f"inputs.0: {_NO_SHARED_MEMORY}")
    if (size is None) == (tensor.data is None):
        raise Refusal(400, "inputs.0: give either data, or the parameter binary_data_size and the data after the JSON")
    if (size or 0) != len(rest):
        raise Refusal(
            400, f"inputs.0: binary_data_size is {size or 0}, but {len(rest)} bytes follow the JSON, by the header {HEADER_LENGTH}"
        )
    return None if size is None else rest


def _pictures(tensor: InputTensor, binary: memoryview | None, config: ServingConfig) -> NDArray[np.uint8] | list[bytes]:
    if (tensor.name, tensor.datatype) == (IMAGES, "UINT8"):
        return _images(tensor, binary, config)
    if (tensor.name, tensor.datatype) == (ENCODED, "BYTES"):
        return _encoded(tensor, binary, config)
    raise Refusal(
        400,
        f"inputs.0: name '{tensor.name}' and datatype '{tensor.datatype}': give {IMAGES} as UINT8 [N, H, W, 3], "
        f"or {ENCODED} (JPEG, PNG, WebP) as BYTES [N]",
    )


def _images(tensor: InputTensor, binary: memoryview | None, config: ServingConfig) -> NDArray[np.uint8]:
    shape = tensor.shape
    if len(shape) != 4 or shape[3] != 3:
        raise Refusal(422, f"inputs.0.shape {shape}: give [N, H, W, 3]")
    count, height, width, _ = shape
    if not (0 < count <= config.max_batch_size and min(height, width) > 0 and height * width <= config.max_image_pixels):
        raise Refusal(
            422,
            f"inputs.0.shape {shape}: 1 to {config.max_batch_size} pictures of up to {config.max_image_pixels} pixels each",
        )
    try:
        values = np.frombuffer(binary, np.uint8) if binary is not None else _uint8(tensor.data)
        return values.reshape(shape)
    except (ValueError, TypeError) as error:
        raise Refusal(422, f"inputs.0: the data does not fit datatype UINT8 and shape {shape}: {error}") from None


def _uint8(data: Any) -> NDArray[np.uint8]:
    values = np.asarray(data)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise ValueError("UINT8 values are whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _encoded(tensor: InputTensor, binary: memoryview | None, config: ServingConfig) -> list[bytes]:
    shape = tensor.shape
    if not (shape and 0 < shape[0] <= config.max_batch_size and shape[1:] in ([], [1])):
        raise Refusal(422, f"inputs.0.shape {shape}: give [N] or [N, 1], for 1 to {config.max_batch_size} pictures")
    try:
        pictures = _split_bytes(binary, shape[0]) if binary is not None else _from_base64(tensor.data)
    except ValueError as error:
        raise Refusal(422, f"inputs.0: the data does not fit datatype BYTES: {error}") from None
    if len(pictures) != shape[0]:
        raise Refusal(422, f"inputs.0: shape {shape}, but there are {len(pictures)} elements")
    for index, picture in enumerate(pictures):
        check_picture(picture, f"inputs.0: picture {index}", config)
    return pictures


def _split_bytes(binary: memoryview, count: int) -> list[bytes]:
    """Split up to `count` elements, each after its size in four bytes, little-endian."""
    elements: list[bytes] = []
    at = 0
    while at < len(binary) and len(elements) < count:
        if at + 4 > len(binary):
            raise ValueError("it ends within an element's size")
        (size,) = struct.unpack_from("<I", binary, at)
        at += 4
        if at + size > len(binary):
            raise ValueError(f"element {len(elements)} has {size} bytes by its size, but {len(binary) - at} follow")
        elements.append(bytes(binary[at : at + size]))
        at += size
    if at < len(binary):
        raise ValueError(f"{len(binary) - at} bytes follow the last of {count} elements")
    return elements


def _from_base64(data: Any) -> list[bytes]:
    values = np.asarray(data, dtype=object).ravel().tolist()
    try:
        return [base64.b64decode(value, validate=True) for value in values]
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("in JSON, pictures are Base64 strings; send others as binary data") from None


def _requested_outputs(request: InferRequest) -> list[RequestedOutput]:
    """Return what is asked for, all if nothing is named, each with its `binary_data` decided."""
    asked = request.outputs or [RequestedOutput(name=PROBABILITIES), RequestedOutput(name=REQUEST_IDS)]
    names = [output.name for output in asked]
    for index, output in enumerate(asked):
        if output.name not in (PROBABILITIES, REQUEST_IDS):
            raise Refusal(400, f"outputs.{index}: there is no output '{output.name}'; there are {PROBABILITIES} and {REQUEST_IDS}")
        if names.count(output.name) > 1:
            raise Refusal(400, f"outputs.{index}: '{output.name}' is asked for twice")
        if output.parameters.shared_memory_region is not None:
            raise Refusal(400, f"outputs.{index}: {_NO_SHARED_MEMORY}")
        if output.parameters.classification and output.name != PROBABILITIES:
            raise Refusal(400, f"outputs.{index}: classification is for {PROBABILITIES}, not for '{output.name}'")
        if output.parameters.binary_data is None:
            output.parameters = output.parameters.model_copy(update={"binary_data": request.parameters.binary_data_output})
    return asked


def first_problem(problems: Any) -> str:
    """Return in one line where the first of a pydantic error's problems is, and what it is."""
    problem = problems[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


# --- Answers ----------------------------------------------------------------------------------------------------


def build_answer(asked: Asked, answered: Answered) -> tuple[bytes, int | None]:
    """Return the answer's body, and the size of its JSON if binary tensors follow that."""
    outputs, binary = [], []
    for output in asked.outputs:
        entry, values = _output(output, answered)
        if output.parameters.binary_data:
            data = _binary_data(values)
            entry["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            entry["data"] = [round(value, 7) if isinstance(value, float) else value for value in values.ravel().tolist()]
        outputs.append(entry)
    header = {
        "model_name": answered.model,
        "model_version": str(answered.version),
        "id": asked.id or answered.request_ids[0],
        "parameters": {"variant": answered.variant},
        "outputs": outputs,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([text, *binary]), len(text) if any(output.parameters.binary_data for output in asked.outputs) else None


def _output(output: RequestedOutput, answered: Answered) -> tuple[dict[str, Any], NDArray[Any]]:
    if output.name == REQUEST_IDS:
        values, datatype = np.asarray(answered.request_ids, dtype=object), "BYTES"
    elif output.parameters.classification is None:
        values, datatype = answered.probabilities, "FP32"
    else:
        values, datatype = _best_classes(answered, output.parameters.classification), "BYTES"
    return {"name": output.name, "datatype": datatype, "shape": list(values.shape)}, values


def _best_classes(answered: Answered, count: int) -> NDArray[np.object_]:
    """Return `probability:index:label` of the `count` most probable classes, object [N, K]."""
    order = np.argsort(-answered.probabilities, axis=1, kind="stable")[:, :count]
    rows = zip(answered.probabilities, order, strict=True)
    return np.asarray([[f"{row[index]:.6f}:{index}:{answered.classes[index]}" for index in best] for row, best in rows], dtype=object)


def _binary_data(values: NDArray[Any]) -> bytes:
    if values.dtype != object:
        return values.astype("<f4").tobytes()
    elements = [text.encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
