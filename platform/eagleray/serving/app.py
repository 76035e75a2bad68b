"""The HTTP face: plain picture upload, feedback, the experiment's figures, and the Open Inference Protocol v2.

Whatever way a picture comes, it is resized, cropped and normalised here. Nothing is ever fetched from an address that a
client gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.staticfiles import StaticFiles

import eagleray
from eagleray.config.schema import ServingConfig
from eagleray.errors import EagleRayError
from eagleray.serving import protocol
from eagleray.serving.access import KEY, AccessControl, Keyring
from eagleray.serving.experiment import Experiment
from eagleray.serving.limits import REQUEST_PICTURES, Refusal, body_chunks, check_picture, read_body
from eagleray.serving.protocol import first_problem
from eagleray.serving.router import Answer, Router, RouterState, status_of
from eagleray.serving.rpc import InferenceService

NAME = "Ingress"
ROUTING_KEY_COOKIE = "routing_key"
MAX_TOP_K = 1000

_PICTURE_FIELD = "image"
_RETRY_AFTER_S = 1
_FEEDBACK_BYTES = 65_536
_FEEDBACK_UPLOAD_S = 20.0

RoutingKey = Annotated[
    str | None, Header(alias="X-Routing-Key", max_length=512, description="Who asks: the same key gets the same variant")
]
VariantOverride = Annotated[
    str | None, Header(alias="X-Variant", description="For testers: this variant, outside of the experiment's figures")
]
Covariate = Annotated[
    float | None,
    Header(alias="X-Covariate", allow_inf_nan=False, description="A number known of the user before the experiment; sharpens its figures"),
]
TimeoutMs = Annotated[int | None, Header(alias="X-Timeout-Ms", ge=1, description="An answer that takes longer is of no use: 504")]
TopK = Annotated[int, Query(ge=1, le=MAX_TOP_K, description="How many classes to answer, most probable first")]


PAGE = Path(__file__).parent / "page"

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Feedback(BaseModel):
    """What came of a request: its true label, an outcome (clicked, accepted, …), or a number (minutes watched, sales, …)."""

    model_config = ConfigDict(extra="forbid")

    request_id: Annotated[str, Field(max_length=1024)]
    label: str | None = None
    outcome: bool | None = None
    value: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Feedback:
        if [self.label, self.outcome, self.value].count(None) != 2:
            raise ValueError("give either label or outcome or value")
        return self


@serve.deployment(name=NAME)
@serve.ingress()
class Ingress(InferenceService):
    """The replica that clients talk to; `user_config` is a dumped `RouterState`."""

    def __init__(self) -> None:
        self._router = Router()
        self._keyring = Keyring()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._router, self._keyring)

    async def reconfigure(self, state: dict[str, Any]) -> None:
        new = RouterState.model_validate(state)
        await self._keyring.use(new.keys_uri)
        await self._router.reconfigure(new)

    async def drain(self) -> None:
        await self._router.drain()

    async def state(self) -> dict[str, Any]:
        return self._router.state.model_dump(mode="json")

    async def report(self, model: str) -> dict[str, Any]:
        return await self._router.report(model)


def build_app(router: Router, keyring: Keyring) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        keyring.close()
        await router.close()

    app = FastAPI(title="eagleray", version=eagleray.__version__, lifespan=lifespan)
    app.add_middleware(AccessControl, keyring=keyring, refuse=_refused)
    _add_error_handlers(app)
    _add_page(app)
    _add_picture_routes(app, router)
    _add_explain_route(app, router)
    _add_protocol_routes(app, router)
    return app


# --- Page -------------------------------------------------------------------------------------------------------


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


def _add_page(app: FastAPI) -> None:
    files = _PageFiles(directory=PAGE)
    app.mount("/page", files)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)


# --- Pictures, feedback, experiment -----------------------------------------------------------------------------


def _add_picture_routes(app: FastAPI, router: Router) -> None:
    @app.post("/predict/{model}", summary="Classify one or more pictures", openapi_extra=_PREDICT_BODY)
    async def predict(
        request: Request,
        model: str,
        top_k: TopK = 5,
        x_routing_key: RoutingKey = None,
        x_variant: VariantOverride = None,
        x_covariate: Covariate = None,
        x_timeout_ms: TimeoutMs = None,
    ) -> Any:
        config = router.model(model).config
        seconds = _time(config, x_timeout_ms)
        until = _now() + seconds
        pictures = await _read_pictures(request, config, seconds)
        key = x_routing_key or request.cookies.get(ROUTING_KEY_COOKIE)
        target = router.target(model, key, variant=x_variant, covariate=x_covariate, until=until)
        return _picture_answer(await router.classify(target, pictures, top_k))

    @app.post("/feedback", summary="Tell what came of a request", openapi_extra=_json_body(Feedback))
    async def feedback(request: Request) -> dict[str, Any]:
        try:
            body = Feedback.model_validate_json(await read_body(request, _FEEDBACK_BYTES, _FEEDBACK_UPLOAD_S))
        except ValidationError as error:
            raise Refusal(422, first_problem(error.errors())) from None
        value = await router.feedback(body.request_id, body.label, body.value if body.outcome is None else float(body.outcome))
        return {"request_id": body.request_id, **({"outcome": bool(value)} if body.value is None else {"value": value})}

    @app.get("/models", summary="What is served")
    async def models() -> dict[str, Any]:
        return {
            "models": [
                {"name": name, "variants": {variant: backend.version for variant, backend in spec.backends.items()}}
                for name, spec in router.state.models.items()
            ]
        }

    @app.get("/ab/{model}", summary="The experiment's figures")
    async def report(model: str) -> dict[str, Any]:
        return await router.report(model)

    @app.post("/ab/{model}/promote", summary="End the experiment: a variant gets all traffic")
    async def promote(request: Request, model: str, variant: str | None = None) -> dict[str, Any]:
        return _ended(await router.decide(model, "promote", variant, _decider(request)))

    @app.post("/ab/{model}/abort", summary="End the experiment: the control gets all traffic back")
    async def abort(request: Request, model: str) -> dict[str, Any]:
        return _ended(await router.decide(model, "abort", None, _decider(request)))


def _decider(request: Request) -> str:
    """Return whose key it is; without one, any page that a browser is on could decide (the path asks for the role admin)."""
    key = request.scope[KEY]
    if key is None:
        raise Refusal(403, "a decision over HTTP needs an API key with the role admin; deploy with --keys, or use `eagleray ab`")
    return f"key {key.name}"


def _ended(experiment: Experiment) -> dict[str, Any]:
    return {"experiment": experiment.id, "status": experiment.status, "winner": experiment.winner}


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


def _add_explain_route(app: FastAPI, router: Router) -> None:
    @app.post(
        "/explain/{model}",
        summary="Show what spoke for a class in a picture",
        description="A PNG where `Accept` asks for `image/png`, else the heat map as JSON. Never counted in the experiment.",
        openapi_extra=_PREDICT_BODY,
    )
    async def explain(
        request: Request,
        model: str,
        label: Annotated[str | None, Query(description="The class; the most probable one where none is given")] = None,
        x_routing_key: RoutingKey = None,
        x_variant: VariantOverride = None,
        x_timeout_ms: TimeoutMs = None,
    ) -> Any:
        config = router.model(model).config
        seconds = _time(config, x_timeout_ms)
        until = _now() + seconds
        pictures = await _read_pictures(request, config, seconds)
        if len(pictures) > 1:
            raise Refusal(400, f"{len(pictures)} pictures; send one at a time to be explained")
        target = router.target(model, x_routing_key or request.cookies.get(ROUTING_KEY_COOKIE), variant=x_variant, until=until)
        as_png = "image/png" in request.headers.get("accept", "")
        explained = await router.explain(target, pictures[0], label, as_png)
        prediction, variant = explained["prediction"], target.variant
        assert prediction is not None and explained["square"] is not None
        if explained["png"] is not None:
            headers = {
                "X-Variant": variant.name,
                "X-Version": str(variant.version),
                "X-Label": quote(prediction["label"]),
                "X-Probability": f"{prediction['probability']:.6f}",
            }
            return Response(explained["png"], media_type="image/png", headers=headers)
        return {
            "model": model,
            "version": variant.version,
            "variant": variant.name,
            **prediction,
            "heat_map": explained["heat_map"],
            "square": dict(zip(("left", "top", "side"), explained["square"], strict=True)),
        }


def _now() -> float:
    return asyncio.get_running_loop().time()


def _time(config: ServingConfig, timeout_ms: int | None) -> float:
    """Return the seconds that a request has."""
    return config.request_timeout_s if timeout_ms is None else min(config.request_timeout_s, timeout_ms / 1000)


async def _read_pictures(request: Request, config: ServingConfig, timeout_s: float) -> list[bytes]:
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        pictures = await _read_multipart(request, config, timeout_s)
    else:
        pictures = [await read_body(request, config.max_image_bytes, min(timeout_s, config.upload_timeout_s))]
    for index, picture in enumerate(pictures):
        check_picture(picture, "the body" if len(pictures) == 1 else f"picture {index}", config)
    return pictures


async def _read_multipart(request: Request, config: ServingConfig, timeout_s: float) -> list[bytes]:
    stream = body_chunks(request, REQUEST_PICTURES * config.max_image_bytes, min(timeout_s, config.upload_timeout_s))
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


def _json_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


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
        return {"name": "eagleray", "version": eagleray.__version__, "extensions": protocol.EXTENSIONS}

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
        return router.metadata(model, version)

    @app.post("/v2/models/{model}/versions/{version}/infer", summary="Infer with a version", openapi_extra=_INFER_BODY)
    @app.post("/v2/models/{model}/infer", summary="Infer", openapi_extra=_INFER_BODY)
    async def infer(
        request: Request,
        model: str,
        version: int | None = None,
        x_routing_key: RoutingKey = None,
        x_variant: VariantOverride = None,
        x_covariate: Covariate = None,
        x_timeout_ms: TimeoutMs = None,
    ) -> Response:
        config = router.model(model).config
        begun, seconds = _now(), _time(config, x_timeout_ms)
        asked = await _read_infer(request, config, seconds)
        until = begun + min(seconds, asked.timeout_s or seconds)
        key = x_routing_key or request.cookies.get(ROUTING_KEY_COOKIE)
        target = router.target(model, key, variant=x_variant, version=version, covariate=x_covariate, until=until)
        return _infer_response(*protocol.build_answer(asked, await router.infer(target, asked)))


async def _read_infer(request: Request, config: ServingConfig, timeout_s: float) -> protocol.Asked:
    json_size = protocol.header_length(request.headers.get(protocol.HEADER_LENGTH))
    if json_size is not None and json_size > config.max_json_bytes:
        raise Refusal(413, f"{protocol.HEADER_LENGTH} {json_size}: more than {config.max_json_bytes} bytes of JSON, the limit")
    if json_size is None:
        limit, remedy = config.max_json_bytes, f"; send tensors as binary data ({protocol.HEADER_LENGTH})"
    else:
        limit, remedy = json_size + REQUEST_PICTURES * config.max_image_bytes, ""
    return protocol.parse_request(await read_body(request, limit, min(timeout_s, config.upload_timeout_s), remedy), json_size, config)


def _infer_response(body: bytes, json_size: int | None) -> Response:
    if json_size is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={protocol.HEADER_LENGTH: str(json_size)})


_INFER_BODY = _json_body(protocol.InferRequest)
_INFER_BODY["requestBody"]["content"]["application/octet-stream"] = {"schema": _BINARY}


# --- Errors -----------------------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is JSON: `{"error": reason}`, as the Open Inference Protocol has it."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return _refused(error)

    @app.exception_handler(EagleRayError)
    async def failed(_: Request, error: EagleRayError) -> JSONResponse:
        status = status_of(error)
        return _error(status, str(error), {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return _error(500, f"internal error ({type(error).__name__}); the server's log says more")


def _refused(refusal: Refusal) -> JSONResponse:
    return _error(refusal.status, refusal.reason, refusal.headers)


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers=headers)
