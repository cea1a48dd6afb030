"""The coordinator's HTTP control API: who may call what, in which form, and the one table from our errors to HTTP.

    GET  /v1/health   /v1/state   /v1/events (server-sent events, twice a second)   /metrics   /
    POST /v1/models?model=&name=&parent=&threshold=&baseline=&feature_set=&created=&valid_days=   body: ONNX bytes
    POST /v1/releases/join   body: JSON model, name
    GET  /v1/releases   /v1/releases/{digest}   /v1/releases/{digest}/source   /v1/releases/{digest}/outcomes
    POST /v1/releases/{digest}/shred              GET /v1/keys       POST /v1/keys/rotate   body: JSON forget
    POST /v1/rollouts?target=&file=   body: YAML  GET /v1/rollouts   /v1/rollouts/{name}   POST .../{name}/abort
    POST /v1/rounds   body: JSON RoundSpec        GET /v1/rounds     /v1/rounds/{id}       POST .../{id}/abort
    GET  /v1/rounds/{id}/contributions            each: length (4 bytes, big-endian), then its bytes; the frozen order
    GET  /v1/rounds/{id}/transcript               canonical CBOR; see `transcript`
    POST /v1/enroll   /v1/aggregators   /v1/notes   /v1/identities/{name}/revoke
    GET  /v1/revoked
    GET  /v1/store/{kind}/{name}   PUT /v1/store/artifact/{digest}   POST /v1/store/clean   body: JSON dry_run
    GET  /v1/flower/commands?wait=                POST /v1/flower/replies

Every call carries `Authorization: Bearer TOKEN`, with a token per role, compared in constant time; a role may call only
what is listed beside the route. The page, its event stream, the metrics and the health check are open on the loopback
interface only, since the page cannot hold a token; and there only to whoever asked for this machine by name, so that a
web page whose name was made to point here (DNS rebinding) and a proxy in front of us get nothing. Bodies are bounded
per route and read no further than the bound. Refusals are `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.enrolment import Enrolment
from fl_coordinator.forms import asked
from fl_coordinator.rollout import Rollout
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.tables.records import AggregatorRecord, ReleaseRecord
from model_delta.digest import require_digest, require_match
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable, Untrusted
from model_delta.keys.wrapping import KeyVersions
from model_delta.task import AggregatorKey
from model_delta.version import show
from monitoring.metrics import CONTENT_TYPE

MODEL_BYTES_MAX = 512 * 2**20
BODY_BYTES_MAX = 256 * 2**10
REPLY_BYTES_MAX = 64 * 2**20
EVENT_SECONDS = 0.5
VIEWERS_MAX = 500
WAIT_SECONDS_MAX = 30.0

STATUS: tuple[tuple[type[AtollError], int], ...] = (
    (NotFound, 404),
    (StorageFull, 507),
    (Unavailable, 503),
    (Untrusted, 403),
    (Malformed, 400),
    (AtollError, 500),
)
"""Our errors as HTTP, the first match counts."""

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost", "testclient"})
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_FRAME = struct.Struct(">I")
_STORE_KINDS = frozenset({"manifest", "delivery", "blob", "artifact", "tuf"})

Handler = Callable[[Request], Awaitable[Response]]


class FlowerQueue(Protocol):
    """The half of `FlowerBridge` that the ServerApp talks to."""

    async def next_command(self, wait_s: float) -> dict[str, Any] | None:
        """The oldest command without an answer, or None after `wait_s` seconds."""

    def reply(self, body: Any) -> dict[str, bool]:
        """Take an answer; whether it is still wanted."""


class Denied(Exception):
    """No token, or a token of another role. Becomes 401 or 403 here and nowhere else."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def control_app(
    coordinator: Coordinator,
    *,
    tokens: Mapping[str, str],
    flower: FlowerQueue,
    pages: list[BaseRoute] | None = None,
) -> Starlette:
    """The ASGI application. `tokens` maps a role (admin, gateway, aggregator, flower, join) to its bearer token;
    `pages` are the live page's routes."""
    return _Control(coordinator, tokens, flower).app(pages or [])


class _Control:
    """The routes, with what they need."""

    def __init__(self, coordinator: Coordinator, tokens: Mapping[str, str], flower: FlowerQueue) -> None:
        self._coordinator = coordinator
        self._tokens = {role: token for role, token in tokens.items() if token}
        self._flower = flower
        self._viewers = 0

    def app(self, pages: list[BaseRoute]) -> Starlette:
        """All routes, each with the roles that may call it beside `admin`."""
        routes: list[BaseRoute] = [
            Route("/v1/health", self._guard(self._health, loopback=True)),
            Route("/v1/state", self._guard(self._state, "gateway", "aggregator", loopback=True)),
            Route("/v1/events", self._guard(self._events, loopback=True)),
            Route("/metrics", self._guard(self._metrics, loopback=True)),
            Route("/v1/models", self._guard(self._publish), methods=["POST"]),
            Route("/v1/releases", self._guard(self._releases, "gateway")),
            Route("/v1/releases/join", self._guard(self._join), methods=["POST"]),
            Route("/v1/releases/{digest}", self._guard(self._release, "gateway")),
            Route("/v1/releases/{digest}/source", self._guard(self._source)),
            Route("/v1/releases/{digest}/outcomes", self._guard(self._outcomes)),
            Route("/v1/releases/{digest}/shred", self._guard(self._shred), methods=["POST"]),
            Route("/v1/keys", self._guard(self._keys)),
            Route("/v1/keys/rotate", self._guard(self._rotate), methods=["POST"]),
            Route("/v1/rollouts", self._guard(self._rollouts), methods=["GET"]),
            Route("/v1/rollouts", self._guard(self._start_rollout), methods=["POST"]),
            Route("/v1/rollouts/{name}", self._guard(self._rollout)),
            Route("/v1/rollouts/{name}/abort", self._guard(self._abort_rollout), methods=["POST"]),
            Route("/v1/rounds", self._guard(self._rounds), methods=["GET"]),
            Route("/v1/rounds", self._guard(self._open_round), methods=["POST"]),
            Route("/v1/rounds/{round_id}", self._guard(self._round, "aggregator")),
            Route("/v1/rounds/{round_id}/abort", self._guard(self._abort_round), methods=["POST"]),
            Route("/v1/rounds/{round_id}/contributions", self._guard(self._contributions, "aggregator")),
            Route("/v1/rounds/{round_id}/transcript", self._guard(self._transcript, "aggregator", "gateway")),
            Route("/v1/enroll", self._guard(self._enrol, "join", "gateway"), methods=["POST"]),
            Route("/v1/aggregators", self._guard(self._aggregators, "aggregator"), methods=["GET"]),
            Route("/v1/aggregators", self._guard(self._register, "aggregator"), methods=["POST"]),
            Route("/v1/identities/{name}/revoke", self._guard(self._revoke), methods=["POST"]),
            Route("/v1/revoked", self._guard(self._revoked, "aggregator", "gateway")),
            Route("/v1/notes", self._guard(self._note), methods=["POST"]),
            Route("/v1/store/{kind}/{name}", self._guard(self._stored, "gateway"), methods=["GET"]),
            Route("/v1/store/artifact/{name}", self._guard(self._store_artifact), methods=["PUT"]),
            Route("/v1/store/clean", self._guard(self._clean_store), methods=["POST"]),
            Route("/v1/flower/commands", self._guard(self._flower_command, "flower")),
            Route("/v1/flower/replies", self._guard(self._flower_reply, "flower"), methods=["POST"]),
            *pages,
        ]
        return Starlette(routes=routes)

    def _guard(self, handler: Handler, *roles: str, loopback: bool = False) -> Handler:
        """`handler` behind the token check and the error table. `admin` may call everything."""

        async def guarded(request: Request) -> Response:
            try:
                self._authorize(request, ("admin", *roles), loopback)
                return await handler(request)
            except Denied as error:
                return JSONResponse({"error": str(error)}, error.status)
            except AtollError as error:
                status = next(code for kind, code in STATUS if isinstance(error, kind))
                return JSONResponse({"error": str(error)}, status)

        return guarded

    def _authorize(self, request: Request, roles: tuple[str, ...], loopback: bool) -> None:
        role = self._role(request)
        if role in roles:
            return
        if loopback and role is None and _from_this_machine(request):
            return
        if role is None:
            raise Denied(401, "expected `Authorization: Bearer TOKEN` with a token of this platform, found none")
        raise Denied(403, f"a token of role {role} may not call {request.method} {request.url.path}")

    def _role(self, request: Request) -> str | None:
        """The role whose token the request carries. Every token is compared, so that the time says nothing."""
        given = request.headers.get("authorization", "")
        found = None
        for role, token in self._tokens.items():
            if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                found = role
        return found

    # What happens

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _state(self, request: Request) -> Response:
        return _json(await asyncio.to_thread(self._coordinator.snapshot))

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
        body = await _object(request)
        await asyncio.to_thread(self._coordinator.note, _text(body, "kind", "info"), _text(body, "text"))
        return JSONResponse({})

    # Versions

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
            options["decision_threshold"] = _number(query["threshold"], "threshold", 0.0, 1.0)
        if "created" in query:
            options["created"] = _number(query["created"], "created", 0.0, 1e11)
        if "valid_days" in query:
            options["lifetime_s"] = round(_number(query["valid_days"], "valid_days", 1.0, 3650.0) * 86_400)
        record = await self._coordinator.publish(await _body(request, MODEL_BYTES_MAX), **options)
        return JSONResponse(_release_view(record))

    async def _join(self, request: Request) -> Response:
        body = await _object(request)
        record = await self._coordinator.join_releases(_text(body, "model"), _text(body, "name", "")[:128])
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
                "file_digest": manifest.file_digest,
                "inputs": msgspec.to_builtins(manifest.inputs),
                "outputs": msgspec.to_builtins(manifest.outputs),
                "baseline": manifest.baseline,
                "expires": manifest.expires,
            }
        )

    async def _shred(self, request: Request) -> Response:
        digest = require_digest(request.path_params["digest"], "release")
        return _versions(await asyncio.to_thread(self._coordinator.publisher.shred, digest))

    async def _keys(self, request: Request) -> Response:
        return _versions(await asyncio.to_thread(self._coordinator.keyring.versions))

    async def _rotate(self, request: Request) -> Response:
        forget = (await _object(request)).get("forget", False)
        if not isinstance(forget, bool):
            raise Malformed(f"forget: expected true or false, found {type(forget).__name__}")
        return _versions(await asyncio.to_thread(self._coordinator.publisher.rotate, forget=forget))

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
        data = await _body(request, REPLY_BYTES_MAX)
        require_match(data, name, "artifact")
        await asyncio.to_thread(self._coordinator.store.put, "artifact", name, data)
        return JSONResponse({"name": name, "size": len(data)})

    async def _clean_store(self, request: Request) -> Response:
        dry_run = (await _object(request)).get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise Malformed(f"clean: dry_run: expected true or false, found {dry_run!r}")
        cleaned = await asyncio.to_thread(self._coordinator.clean_store, dry_run=dry_run)
        return JSONResponse(msgspec.to_builtins(cleaned))

    # Rollouts

    async def _start_rollout(self, request: Request) -> Response:
        data = await _body(request, BODY_BYTES_MAX)
        file = request.query_params.get("file", "rollout.yaml")[:128]
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"{file}:1: expected YAML in UTF-8, found byte {data[error.start]:#04x}") from None
        target = request.query_params.get("target", "")
        return JSONResponse(_rollout_view(await self._coordinator.start_rollout(text, target, file)))

    async def _rollouts(self, request: Request) -> Response:
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        return _json(snapshot.rollouts)

    async def _rollout(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = unpack(await asyncio.to_thread(self._coordinator.ledger.rollout, name), Rollout)
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        shown = next((one for one in snapshot.rollouts if one.name == name), None)
        return JSONResponse({**_rollout_view(found), **(msgspec.to_builtins(shown) if shown is not None else {})})

    async def _abort_rollout(self, request: Request) -> Response:
        body = await _object(request)
        reason = _text(body, "reason", "an operator aborted it")
        return JSONResponse(_rollout_view(await self._coordinator.abort_rollout(request.path_params["name"], reason)))

    # Rounds

    async def _open_round(self, request: Request) -> Response:
        data = await _body(request, BODY_BYTES_MAX)
        try:
            spec = msgspec.json.decode(data, type=RoundSpec)
        except msgspec.DecodeError as error:
            raise Malformed(f"round: {error}; see RoundSpec for the keys") from None
        return JSONResponse(_round_view(await self._coordinator.open_round(spec)))

    async def _rounds(self, request: Request) -> Response:
        snapshot = await asyncio.to_thread(self._coordinator.snapshot)
        return _json(snapshot.rounds)

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

    async def _transcript(self, request: Request) -> Response:
        round_id = request.path_params["round_id"]
        result = await asyncio.to_thread(self._coordinator.ledger.round_result, round_id)
        if result is None:
            raise NotFound(f"round {round_id}: has not opened anything")
        return Response(result[1], media_type="application/cbor")

    # Identities

    async def _enrol(self, request: Request) -> Response:
        body = await _object(request)
        kind, role = _text(body, "kind", "device"), self._role(request)
        # A join token makes devices; only a gateway's own token, or an operator's, makes an identity with more rights.
        if kind != "device" and role != "admin" and (kind, role) != ("gateway", "gateway"):
            raise Denied(403, f"a token of role {role} may not enrol a {kind}; use the admin token")
        traits = body.get("traits", {})
        if not isinstance(traits, dict) or not all(isinstance(v, str) for v in traits.values()):
            raise Malformed("enrolment: traits: expected an object of strings")
        wanted = Enrolment(
            csr_pem=_text(body, "csr_pem"),
            sealing_public=_bytes(body, "sealing_public", optional=True),
            kind=kind,
            common_name=_text(body, "common_name"),
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
        body = await _object(request)
        key = AggregatorKey(_text(body, "name"), _bytes(body, "sealing"), _bytes(body, "verifying"))
        record = AggregatorRecord(key, _text(body, "url"))
        replace = self._role(request) == "admin"
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

    # The Flower ServerApp

    async def _flower_command(self, request: Request) -> Response:
        wait = _number(request.query_params.get("wait", "0"), "wait", 0.0, 3600.0)
        command = await self._flower.next_command(min(wait, WAIT_SECONDS_MAX))
        return Response(status_code=204) if command is None else JSONResponse(command)

    async def _flower_reply(self, request: Request) -> Response:
        data = await _body(request, REPLY_BYTES_MAX)
        return JSONResponse(self._flower.reply(_decoded(data)))


def _from_this_machine(request: Request) -> bool:
    """Whether a browser or program of this machine asked for it under this machine's own name, with nobody between."""
    if request.client is None or request.client.host not in _LOOPBACK:
        return False
    if any(name in request.headers for name in _FORWARDED):
        return False
    try:
        asked_for = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return False
    return asked_for in _LOOPBACK


def _versions(found: KeyVersions) -> Response:
    return JSONResponse({"floor": found.floor, "latest": found.latest})


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


def _rollout_view(found: Rollout) -> dict[str, Any]:
    return {
        "name": found.name,
        "model": found.model,
        "state": found.state,
        "stage": found.stage,
        "stages": len(found.spec.stages),
        "target": found.target,
        "stable": found.stable,
        "serial": found.serial,
        "reason": found.reason,
        "created": found.created,
        "guardrails": [msgspec.to_builtins(verdict) for verdict in found.verdicts],
    }


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


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than `most` bytes. Raises Malformed."""
    refused = Malformed(f"body of {request.method} {request.url.path}: expected at most {most} bytes, found more")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise refused
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise refused
    return bytes(data)


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"body: expected JSON, found {type(error).__name__}") from None


async def _object(request: Request) -> dict[str, Any]:
    data = await _body(request, BODY_BYTES_MAX)
    body = _decoded(data) if data else {}
    if not isinstance(body, dict):
        raise Malformed(f"body: expected a JSON object, found {type(body).__name__}")
    return body


def _text(body: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = body.get(key, default)
    if not isinstance(value, str):
        raise Malformed(f"body: {key}: expected text, found {'nothing' if value is None else type(value).__name__}")
    return value


def _bytes(body: Mapping[str, Any], key: str, optional: bool = False) -> bytes:
    try:
        return base64.b64decode(_text(body, key, "" if optional else None), validate=True)
    except ValueError:
        raise Malformed(f"body: {key}: expected base64") from None


def _number(text: str, what: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise Malformed(f"query parameter {what}: expected a number from {low:g} to {high:g}, found {text[:32]!r}")
    return value
