"""The Open Inference Protocol v2 over gRPC: the same requests as over HTTP, as Ray Serve's gRPC proxy hands them on.

The messages are those of `tritonclient`. A request is brought into the form that it has over HTTP with binary tensors, so
that both have the same limits and the same answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from typing import Annotated, Any

import grpc
from google.protobuf.message import Message
from pydantic import BaseModel, Field, ValidationError
from ray.serve.grpc_util import RayServegRPCContext
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

import eagleray
from eagleray.errors import EagleRayError
from eagleray.serving import protocol
from eagleray.serving.access import Keyring
from eagleray.serving.limits import REQUEST_PICTURES, Refusal
from eagleray.serving.router import Router, status_of

SERVICERS = ["eagleray.serving.rpc.add_GRPCInferenceServiceServicer_to_server"]
"""What Ray Serve's proxy imports; through this module, for the line below."""

# Ray pickles messages on their way from the proxy, by the name of the module that they were generated as.
sys.modules.setdefault("grpc_service_pb2", pb)

__all__ = ["SERVICERS", "Caller", "InferenceService", "add_GRPCInferenceServiceServicer_to_server"]

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Caller(BaseModel):
    """What a call's metadata say of who asks; the names are those of HTTP's headers."""

    routing_key: Annotated[str | None, Field(alias="x-routing-key", max_length=512)] = None
    variant: Annotated[str | None, Field(alias="x-variant")] = None
    covariate: Annotated[float | None, Field(alias="x-covariate", allow_inf_nan=False)] = None
    timeout_ms: Annotated[float, Field(alias="x-timeout-ms", ge=1)] = math.inf

    @classmethod
    def of(cls, headers: dict[str, str]) -> Caller:
        """Raises Refusal."""
        try:
            return cls.model_validate(headers)
        except ValidationError as error:
            raise Refusal(422, protocol.first_problem(error.errors())) from None


class InferenceService:
    """The protocol's calls by their names; the ingress inherits them."""

    _router: Router
    _keyring: Keyring

    async def ServerLive(self, request: Message, grpc_context: RayServegRPCContext) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Message, grpc_context: RayServegRPCContext) -> Message:
        return pb.ServerReadyResponse(ready=bool(self._router.state.models))

    async def ServerMetadata(self, request: Message, grpc_context: RayServegRPCContext) -> Message:
        return pb.ServerMetadataResponse(name="eagleray", version=eagleray.__version__, extensions=protocol.EXTENSIONS)

    async def ModelReady(self, request: Any, grpc_context: RayServegRPCContext) -> Message:
        try:
            self._admit(request.name, grpc_context)
            self._router.target(request.name, None, version=_version(request.version))
        except (Refusal, EagleRayError) as error:
            return _refuse(error, grpc_context, pb.ModelReadyResponse())
        return pb.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: Any, grpc_context: RayServegRPCContext) -> Message:
        try:
            self._admit(request.name, grpc_context)
            found = self._router.metadata(request.name, _version(request.version))
        except (Refusal, EagleRayError) as error:
            return _refuse(error, grpc_context, pb.ModelMetadataResponse())
        tensors = {side: [pb.ModelMetadataResponse.TensorMetadata(**tensor) for tensor in found[side]] for side in ("inputs", "outputs")}
        return pb.ModelMetadataResponse(name=found["name"], versions=found["versions"], platform=found["platform"], **tensors)

    async def ModelInfer(self, request: Any, grpc_context: RayServegRPCContext) -> Message:
        try:
            caller = Caller.of(self._admit(request.model_name, grpc_context))
            config, begun = self._router.model(request.model_name).config, asyncio.get_running_loop().time()
            body, json_size = _as_http(request)
            if len(body) > (limit := config.max_json_bytes + REQUEST_PICTURES * config.max_image_bytes):
                raise Refusal(413, f"the request has {len(body)} bytes, more than {limit}, the limit")
            asked = protocol.parse_request(body, json_size, config)
            seconds = min(config.request_timeout_s, caller.timeout_ms / 1000, asked.timeout_s or math.inf)
            target = self._router.target(
                request.model_name,
                caller.routing_key,
                variant=caller.variant,
                version=_version(request.model_version),
                covariate=caller.covariate,
                until=begun + seconds,
            )
            return _answer(*protocol.build_answer(asked, await self._router.infer(target, asked)))
        except (Refusal, EagleRayError) as error:
            return _refuse(error, grpc_context, pb.ModelInferResponse())

    def _admit(self, model: str, context: RayServegRPCContext) -> dict[str, str]:
        """Let a request pass that has a key; returns its metadata, which are HTTP's headers in small letters. Raises Refusal."""
        headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        self._keyring.admit(f"/v2/models/{model}", headers.get("authorization"))
        return headers


def _version(text: str) -> int | None:
    if text and not text.isdigit():
        raise Refusal(400, f"model_version '{text}': give a number, or nothing for the variant that the experiment assigns")
    return int(text) if text else None


def _as_http(request: Any) -> tuple[bytes, int]:
    """Return the request as it would be over HTTP, with binary tensors, and the size of its JSON."""
    if len(request.raw_input_contents) != len(request.inputs):
        raise Refusal(400, "send each input's data in raw_input_contents; typed contents are not read")
    sizes = [len(data) for data in request.raw_input_contents]
    document = {
        "id": request.id or None,
        "parameters": _parameters(request.parameters) | {"binary_data_output": True},
        "inputs": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "parameters": _parameters(tensor.parameters) | {"binary_data_size": size},
            }
            for tensor, size in zip(request.inputs, sizes, strict=True)
        ],
        "outputs": [{"name": output.name, "parameters": _parameters(output.parameters)} for output in request.outputs],
    }
    text = json.dumps(document).encode()
    return b"".join([text, *request.raw_input_contents]), len(text)


def _parameters(parameters: Any) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}


def _answer(body: bytes, json_size: int | None) -> Message:
    header = json.loads(body[:json_size])
    answer = pb.ModelInferResponse(model_name=header["model_name"], model_version=header["model_version"], id=header["id"])
    for name, value in header["parameters"].items():
        answer.parameters[name].string_param = value
    at = json_size or len(body)
    for output in header["outputs"]:
        answer.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        size = output["parameters"]["binary_data_size"]
        answer.raw_output_contents.append(body[at : at + size])
        at += size
    return answer


def _refuse(error: Refusal | EagleRayError, context: RayServegRPCContext, nothing: Message) -> Message:
    """Set the call's status, as HTTP's would be, and return an empty answer, which nobody sees."""
    status = error.status if isinstance(error, Refusal) else status_of(error)
    context.set_code(_CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT))
    context.set_details(str(error))
    return nothing
