"""Versions over HTTP: publish, join, look at, shred; and the keys that wrap theirs."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.forms import asked
from fl_coordinator.published import MODEL_BYTES_MAX
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.requests import body_of, number_in, object_of, text_in
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.digest import require_digest
from model_delta.errors import Malformed
from model_delta.keys.wrapping import KeyVersions
from model_delta.version import show


class VersionRoutes:
    """Releases and the keys over them."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/models", guard(self._publish), methods=["POST"]),
            Route("/v1/releases", guard(self._releases, "gateway")),
            Route("/v1/releases/join", guard(self._join), methods=["POST"]),
            Route("/v1/releases/{digest}", guard(self._release, "gateway")),
            Route("/v1/releases/{digest}/source", guard(self._source)),
            Route("/v1/releases/{digest}/outcomes", guard(self._outcomes)),
            Route("/v1/releases/{digest}/shred", guard(self._shred), methods=["POST"]),
            Route("/v1/keys", guard(self._keys)),
            Route("/v1/keys/rotate", guard(self._rotate), methods=["POST"]),
        ]

    async def _publish(self, request: Request) -> Response:
        query = request.query_params
        model = query.get("model", "")
        if not model:
            raise Malformed("publish: expected the query parameter model, found none")
        options: dict[str, Any] = {"model": model, "name": query.get("name", "")[:128]}
        options.update({key: query[key] for key in ("parent", "baseline", "feature_set", "provenance") if key in query})
        if "quantize" in query:
            options["quantize"] = asked(query["quantize"])
        if "threshold" in query:
            options["decision_threshold"] = number_in(query["threshold"], "threshold", 0.0, 1.0)
        if "latency_ms_max" in query:
            options["latency_ms_max"] = number_in(query["latency_ms_max"], "latency_ms_max", 0.001, 1e6)
        if "created" in query:
            options["created"] = number_in(query["created"], "created", 0.0, 1e11)
        if "valid_days" in query:
            options["lifetime_s"] = round(number_in(query["valid_days"], "valid_days", 1.0, 3650.0) * 86_400)
        record = await self._coordinator.publish(await body_of(request, MODEL_BYTES_MAX), **options)
        manifest = await asyncio.to_thread(self._coordinator.publisher.manifest, record.manifest)
        return JSONResponse({**_release_view(record), "latency_ms_max": manifest.requirements.latency_ms_max})

    async def _join(self, request: Request) -> Response:
        body = await object_of(request)
        record = await self._coordinator.join_releases(text_in(body, "model"), text_in(body, "name", "")[:128])
        return JSONResponse(_release_view(record))

    async def _releases(self, request: Request) -> Response:
        records = await asyncio.to_thread(self._coordinator.ledger.releases, request.query_params.get("model"))
        return JSONResponse([_release_view(record) for record in records])

    async def _release(self, request: Request) -> Response:
        digest = require_digest(request.path_params["digest"], "release")
        record = await asyncio.to_thread(self._coordinator.ledger.release, digest)
        manifest = await asyncio.to_thread(self._coordinator.publisher.manifest, digest)
        return JSONResponse(
            {
                **_release_view(record),
                "lineage": msgspec.to_builtins(manifest.lineage),
                "decision_threshold": manifest.decision_threshold,
                "latency_ms_max": manifest.requirements.latency_ms_max,
                "file_digest": manifest.file_digest,
                "inputs": msgspec.to_builtins(manifest.inputs),
                "outputs": msgspec.to_builtins(manifest.outputs),
                "baseline": manifest.baseline,
                "expires": manifest.expires,
            }
        )

    async def _shred(self, request: Request) -> Response:
        digest = require_digest(request.path_params["digest"], "release")
        return JSONResponse(_versions_view(await asyncio.to_thread(self._coordinator.publisher.keys.shred, digest)))

    async def _keys(self, request: Request) -> Response:
        found = await asyncio.to_thread(self._coordinator.keyring.versions)
        rewrapped, of = self._coordinator.publisher.keys.rewrapping
        return JSONResponse({**_versions_view(found), "rewrapped": rewrapped, "to_rewrap": of})

    async def _rotate(self, request: Request) -> Response:
        forget = (await object_of(request)).get("forget", False)
        if not isinstance(forget, bool):
            raise Malformed(f"forget: expected true or false, found {type(forget).__name__}")
        found = await asyncio.to_thread(self._coordinator.publisher.keys.rotate, forget=forget)
        return JSONResponse(_versions_view(found))

    async def _source(self, request: Request) -> Response:
        """The bytes that were published, for an operator: float32 weights and all."""
        digest = require_digest(request.path_params["digest"], "release")
        source = await asyncio.to_thread(self._coordinator.publisher.source, digest)
        return Response(source, media_type="application/octet-stream")

    async def _outcomes(self, request: Request) -> Response:
        """How the update to a version ended, device by device, in the order in which it was heard."""
        digest = require_digest(request.path_params["digest"], "release")
        rows = await asyncio.to_thread(self._coordinator.ledger.outcomes, digest)
        return JSONResponse(
            [{"device_id": row.device_id, "received": row.received, **msgspec.to_builtins(row.outcome)} for row in rows]
        )


def _versions_view(found: KeyVersions) -> dict[str, int]:
    return {"floor": found.floor, "latest": found.latest}


def _release_view(record: ReleaseRecord) -> dict[str, Any]:
    return {
        "manifest": record.manifest,
        "model": record.model,
        "name": record.name,
        "version": show(record.version),
        "release": record.release,
        "parents": list(record.parents),
        "created": record.created,
        "bytes_file": record.file_bytes,
        "bytes_whole": record.bytes_whole,
        "bytes_patch": record.bytes_patch,
        "round_id": record.round_id,
        "form": msgspec.to_builtins(record.form),
    }
