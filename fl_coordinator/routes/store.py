"""The artifact store over HTTP: what a region fetches, what an operator puts there, and cleaning it."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.requests import REPLY_BYTES_MAX, body_of, object_of
from model_delta.digest import require_digest, require_match
from model_delta.errors import Malformed, NotFound

_STORE_KINDS = frozenset({"manifest", "delivery", "blob", "artifact", "tuf"})


class StoreRoutes:
    """Stored objects by kind and name."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/store/{kind}/{name}", guard(self._stored, "gateway"), methods=["GET"]),
            Route("/v1/store/artifact/{name}", guard(self._store_artifact), methods=["PUT"]),
            Route("/v1/store/clean", guard(self._clean_store), methods=["POST"]),
        ]

    async def _stored(self, request: Request) -> Response:
        kind, name = request.path_params["kind"], request.path_params["name"]
        if kind not in _STORE_KINDS:
            raise NotFound(f"store: expected a kind of {', '.join(sorted(_STORE_KINDS))}, found {kind[:32]!r}")
        if kind != "tuf":  # whose files are named by role and version
            require_digest(name, f"{kind} name")
        data = await asyncio.to_thread(self._coordinator.store.get, kind, name)
        return Response(data, media_type="application/octet-stream")

    async def _store_artifact(self, request: Request) -> Response:
        name = require_digest(request.path_params["name"], "artifact name")
        data = await body_of(request, REPLY_BYTES_MAX)
        require_match(data, name, "artifact")
        await asyncio.to_thread(self._coordinator.store.put, "artifact", name, data)
        return JSONResponse({"name": name, "size": len(data)})

    async def _clean_store(self, request: Request) -> Response:
        dry_run = (await object_of(request)).get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise Malformed(f"clean: dry_run: expected true or false, found {dry_run!r}")
        cleaned = await asyncio.to_thread(self._coordinator.clean_store, dry_run=dry_run)
        return JSONResponse(msgspec.to_builtins(cleaned))
