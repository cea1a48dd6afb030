"""Identities over HTTP: enrolment, the aggregators' keys, revocation."""

from __future__ import annotations

import asyncio
import base64

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.enrolment import Enrolment
from fl_coordinator.routes.access import Access, Denied
from fl_coordinator.routes.requests import bytes_in, object_of, text_in
from fl_coordinator.tables.records import AggregatorRecord
from model_delta.errors import Malformed
from model_delta.task import AggregatorKey


class IdentityRoutes:
    """Who belongs to the platform."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """Each with the roles that may call it beside `admin`."""
        guard = self._access.guard
        return [
            Route("/v1/enroll", guard(self._enrol, "join", "gateway"), methods=["POST"]),
            Route("/v1/aggregators", guard(self._aggregators, "aggregator"), methods=["GET"]),
            Route("/v1/aggregators", guard(self._register, "aggregator"), methods=["POST"]),
            Route("/v1/identities/{name}/revoke", guard(self._revoke), methods=["POST"]),
            Route("/v1/revoked", guard(self._revoked, "aggregator", "gateway")),
        ]

    async def _enrol(self, request: Request) -> Response:
        body = await object_of(request)
        kind, role = text_in(body, "kind", "device"), self._access.role(request)
        # A join token makes devices; only a gateway's own token, or an operator's, makes an identity with more rights.
        if kind != "device" and role != "admin" and (kind, role) != ("gateway", "gateway"):
            raise Denied(403, f"a token of role {role} may not enrol a {kind}; use the admin token")
        traits = body.get("traits", {})
        if not isinstance(traits, dict) or not all(isinstance(v, str) for v in traits.values()):
            raise Malformed("enrolment: traits: expected an object of strings")
        wanted = Enrolment(
            csr_pem=text_in(body, "csr_pem"),
            sealing_public=bytes_in(body, "sealing_public", optional=True),
            kind=kind,
            common_name=text_in(body, "common_name"),
            traits=traits,
        )
        enrolled = await asyncio.to_thread(self._coordinator.enrol, wanted, replace=role == "admin")
        return JSONResponse(
            {
                "certificate_pem": enrolled.certificate_pem.decode(),
                "ca_pem": enrolled.ca_pem.decode(),
                "root": base64.b64encode(enrolled.root).decode(),
                "anchors": base64.b64encode(enrolled.anchors).decode(),
            }
        )

    async def _register(self, request: Request) -> Response:
        body = await object_of(request)
        key = AggregatorKey(text_in(body, "name"), bytes_in(body, "sealing"), bytes_in(body, "verifying"))
        record = AggregatorRecord(key, text_in(body, "url"))
        replace = self._access.role(request) == "admin"
        await asyncio.to_thread(self._coordinator.register_aggregator, record, replace=replace)
        return JSONResponse({})

    async def _aggregators(self, request: Request) -> Response:
        records = await asyncio.to_thread(self._coordinator.ledger.aggregators)
        return JSONResponse(
            [
                {
                    "name": record.key.name,
                    "sealing": base64.b64encode(record.key.sealing).decode(),
                    "verifying": base64.b64encode(record.key.verifying).decode(),
                    "url": record.url,
                }
                for record in records
            ]
        )

    async def _revoke(self, request: Request) -> Response:
        await asyncio.to_thread(self._coordinator.revoke, request.path_params["name"])
        return JSONResponse({})

    async def _revoked(self, request: Request) -> Response:
        revoked = await asyncio.to_thread(self._coordinator.keyring.revoked)
        return JSONResponse({"serials": [str(serial) for serial in sorted(revoked)]})
