"""The coordinator's HTTP control API: what there is to call, by whom, in which form.

    GET  /v1/health   /v1/state   /v1/events (server-sent events, twice a second)   /metrics   /
    POST /v1/models?model=&name=&parent=&threshold=&baseline=&feature_set=&created=&valid_days=   body: ONNX bytes
    POST /v1/releases/join   body: JSON model, name
    GET  /v1/releases   /v1/releases/{digest}   /v1/releases/{digest}/source   /v1/releases/{digest}/outcomes
    POST /v1/releases/{digest}/shred              GET /v1/keys       POST /v1/keys/rotate   body: JSON forget
    POST /v1/rollouts?target=&file=   body: YAML  GET /v1/rollouts   /v1/rollouts/{name}   POST .../{name}/abort
    POST /v1/rounds   body: JSON RoundSpec        GET /v1/rounds     /v1/rounds/{id}       POST .../{id}/abort
    GET  /v1/rounds/{id}/announcement             signed, of a round that has not ended
    GET  /v1/rounds/{id}/attempt?aggregator=&wait=   what an aggregator stands by for, long poll; see `standing`
    GET  /v1/rounds/{id}/contributions/{digest}   one of the frozen contributions
    GET  /v1/rounds/{id}/transcript               canonical CBOR; see `transcript`
    POST /v1/relays/{region}/ends?wait=           body: JSON RelayQuestion; which rounds are over, long poll
    GET  /v1/log?from=&wait=                      the updates log from an offset on, long poll; see `updates_log`
    POST /v1/enroll   /v1/aggregators   /v1/notes   /v1/identities/{name}/revoke
    GET  /v1/revoked
    GET  /v1/store/{kind}/{name}   PUT /v1/store/artifact/{digest}   POST /v1/store/clean   body: JSON dry_run
    GET  /v1/flower/commands?wait=&holds=&rests=  POST /v1/flower/replies

Every call carries `Authorization: Bearer TOKEN`, with a token per role; a role may call only what is listed beside the
route. The page, its event stream, the metrics and the health check need none on the loopback interface (see
`routes/access.py`). Bodies are bounded per route and read no further than the bound. Refusals are `{"error": "..."}`.
Each subject has its routes in a file of `routes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.identities import IdentityRoutes
from fl_coordinator.routes.requests import REPLY_BYTES_MAX, body_of, decoded, encoded, number_in, object_of, text_in
from fl_coordinator.routes.rollouts import RolloutRoutes
from fl_coordinator.routes.rounds import RoundRoutes
from fl_coordinator.routes.store import StoreRoutes
from fl_coordinator.routes.versions import VersionRoutes
from model_delta.errors import Unavailable
from monitoring.metrics import CONTENT_TYPE

EVENT_SECONDS = 0.5
VIEWERS_MAX = 500
WAIT_SECONDS_MAX = 30.0
HOLDS_CHARS_MAX = 32_768
"""As many ids as commands may wait (`flower_bridge.PENDING_MAX`)."""


class FlowerQueue(Protocol):
    """The half of `FlowerBridge` that the ServerApp talks to."""

    async def next_command(
        self, wait_s: float, holds: Collection[str] = (), rests: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """The oldest command without an answer that is none of `holds`, or that is due though it is one of `rests`; or
        None after `wait_s` seconds."""

    def reply(self, body: Any) -> dict[str, bool]:
        """Take an answer; whether it is still wanted."""


def control_app(
    coordinator: Coordinator,
    *,
    tokens: Mapping[str, str],
    flower: FlowerQueue,
    pages: list[BaseRoute] | None = None,
) -> Starlette:
    """The ASGI application. `tokens` maps a role (admin, gateway, aggregator, flower, join) to its bearer token;
    `pages` are the live page's routes."""
    access = Access(tokens)
    subjects = (VersionRoutes, StoreRoutes, RolloutRoutes, RoundRoutes, IdentityRoutes)
    told = [route for subject in subjects for route in subject(coordinator, access).routes()]
    return Starlette(routes=[*_Happenings(coordinator, access, flower).routes(), *told, *(pages or [])])


class _Happenings:
    """What happens now, for people and monitors, and the queue that the Flower ServerApp reads."""

    def __init__(self, coordinator: Coordinator, access: Access, flower: FlowerQueue) -> None:
        self._coordinator = coordinator
        self._access = access
        self._flower = flower
        self._viewers = 0

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/health", guard(self._health, loopback=True)),
            Route("/v1/state", guard(self._state, "gateway", "aggregator", loopback=True)),
            Route("/v1/events", guard(self._events, loopback=True)),
            Route("/metrics", guard(self._metrics, loopback=True)),
            Route("/v1/notes", guard(self._note), methods=["POST"]),
            Route("/v1/flower/commands", guard(self._flower_command, "flower")),
            Route("/v1/flower/replies", guard(self._flower_reply, "flower"), methods=["POST"]),
        ]

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _state(self, request: Request) -> Response:
        return encoded(await asyncio.to_thread(self._coordinator.snapshot))

    async def _events(self, request: Request) -> Response:
        if self._viewers >= VIEWERS_MAX:
            raise Unavailable(f"events: {VIEWERS_MAX} viewers are connected; try again later")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(request), media_type="text/event-stream", headers=headers)

    async def _stream(self, request: Request) -> AsyncIterator[bytes]:
        """The snapshot, twice a second, until the viewer leaves."""
        self._viewers += 1
        try:
            while not await request.is_disconnected():
                snapshot = await asyncio.to_thread(self._coordinator.snapshot)
                yield b"data: " + msgspec.json.encode(snapshot) + b"\n\n"
                await asyncio.sleep(EVENT_SECONDS)
        finally:
            self._viewers -= 1

    async def _metrics(self, request: Request) -> Response:
        return Response(self._coordinator.metrics.render(), media_type=CONTENT_TYPE)

    async def _note(self, request: Request) -> Response:
        body = await object_of(request)
        await asyncio.to_thread(self._coordinator.note, text_in(body, "kind", "info"), text_in(body, "text"))
        return JSONResponse({})

    async def _flower_command(self, request: Request) -> Response:
        wait = number_in(request.query_params.get("wait", "0"), "wait", 0.0, 3600.0)
        holds, rests = (request.query_params.get(name, "")[:HOLDS_CHARS_MAX].split(",") for name in ("holds", "rests"))
        command = await self._flower.next_command(min(wait, WAIT_SECONDS_MAX), holds, rests)
        return Response(status_code=204) if command is None else JSONResponse(command)

    async def _flower_reply(self, request: Request) -> Response:
        data = await body_of(request, REPLY_BYTES_MAX)
        return JSONResponse(self._flower.reply(decoded(data)))
