"""The region over HTTP.

Two doors. The inference paths (`POST /predict`, `POST /v2/models/.../infer`) are answered by a small ASGI front of our
own: for a model of 5 us the framework's routing and validation would be most of the cost (26,000 requests/s against
7,500 on two cores). Everything else, and the OpenAPI document of all, is FastAPI.

Here, and only here, our errors become HTTP statuses: `STATUS_OF`. Every refusal is `{"error": "one line"}`, as the Open
Inference Protocol demands. Health follows its words: live never depends on models, ready means that the region wants
traffic (nothing is ready before the first plan was heard, nor while draining).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from model_delta.errors import AtollError, Malformed, Unavailable, Untrusted
from model_delta.plan import RolloutPlan
from monitoring.metrics import CONTENT_TYPE
from regional_gateway.pool import Version
from regional_gateway.protocol import (
    BINARY_EXTENSION,
    INFER_BODY_BYTES_MAX,
    PREDICT_BODY_BYTES_MAX,
    NotReady,
    PredictRequest,
    PredictResponse,
    TooMany,
    TooMuch,
    TooSlow,
    Unauthorized,
    UnknownModel,
    datatype_of,
)
from regional_gateway.routing import VERSION_PREFIX_MIN, wanted
from regional_gateway.serving import Asker, Gateway, infer, plan_of, predict

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = tuple[bytes, int | None]
"""A body, and its Inference-Header-Content-Length when it is binary."""

STATUS_OF: tuple[tuple[type[AtollError], int], ...] = (
    (Unauthorized, 401),
    (UnknownModel, 404),
    (TooSlow, 408),
    (TooMuch, 413),
    (Malformed, 400),
    (TooMany, 429),
    (Unavailable, 503),  # NotReady among them
    (Untrusted, 503),  # the region cannot vouch for the version that it should run: not the client's fault
    (AtollError, 500),  # ModelFault
)
"""The first line whose kind fits decides."""

BODY_SECONDS_MAX = 10.0
RETRY_AFTER_SECONDS = 1
JSON = b"application/json"
BINARY = b"application/octet-stream"
HEADER_LENGTH = b"inference-header-content-length"
_INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class Disconnected(Exception):
    """The client left before its request was complete; there is nobody to answer."""


def create_app(gateway: Gateway, *, server_version: str) -> App:
    """The region's ASGI application. It owns no task and no socket: `Supply.run` and `Mirror.run` run beside it."""
    return _Front(gateway, _control(gateway, server_version))


class _Front:
    """Answers the inference paths; hands everything else to `control`."""

    def __init__(self, gateway: Gateway, control: App) -> None:
        self._gateway, self._control = gateway, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            if path == "/predict":
                return await self._timed("predict", send, lambda: self._predict(scope, receive))
            match = _INFER_PATH.fullmatch(path)
            if match:
                model, version = match.groups(default="")
                return await self._timed("infer", send, lambda: self._infer(scope, receive, model, version))
        return await self._control(scope, receive, send)

    async def _predict(self, scope: Scope, receive: Receive) -> Answer:
        headers = dict(scope["headers"])
        body = await _body(headers, receive, PREDICT_BODY_BYTES_MAX)
        return msgspec.json.encode(await predict(self._gateway, _asker(headers), body)), None

    async def _infer(self, scope: Scope, receive: Receive, model: str, version: str) -> Answer:
        headers = dict(scope["headers"])
        body = await _body(headers, receive, INFER_BODY_BYTES_MAX)
        length = headers.get(HEADER_LENGTH)
        header_length = None if length is None else _number(length, "Inference-Header-Content-Length")
        return await infer(self._gateway, _asker(headers), model, version, body, header_length)

    async def _timed(self, route: str, send: Send, answer: Callable[[], Awaitable[Answer]]) -> None:
        gateway = self._gateway
        started = gateway.timer()
        status, body, header_length, retry_after = 200, b"", None, 0.0
        try:
            with gateway.flight():
                body, header_length = await answer()
        except Disconnected:
            gateway.meters.requests.add(1, route, "gone")
            return
        except Exception as error:  # the front is the outermost layer: a bug too is answered, and logged
            status, body, retry_after = _refusal(error)
        headers = [(b"content-type", JSON if header_length is None else BINARY)]
        if header_length is not None:
            headers.append((HEADER_LENGTH, b"%d" % header_length))
        headers.extend(_refusal_headers(status, retry_after))
        if gateway.draining:
            headers.append((b"connection", b"close"))
        headers.append((b"content-length", b"%d" % len(body)))
        gateway.meters.requests.add(1, route, str(status))
        gateway.meters.seconds.observe(gateway.timer() - started, route)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _control(gateway: Gateway, server_version: str) -> FastAPI:
    """Metadata, health, metrics and the OpenAPI document."""
    # The stock documentation pages load scripts from a public network; /openapi.json is there for any viewer.
    app = FastAPI(title="Atoll regional gateway", version=server_version, docs_url=None, redoc_url=None)

    @app.get("/healthz", summary="Whether the process answers (Knative, Kubernetes).")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "region": gateway.region}

    @app.get("/metrics", summary="Prometheus metrics.")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @app.get("/v2", summary="Server metadata.")
    async def server() -> dict[str, Any]:
        return {"name": "atoll", "version": server_version, "extensions": [BINARY_EXTENSION]}

    @app.get("/v2/health/live", summary="Whether the server takes requests.")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether every model is ready and the region is not leaving.")
    async def ready() -> Response:
        return _json({"ready": gateway.ready()}, 200 if gateway.ready() else 503)

    @app.get("/v2/models", summary="The tenant's models.")
    async def models(request: Request) -> list[dict[str, Any]]:
        tenant = gateway.tenants.of(_asker_of(request).authorization)
        return [_outline(gateway, plan) for plan in gateway.versions.plans(tenant.name)]

    @app.get("/v2/models/{model}", summary="Model metadata, of the version that answers callers without a device.")
    @app.get("/v2/models/{model}/versions/{version}", summary="Model metadata of one version.")
    async def metadata(request: Request, model: str, version: str = "") -> dict[str, Any]:
        loaded, plan = await _version(gateway, _asker_of(request), model, version)
        return {
            "name": model,
            "versions": [
                known.name if (known := gateway.versions.pool.get(digest)) else digest[:VERSION_PREFIX_MIN]
                for digest in wanted(plan)
            ],
            "platform": "onnx_onnxv1",
            "inputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in loaded.manifest.inputs],
            "outputs": [_tensor(spec.name, spec.dtype, spec.shape) for spec in loaded.manifest.outputs],
        }

    @app.get("/v2/models/{model}/ready", summary="Whether the model is in memory.")
    @app.get("/v2/models/{model}/versions/{version}/ready", summary="Whether the version is in memory.")
    async def model_ready(request: Request, model: str, version: str = "") -> Response:
        plan, digest = _digest(gateway, _asker_of(request), model, version)
        there = gateway.versions.pool.get(digest) is not None
        return _json({"name": plan.model, "ready": there}, 200 if there else 503)

    async def refuse(request: Request, error: Exception) -> Response:
        status, body, retry_after = _refusal(error)
        headers = {name.decode(): value.decode() for name, value in _refusal_headers(status, retry_after)}
        return Response(body, status, headers, media_type="application/json")

    for kind in (AtollError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, refuse)

    stock_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_inference(stock_openapi())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def _refusal(error: Exception) -> tuple[int, bytes, float]:
    """Status, body and seconds until a retry makes sense (0: never said)."""
    retry_after = 0.0
    if isinstance(error, AtollError):
        status = next(status for kind, status in STATUS_OF if isinstance(error, kind))
        message = str(error)
        if status in (429, 503):
            retry_after = error.retry_after_seconds if isinstance(error, NotReady) else float(RETRY_AFTER_SECONDS)
        if status == 500:
            log.error("%s", message, exc_info=error.__cause__)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, f"expected a route of /openapi.json, found: {error.detail}"
    elif isinstance(error, RequestValidationError):
        status, message = 400, "; ".join(str(fault.get("msg", "")) for fault in error.errors())
    else:
        status, message = 500, f"internal error: {type(error).__name__}"
        log.error("request failed", exc_info=error)
    return status, msgspec.json.encode({"error": message}), retry_after


def _refusal_headers(status: int, retry_after: float) -> list[tuple[bytes, bytes]]:
    headers = []
    if retry_after:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after))))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        # The rest of the body was not read, so the connection cannot carry another request.
        headers.append((b"connection", b"close"))
    return headers


async def _body(headers: dict[bytes, bytes], receive: Receive, size_max: int) -> bytes:
    """The request's body. Raises Malformed, TooMuch (by its declared length, before reading), TooSlow, Disconnected."""
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise Malformed(
            f"Content-Encoding: expected none, found {encoding[:32].decode('latin-1')!r}; send the body plain"
        )
    declared = _number(headers.get(b"content-length", b"0"), "Content-Length")
    if declared > size_max:
        raise TooMuch(f"body: expected at most {size_max} bytes, found Content-Length {declared}")
    message = await _next(receive)
    if not message.get("more_body"):
        whole: bytes = message.get("body", b"")
        if len(whole) > size_max:
            raise TooMuch(f"body: expected at most {size_max} bytes, found {len(whole)}")
        return whole
    parts = bytearray(message.get("body", b""))
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            while message.get("more_body"):
                message = await _next(receive)
                parts += message.get("body", b"")
                if len(parts) > size_max:
                    raise TooMuch(f"body: expected at most {size_max} bytes, found more")
    except TimeoutError:
        raise TooSlow(f"body: expected all of it within {BODY_SECONDS_MAX:g} s, found {len(parts)} bytes") from None
    return bytes(parts)


async def _next(receive: Receive) -> Message:
    message = await receive()
    if message["type"] != "http.request":
        raise Disconnected
    return message


def _number(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 12:
        raise Malformed(f"{what}: expected a number of bytes, found {text[:32].decode('latin-1')!r}")
    return int(text)


def _asker(headers: dict[bytes, bytes]) -> Asker:
    return Asker(
        headers.get(b"authorization", b"").decode("latin-1"),
        headers.get(b"x-atoll-device", b"").decode("latin-1"),
        headers.get(b"x-atoll-device-class", b"").decode("latin-1"),
    )


def _asker_of(request: Request) -> Asker:
    return _asker(dict(request.headers.raw))


def _digest(gateway: Gateway, asker: Asker, model: str, asked: str) -> tuple[RolloutPlan, str]:
    """The plan, and the manifest digest that `asked` means ("": the version for callers without a device)."""
    plan = plan_of(gateway, gateway.tenants.of(asker.authorization), model)
    short = asked.rpartition("@")[2]
    matches = [digest for digest in wanted(plan) if digest.startswith(short)]
    if not matches or 0 < len(short) < VERSION_PREFIX_MIN:
        raise UnknownModel(f"model {model}: no version {asked[:64]!r} in force")
    return plan, matches[0]


async def _version(gateway: Gateway, asker: Asker, model: str, asked: str) -> tuple[Version, RolloutPlan]:
    plan, digest = _digest(gateway, asker, model, asked)
    return await gateway.versions.pool.ready(digest, gateway.wait_seconds_max), plan


def _outline(gateway: Gateway, plan: RolloutPlan) -> dict[str, Any]:
    return {
        "name": plan.model,
        "versions": [digest[:VERSION_PREFIX_MIN] for digest in wanted(plan)],
        "ready": all(gateway.versions.pool.get(digest) is not None for digest in wanted(plan)),
        "plan": {"name": plan.name, "serial": plan.serial, "stage": plan.stage},
    }


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(dtype), "shape": list(shape)}


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _with_inference(document: dict[str, Any]) -> dict[str, Any]:
    """Add the paths of the front to the OpenAPI document."""
    (request, response), components = msgspec.json.schema_components(
        (PredictRequest, PredictResponse), ref_template="#/components/schemas/{name}"
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    refusals: dict[str, Any] = {
        str(status): {"description": "Refused.", "content": {"application/json": {"schema": error}}}
        for status in sorted({status for _, status in STATUS_OF})
    }
    tenant: dict[str, Any] = {"security": [{"tenant": []}]}
    document["components"]["securitySchemes"] = {"tenant": {"type": "http", "scheme": "bearer"}}
    document["paths"]["/predict"] = {
        "post": {
            "summary": "Score one payment of named features.",
            "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
            "responses": {
                "200": {"description": "The decision.", "content": {"application/json": {"schema": response}}},
                **refusals,
            },
            **tenant,
        }
    }
    infer_path: dict[str, Any] = {
        "summary": "Open Inference Protocol v2 inference; JSON, or JSON and binary tensors.",
        "requestBody": {"required": True, "content": {"application/json": {}, "application/octet-stream": {}}},
        "responses": {"200": {"description": "The outputs."}, **refusals},
        **tenant,
    }
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        names = re.findall(r"{(\w+)}", path)
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        document["paths"][path] = {"post": {**infer_path, "parameters": parameters}}
    return document
