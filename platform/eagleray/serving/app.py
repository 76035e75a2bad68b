"""The HTTP face: plain picture upload, feedback, the experiment's figures, and the Open Inference Protocol (JSON).

Open Inference Protocol v2: https://github.com/kserve/open-inference-protocol. The tensor given is `images`, UINT8
[N, H, W, 3], RGB as displayed; it is resized, cropped and normalised here, as an uploaded picture is.
Nothing is ever fetched from an address that a client gives.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

import eagleray
from eagleray.config.schema import ServingConfig
from eagleray.errors import DataError, EagleRayError, ServingError, StorageError
from eagleray.serving.router import Answer, BusyError, NotFoundError, Router, RouterState, Target

NAME = "Ingress"
ROUTING_KEY_COOKIE = "routing_key"
MAX_TOP_K = 1000
REQUEST_PICTURES = 4
"""A multipart request or a tensor may hold as many bytes as this many of the largest pictures."""

_PICTURE_FIELD = "image"
_RETRY_AFTER_S = 1

RoutingKey = Annotated[
    str | None, Header(alias="X-Routing-Key", max_length=512, description="Who asks: the same key gets the same variant")
]
VariantOverride = Annotated[
    str | None, Header(alias="X-Variant", description="For testers: this variant, outside of the experiment's figures")
]
TopK = Annotated[int, Query(ge=1, le=MAX_TOP_K, description="How many classes to answer, most probable first")]


class Refusal(Exception):
    """A request that is answered with an error status and its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Feedback(BaseModel):
    """What came of a request: its true label, or an outcome (clicked, accepted, …)."""

    model_config = ConfigDict(extra="forbid")

    request_id: Annotated[str, Field(max_length=1024)]
    label: str | None = None
    outcome: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Feedback:
        if (self.label is None) == (self.outcome is None):
            raise ValueError("give either label or outcome")
        return self


class InferTensor(BaseModel):
    name: Literal["images"]
    shape: tuple[int, int, int, Literal[3]]
    datatype: Literal["UINT8"]
    data: list[Any]


class InferRequest(BaseModel):
    """An inference request of the Open Inference Protocol, JSON tensors."""

    id: str | None = None
    inputs: Annotated[list[InferTensor], Field(min_length=1, max_length=1)]


@serve.deployment(name=NAME)
@serve.ingress()
class Ingress:
    """The replica that clients talk to; `user_config` is a dumped `RouterState`."""

    def __init__(self) -> None:
        self._router = Router()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._router)

    async def reconfigure(self, state: dict[str, Any]) -> None:
        await self._router.reconfigure(RouterState.model_validate(state))

    async def state(self) -> dict[str, Any]:
        return self._router.state.model_dump(mode="json")

    async def report(self, model: str) -> dict[str, Any]:
        return await self._router.report(model)


def build_app(router: Router) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await router.close()

    app = FastAPI(title="eagleray", version=eagleray.__version__, lifespan=lifespan)
    _add_error_handlers(app)
    _add_picture_routes(app, router)
    _add_protocol_routes(app, router)
    return app


# --- Pictures, feedback, experiment -----------------------------------------------------------------------------


def _add_picture_routes(app: FastAPI, router: Router) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.post("/predict/{model}", summary="Classify one or more pictures", openapi_extra=_PREDICT_BODY)
    async def predict(
        request: Request, model: str, top_k: TopK = 5, x_routing_key: RoutingKey = None, x_variant: VariantOverride = None
    ) -> Any:
        pictures = await _read_pictures(request, router.model(model).config)
        key = x_routing_key or request.cookies.get(ROUTING_KEY_COOKIE)
        target = router.target(model, key, variant=x_variant)
        return _picture_answer(await router.classify(target, pictures, top_k))

    @app.post("/feedback", summary="Tell what came of a request")
    async def feedback(body: Feedback) -> dict[str, Any]:
        outcome = await router.feedback(body.request_id, body.label, body.outcome)
        return {"request_id": body.request_id, "outcome": outcome}

    @app.get("/ab/{model}", summary="The experiment's figures")
    async def report(model: str) -> dict[str, Any]:
        return await router.report(model)


def _picture_answer(answer: Answer) -> dict[str, Any]:
    """One picture: `predictions` is a list of classes. Several: a list of those, and an id for the feedback on each."""
    one = len(answer.predictions) == 1
    return {
        "request_id": answer.request_ids[0],
        "model": answer.target.model.experiment.model,
        "version": answer.target.variant.version,
        "variant": answer.target.variant.name,
        "predictions": answer.predictions[0] if one else answer.predictions,
        **({} if one else {"request_ids": answer.request_ids}),
        "latency_ms": round(answer.latency_ms, 2),
    }


async def _read_pictures(request: Request, config: ServingConfig) -> list[bytes]:
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        pictures = await _read_multipart(request, config)
    else:
        pictures = [await _read_body(request, config.max_image_bytes)]
    for index, picture in enumerate(pictures):
        which = "the body" if len(pictures) == 1 else f"picture {index}"
        if not picture:
            raise Refusal(400, f"{which} is empty; send a JPEG, PNG or WebP picture")
        if len(picture) > config.max_image_bytes:
            raise Refusal(413, f"{which} has {len(picture)} bytes, more than the limit of {config.max_image_bytes}")
        if not _is_picture(picture):
            raise Refusal(415, f"{which} is not a JPEG, PNG or WebP picture")
    return pictures


async def _read_multipart(request: Request, config: ServingConfig) -> list[bytes]:
    stream = _limited(request, REQUEST_PICTURES * config.max_image_bytes)
    try:
        form = await MultiPartParser(request.headers, stream, max_files=config.max_batch_size, max_fields=0).parse()
    except MultiPartException as error:
        raise Refusal(
            400, f"{error.message.rstrip('.')}; send up to {config.max_batch_size} files in fields named '{_PICTURE_FIELD}'"
        ) from None
    try:
        fields = sorted({name for name, _ in form.multi_items()})
        uploads = [upload for upload in form.getlist(_PICTURE_FIELD) if isinstance(upload, UploadFile)]
        if fields != [_PICTURE_FIELD] or not uploads:
            raise Refusal(400, f"fields found: {', '.join(fields) or 'none'}; send files in fields named '{_PICTURE_FIELD}'")
        return [await upload.read() for upload in uploads]
    finally:
        await form.close()


async def _read_body(request: Request, limit: int) -> bytes:
    return b"".join([chunk async for chunk in _limited(request, limit)])


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """Yield the body's chunks; refuse it as soon as it is known to be too large."""
    reason = f"the body has more than {limit} bytes, the limit"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise Refusal(413, reason)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise Refusal(413, reason)
        yield chunk


def _is_picture(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


_BINARY = {"type": "string", "format": "binary"}
_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {_PICTURE_FIELD: {"type": "array", "items": _BINARY}},
                    "required": [_PICTURE_FIELD],
                }
            },
        },
    }
}


# --- Open Inference Protocol ------------------------------------------------------------------------------------


def _add_protocol_routes(app: FastAPI, router: Router) -> None:
    @app.get("/v2", summary="Server metadata")
    async def server() -> dict[str, Any]:
        return {"name": "eagleray", "version": eagleray.__version__, "extensions": []}

    @app.get("/v2/health/live", summary="Whether the server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether models are served")
    async def ready() -> JSONResponse:
        is_ready = bool(router.state.models)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/{model}/versions/{version}/ready", summary="Whether a version is served")
    @app.get("/v2/models/{model}/ready", summary="Whether a model is served")
    async def model_ready(model: str, version: int | None = None) -> dict[str, Any]:
        router.target(model, None, version=version)
        return {"name": model, "ready": True}

    @app.get("/v2/models/{model}/versions/{version}", summary="Version metadata")
    @app.get("/v2/models/{model}", summary="Model metadata")
    async def model_metadata(model: str, version: int | None = None) -> dict[str, Any]:
        spec = router.model(model)
        backend = router.target(model, None, version=version).backend.spec
        return {
            "name": model,
            "versions": sorted({str(other.version) for other in spec.backends.values()}),
            "platform": "pytorch",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
            "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, len(backend.classes)]}],
            "parameters": {"classes": backend.classes, "weights_sha256": backend.weights_sha256, "image_size": backend.image_size},
        }

    @app.post("/v2/models/{model}/versions/{version}/infer", summary="Infer with a version", openapi_extra=_INFER_BODY)
    @app.post("/v2/models/{model}/infer", summary="Infer", openapi_extra=_INFER_BODY)
    async def infer(
        request: Request, model: str, version: int | None = None, x_routing_key: RoutingKey = None, x_variant: VariantOverride = None
    ) -> dict[str, Any]:
        config = router.model(model).config
        asked, pixels = _parse_infer(await _read_body(request, REQUEST_PICTURES * config.max_image_bytes), config)
        key = x_routing_key or request.cookies.get(ROUTING_KEY_COOKIE)
        target = router.target(model, key, variant=x_variant, version=version)
        answer, probabilities = await router.classify_pixels(target, pixels)
        return _infer_answer(asked, target, answer, probabilities)


def _parse_infer(body: bytes, config: ServingConfig) -> tuple[InferRequest, np.ndarray]:
    try:
        asked = InferRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(400, f"not an inference request: {_first_problem(error.errors())}") from None
    tensor = asked.inputs[0]
    count, height, width, _ = tensor.shape
    if not (0 < count <= config.max_batch_size and min(height, width) > 0 and height * width <= config.max_image_pixels):
        raise Refusal(
            422,
            f"inputs.0.shape {list(tensor.shape)}: up to {config.max_batch_size} pictures of up to {config.max_image_pixels} pixels each",
        )
    try:
        values = np.asarray(tensor.data, dtype=np.int64)
        if values.size and (values.min() < 0 or values.max() > 255):
            raise ValueError("UINT8 values go from 0 to 255")
        return asked, values.astype(np.uint8).reshape(tensor.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refusal(422, f"inputs.0.data does not fit datatype UINT8 and shape {list(tensor.shape)}: {error}") from None


def _infer_answer(asked: InferRequest, target: Target, answer: Answer, probabilities: np.ndarray) -> dict[str, Any]:
    return {
        "model_name": target.model.experiment.model,
        "model_version": str(target.variant.version),
        "id": asked.id or answer.request_ids[0],
        "parameters": {"variant": target.variant.name, "request_ids": answer.request_ids},
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": list(probabilities.shape),
                "data": [round(float(p), 7) for p in probabilities.ravel()],
            }
        ],
    }


_INFER_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": InferRequest.model_json_schema()}}}}


# --- Errors -----------------------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is JSON: `{"error": reason}`, as the Open Inference Protocol has it."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return _error(error.status, error.reason)

    @app.exception_handler(EagleRayError)
    async def failed(_: Request, error: EagleRayError) -> JSONResponse:
        is_temporary = isinstance(error, BusyError | StorageError)
        status = {NotFoundError: 404, DataError: 422, ServingError: 422, BusyError: 503, StorageError: 503}.get(type(error), 500)
        return _error(status, str(error), {"Retry-After": str(_RETRY_AFTER_S)} if is_temporary else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, _first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return _error(500, f"internal error ({type(error).__name__}); the server's log says more")


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers=headers)


def _first_problem(problems: Any) -> str:
    problem = problems[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header"))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
