"""Federated rounds over HTTP, and what an aggregator fetches of one."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.requests import BODY_BYTES_MAX, body_of, encoded
from model_delta.errors import Malformed, NotFound

_FRAME = struct.Struct(">I")


class RoundRoutes:
    """Open, look at and abort rounds."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/rounds", guard(self._rounds), methods=["GET"]),
            Route("/v1/rounds", guard(self._open_round), methods=["POST"]),
            Route("/v1/rounds/{round_id}", guard(self._round, "aggregator")),
            Route("/v1/rounds/{round_id}/abort", guard(self._abort_round), methods=["POST"]),
            Route("/v1/rounds/{round_id}/contributions", guard(self._contributions, "aggregator")),
            Route("/v1/rounds/{round_id}/memory", guard(self._memory, "aggregator")),
            Route("/v1/rounds/{round_id}/transcript", guard(self._transcript, "aggregator", "gateway")),
        ]

    async def _open_round(self, request: Request) -> Response:
        data = await body_of(request, BODY_BYTES_MAX)
        try:
            spec = msgspec.json.decode(data, type=RoundSpec)
        except msgspec.DecodeError as error:
            raise Malformed(f"round: {error}; see RoundSpec for the keys") from None
        return JSONResponse(_round_view(await self._coordinator.open_round(spec)))

    async def _rounds(self, request: Request) -> Response:
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        return encoded(snapshot.rounds)

    async def _round(self, request: Request) -> Response:
        round_id = request.path_params["round_id"]
        found = await asyncio.to_thread(self._coordinator.round, round_id)
        admitted = await asyncio.to_thread(self._coordinator.ledger.contributions, round_id)
        refused = await asyncio.to_thread(self._coordinator.ledger.refusals, round_id)
        return JSONResponse(
            {**_round_view(found), "admitted": [entry.device_id for entry in admitted], "refused": refused}
        )

    async def _abort_round(self, request: Request) -> Response:
        return JSONResponse(_round_view(await self._coordinator.abort_round(request.path_params["round_id"])))

    async def _contributions(self, request: Request) -> Response:
        """Read from the log one by one, as fast as the aggregator takes them. What cannot be read after the first one
        breaks the connection off, and the attempt is repeated."""
        read = self._coordinator.contribution_at
        offsets = await asyncio.to_thread(self._coordinator.frozen_offsets, request.path_params["round_id"])
        first = [await asyncio.to_thread(read, offset) for offset in offsets[:1]]

        async def frames() -> AsyncIterator[bytes]:
            for contribution in first:
                yield _FRAME.pack(len(contribution)) + contribution
            for offset in offsets[1:]:
                contribution = await asyncio.to_thread(read, offset)
                yield _FRAME.pack(len(contribution)) + contribution

        return StreamingResponse(frames(), media_type="application/octet-stream")

    async def _memory(self, request: Request) -> Response:
        """What the policy of a round remembers when it begins, for an aggregator that has no copy."""
        proof = await asyncio.to_thread(self._coordinator.memory_proof, request.path_params["round_id"])
        return Response(proof, media_type="application/cbor")

    async def _transcript(self, request: Request) -> Response:
        round_id = request.path_params["round_id"]
        result = await asyncio.to_thread(self._coordinator.ledger.round_result, round_id)
        if result is None:
            raise NotFound(f"round {round_id}: has not opened anything")
        return Response(result[1], media_type="application/cbor")


def _round_view(found: Round) -> dict[str, Any]:
    return {
        "round_id": found.round_id,
        "model": found.task.model,
        "state": found.state,
        "base": found.task.base,
        "candidate": found.candidate,
        "name": found.spec.name,
        "quorum": found.spec.quorum,
        "policy": found.task.policy,
        "reveal": found.task.reveal,
        "opened": found.opened,
        "deadline": found.task.deadline,
        "contributions": len(found.frozen),
        "root": found.root,
        "attempt": found.attempt,
        "failures": list(found.failures),
        "chosen": list(found.chosen),
        "rejected": found.rejected,
        "reason": found.reason,
        "seconds": found.seconds,
        "figures": found.figures,
    }
