"""Federated rounds over HTTP, and what aggregators and relays ask for: the log, announcements, contributions, ends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.relaying import RelayQuestion
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.routes.access import Access
from fl_coordinator.routes.requests import BODY_BYTES_MAX, body_of, encoded, number_in, whole_number_in
from fl_coordinator.updates_log import packed_part
from model_delta.encoding import pack
from model_delta.errors import Malformed

LOG_WAIT_S_MAX = 20.0


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
            Route("/v1/rounds/{round_id}/announcement", guard(self._announcement, "aggregator")),
            Route("/v1/rounds/{round_id}/attempt", guard(self._attempt, "aggregator")),
            Route("/v1/rounds/{round_id}/contributions/{digest}", guard(self._contribution, "aggregator")),
            Route("/v1/rounds/{round_id}/memory", guard(self._memory, "aggregator")),
            Route("/v1/rounds/{round_id}/transcript", guard(self._transcript, "aggregator", "gateway")),
            Route("/v1/relays/{region}/ends", guard(self._ends, "gateway"), methods=["POST"]),
            Route("/v1/log", guard(self._log, "aggregator")),
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
        sat_out = await asyncio.to_thread(self._coordinator.ledger.sat_out, round_id)
        told = {"admitted": [entry.device_id for entry in admitted], "refused": refused, "sat_out": sat_out}
        return JSONResponse({**_round_view(found), **told})

    async def _abort_round(self, request: Request) -> Response:
        return JSONResponse(_round_view(await self._coordinator.abort_round(request.path_params["round_id"])))

    async def _announcement(self, request: Request) -> Response:
        found = await asyncio.to_thread(self._coordinator.announcement, request.path_params["round_id"])
        return Response(found, media_type="application/cbor")

    async def _attempt(self, request: Request) -> Response:
        """What an aggregator stands by for. 204: not there yet; 404: nobody is to wait for it (any more)."""
        aggregator = request.query_params.get("aggregator", "")
        wait = number_in(request.query_params.get("wait", "0"), "wait", 0.0, 3600.0)
        round_id = request.path_params["round_id"]
        found = await self._coordinator.attempt_for(round_id, aggregator, min(wait, LOG_WAIT_S_MAX))
        return Response(status_code=204) if found is None else Response(found, media_type="application/cbor")

    async def _ends(self, request: Request) -> Response:
        """Which of the rounds that a relay has announced are over. 204: none yet, or it has their ends; 404: it has
        to be told by a message first."""
        wait = number_in(request.query_params.get("wait", "0"), "wait", 0.0, 3600.0)
        try:
            question = msgspec.json.decode(await body_of(request, BODY_BYTES_MAX), type=RelayQuestion)
        except msgspec.DecodeError as error:
            raise Malformed(f"question of a relay: {error}; see RelayQuestion for the keys") from None
        region = request.path_params["region"]
        found = await self._coordinator.round_ends(region, question, min(wait, LOG_WAIT_S_MAX))
        return Response(pack(found), media_type="application/cbor") if found else Response(status_code=204)

    async def _contribution(self, request: Request) -> Response:
        round_id, digest = request.path_params["round_id"], request.path_params["digest"]
        found = await asyncio.to_thread(self._coordinator.frozen_contribution, round_id, digest)
        return Response(found, media_type="application/cbor")

    async def _log(self, request: Request) -> Response:
        """Whatever the log holds: it is sealed for the aggregators, who may read it as it comes."""
        offset = whole_number_in(request.query_params.get("from", "0"), "from")
        wait = number_in(request.query_params.get("wait", "0"), "wait", 0.0, 3600.0)
        part = await self._coordinator.log_from(offset, min(wait, LOG_WAIT_S_MAX))
        return Response(packed_part(part), media_type="application/octet-stream")

    async def _memory(self, request: Request) -> Response:
        """What the policy of a round remembers when it begins, for an aggregator that has no copy."""
        proof = await asyncio.to_thread(self._coordinator.memory_proof, request.path_params["round_id"])
        return Response(proof, media_type="application/cbor")

    async def _transcript(self, request: Request) -> Response:
        round_id = request.path_params["round_id"]
        found = await asyncio.to_thread(self._coordinator.transcript, round_id)
        return Response(found, media_type="application/cbor")


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
        "transcript_digest": found.transcript,
    }
