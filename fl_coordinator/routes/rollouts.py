"""Rollouts over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.rollout import Rollout, standing
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.requests import BODY_BYTES_MAX, body_of, encoded, object_of, text_in
from model_delta.encoding import unpack
from model_delta.errors import Malformed


class RolloutRoutes:
    """Begin, look at and abort rollouts."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/rollouts", guard(self._rollouts), methods=["GET"]),
            Route("/v1/rollouts", guard(self._start_rollout), methods=["POST"]),
            Route("/v1/rollouts/{name}", guard(self._rollout)),
            Route("/v1/rollouts/{name}/abort", guard(self._abort_rollout), methods=["POST"]),
        ]

    async def _start_rollout(self, request: Request) -> Response:
        data = await body_of(request, BODY_BYTES_MAX)
        file = request.query_params.get("file", "rollout.yaml")[:128]
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"{file}:1: expected YAML in UTF-8, found byte {data[error.start]:#04x}") from None
        target = request.query_params.get("target", "")
        return JSONResponse(_rollout_view(await self._coordinator.start_rollout(text, target, file)))

    async def _rollouts(self, request: Request) -> Response:
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        return encoded(snapshot.rollouts)

    async def _rollout(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = unpack(await asyncio.to_thread(self._coordinator.ledger.rollout, name), Rollout)
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        shown = next((one for one in snapshot.rollouts if one.name == name), None)
        return JSONResponse({**_rollout_view(found), **(msgspec.to_builtins(shown) if shown is not None else {})})

    async def _abort_rollout(self, request: Request) -> Response:
        body = await object_of(request)
        reason = text_in(body, "reason", "an operator aborted it")
        return JSONResponse(_rollout_view(await self._coordinator.abort_rollout(request.path_params["name"], reason)))


def _rollout_view(found: Rollout) -> dict[str, Any]:
    return {
        "name": found.name,
        "model": found.model,
        "state": found.state,
        "standing": standing(found),
        "stage": found.stage,
        "stages": len(found.spec.stages),
        "target": found.target,
        "stable": found.stable,
        "serial": found.serial,
        "reason": found.reason,
        "created": found.created,
        "guardrails": [msgspec.to_builtins(verdict) for verdict in found.verdicts],
    }
