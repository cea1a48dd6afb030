"""Wiring of one aggregator: its Flower node, its mailbox for the other two, its metrics."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.aggregator_reading import CoordinatorClient, open_source
from atoll.entry import run_process
from atoll.events import Events
from atoll.flower_nodes import aggregator_key, superlink_place
from atoll.http_server import serving
from atoll.metrics_page import metrics_route
from atoll.platform import COORDINATOR, port_of, read_anchors
from atoll.revocation import keep_informed
from atoll.settings import ConfigurationError, DataFolder
from atoll.updates import UpdatesPlace, aggregator_place
from fl_coordinator.aggregator import Aggregator
from fl_coordinator.flower_node import FlowerNode
from fl_coordinator.following import RESULTS, Following
from fl_coordinator.mailbox import MAILBOX_BYTES_MAX
from fl_coordinator.round_command import stands_s
from fl_coordinator.standing_by import StoodDown
from model_delta.errors import AtollError, Malformed, Unavailable
from monitoring.metrics import Metrics

REGISTER_PAUSE_S = 0.5
PEER_TIMEOUT_S = 10.0
ARRIVING_BYTES_MAX = 4 * MAILBOX_BYTES_MAX
STEP_TIMEOUT_S = 10.0
COMMAND_DEADLINE_S = 3_660.0
"""Longer than any attempt may take (`aggregation_s`), which ends by itself; of one that is stood by for, from the time
when it was to come."""


def run_aggregator(
    path: Path, name: str, *, updates_log: str = "", updates_login: str = "", as_json: bool = False
) -> None:
    """Run the aggregator `name` of the platform in the data folder `path` until it is told to stop. It reads the
    contributions from `updates_log`, or where the folder says (`updates.aggregator_place`)."""
    data = DataFolder.open(path)
    known = data.endpoints().aggregators
    if not known:
        raise ConfigurationError(f"{path}: this platform was started without aggregators; use `atoll up --learning`")
    if name not in known:
        raise ConfigurationError(f"aggregator {name!r}: expected one of {', '.join(known)}")
    place = aggregator_place(data, name, updates_log, updates_login)
    events = Events(f"aggregator-{name}", as_json=as_json)
    run_process(_aggregator(data, name, place, events), events.name, events=events)


async def _aggregator(data: DataFolder, name: str, place: UpdatesPlace, events: Events) -> None:
    endpoints, tokens = data.endpoints(), data.tokens()
    revoked: set[int] = set()
    headers = {"Authorization": f"Bearer {tokens['aggregator']}"}
    metrics = Metrics()
    rounds = metrics.counter("aggregator_commands", "Round commands, by result.", ("result",))
    async with httpx.AsyncClient(headers=headers, timeout=PEER_TIMEOUT_S) as client:
        coordinator = CoordinatorClient(client, endpoints.coordinator)

        async def send(peer: str, message: str, content: bytes) -> None:
            await _post(client, f"{endpoints.aggregators[peer]}/v1/messages/{name}/{message}", content, f"peer {peer}")

        own = Aggregator(
            name,
            data.child("aggregators", name),
            anchors=read_anchors(data.identity(COORDINATOR)),
            ca_pem=(data.identity(COORDINATOR) / "ca.pem").read_bytes(),
            revoked=lambda: frozenset(revoked),
            fetch=coordinator.contribution,
            send=send,
            fetch_memory=coordinator.memory,
            fetch_attempt=lambda round_id: coordinator.attempt(round_id, name),
            step_timeout_s=STEP_TIMEOUT_S,
        )
        loop = asyncio.get_running_loop()

        def handle(command: Mapping[str, Any]) -> dict[str, Any]:
            """Runs in the Flower node's thread."""
            work = asyncio.run_coroutine_threadsafe(own.carry_out(command), loop)
            try:
                reply = work.result(COMMAND_DEADLINE_S + (stands_s(command) or 0.0))
            except StoodDown:
                rounds.add(1, "stood down")
                raise
            except CancelledError:  # nobody hears of it any more; Flower sends it again
                raise Unavailable(f"{name}: is told to stop") from None
            except BaseException:
                work.cancel()
                rounds.add(1, "failed")
                raise
            rounds.add(1, "answered")
            return reply

        superlink = superlink_place(data)
        node = FlowerNode(
            *(name, superlink.address, superlink.ca, aggregator_key(data, name), handle),
            rests=lambda command: stands_s(command) is not None,
        )
        metrics.gauge("aggregator_flower_connected", "1 while the SuperLink answers.").read_from(
            lambda: float(node.connected)
        )
        app = _mailbox(own, tokens["aggregator"], metrics)
        async with (
            serving(app, port_of(endpoints.aggregators[name]), f"aggregator {name}"),
            open_source(place, coordinator) as log,
        ):
            await _register(client, endpoints.coordinator, own, endpoints.aggregators[name])
            node.start()
            following = own.following(log, coordinator.announcement)
            _measure(following, metrics)
            events.say("ready", name=name, url=endpoints.aggregators[name], updates_log=log.name)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(own.follow(following), name="updates log")
                    tasks.create_task(
                        keep_informed(revoked, endpoints.coordinator, tokens["aggregator"]), name="revocations"
                    )
            finally:
                await asyncio.to_thread(node.stop)
                own.close()


def _measure(following: Following, metrics: Metrics) -> None:
    """Publish how far the log was read, and what became of its records."""
    metrics.gauge("aggregator_log_offset", "Offset in the updates log that is read next.").read_from(
        lambda: float(following.reached)
    )
    records = metrics.gauge(
        "aggregator_log_records", "Records of the updates log since the start, by result.", ("result",)
    )
    for result in RESULTS:
        records.read_from(lambda result=result: float(following.counts[result]), result)  # type: ignore[misc]


def _mailbox(own: Aggregator, token: str, metrics: Metrics) -> Starlette:
    """Takes messages of the other two. They are authenticated by their own sealing; the token keeps strangers out, and
    what arrives at the same time is bounded, whoever sends it."""
    arriving = 0

    async def deliver(request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "expected the aggregators' token"}, status_code=401)
        nonlocal arriving
        content = bytearray()
        try:
            async for chunk in request.stream():
                content += chunk
                arriving += len(chunk)
                if len(content) > MAILBOX_BYTES_MAX:
                    return JSONResponse({"error": f"expected at most {MAILBOX_BYTES_MAX} bytes"}, status_code=413)
                if arriving > ARRIVING_BYTES_MAX:
                    return JSONResponse({"error": "too many messages arrive at once; try again"}, status_code=503)
        finally:
            arriving -= len(content)
        try:
            own.deliver(request.path_params["sender"], request.path_params["message"], bytes(content))
        except Unavailable as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        except AtollError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return Response(status_code=204)

    return Starlette(
        routes=[Route("/v1/messages/{sender}/{message:path}", deliver, methods=["POST"]), metrics_route(metrics)]
    )


async def _register(client: httpx.AsyncClient, coordinator: str, own: Aggregator, url: str) -> None:
    """Tell the coordinator this aggregator's keys and address; tries until it listens."""
    body = {
        "name": own.name,
        "sealing": base64.b64encode(own.key.sealing).decode(),
        "verifying": base64.b64encode(own.key.verifying).decode(),
        "url": url,
    }
    while True:
        try:
            response = await client.post(f"{coordinator}/v1/aggregators", json=body)
        except httpx.HTTPError:
            await asyncio.sleep(REGISTER_PAUSE_S)
            continue
        if response.status_code < 500:
            if response.status_code >= 300:
                raise Malformed(f"aggregator {own.name}: the coordinator refused its keys: {response.text[:200]}")
            return
        await asyncio.sleep(REGISTER_PAUSE_S)


async def _post(client: httpx.AsyncClient, url: str, content: bytes, what: str) -> None:
    try:
        response = await client.post(url, content=content)
    except httpx.HTTPError as error:
        raise Unavailable(f"{what}: did not answer: {type(error).__name__}") from None
    if response.status_code >= 500:
        raise Unavailable(f"{what}: answered {response.status_code}")
    if response.status_code >= 300:
        raise Malformed(f"{what}: refused a message: {response.text[:200]}")
