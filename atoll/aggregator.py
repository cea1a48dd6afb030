"""Wiring of one aggregator: its Flower node, its mailbox for the other two, its metrics."""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.entry import run_process
from atoll.events import Events
from atoll.flower_nodes import aggregator_key, superlink_place
from atoll.http_server import serving
from atoll.metrics_page import metrics_route
from atoll.platform import COORDINATOR, port_of, read_anchors
from atoll.revocation import keep_informed
from atoll.settings import ConfigurationError, DataFolder
from fl_coordinator.aggregator import MAILBOX_BYTES_MAX, Aggregator
from fl_coordinator.flower_node import FlowerNode
from model_delta.errors import AtollError, Malformed, Unavailable
from monitoring.metrics import Metrics

REGISTER_PAUSE_S = 0.5
PEER_TIMEOUT_S = 10.0
STEP_TIMEOUT_S = 10.0
COMMAND_DEADLINE_S = 600.0
MEMORY_BYTES_MAX = 128 << 20
_FRAME = struct.Struct(">I")


def run_aggregator(path: Path, name: str, *, as_json: bool = False) -> None:
    """Run the aggregator `name` of the platform in the data folder `path` until it is told to stop."""
    data = DataFolder.open(path)
    known = data.endpoints().aggregators
    if not known:
        raise ConfigurationError(f"{path}: this platform was started without aggregators; use `atoll up --learning`")
    if name not in known:
        raise ConfigurationError(f"aggregator {name!r}: expected one of {', '.join(known)}")
    events = Events(f"aggregator-{name}", as_json=as_json)
    run_process(_aggregator(data, name, events), events.name, events=events)


async def _aggregator(data: DataFolder, name: str, events: Events) -> None:
    endpoints, tokens = data.endpoints(), data.tokens()
    revoked: set[int] = set()
    headers = {"Authorization": f"Bearer {tokens['aggregator']}"}
    metrics = Metrics()
    rounds = metrics.counter("aggregator_commands", "Round commands, by result.", ("result",))
    async with httpx.AsyncClient(headers=headers, timeout=PEER_TIMEOUT_S) as client:
        folder = data.child("aggregators", name)

        async def fetch(round_id: str) -> Iterable[bytes]:
            return await _fetch_contributions(client, endpoints.coordinator, round_id, folder)

        async def memory(round_id: str) -> bytes:
            return await _fetch_memory(client, endpoints.coordinator, round_id)

        async def send(peer: str, message: str, content: bytes) -> None:
            await _post(client, f"{endpoints.aggregators[peer]}/v1/messages/{name}/{message}", content, f"peer {peer}")

        own = Aggregator(
            name,
            folder,
            anchors=read_anchors(data.identity(COORDINATOR)),
            ca_pem=(data.identity(COORDINATOR) / "ca.pem").read_bytes(),
            revoked=lambda: frozenset(revoked),
            fetch_contributions=fetch,
            send=send,
            fetch_memory=memory,
            step_timeout_s=STEP_TIMEOUT_S,
        )
        loop = asyncio.get_running_loop()

        def handle(command: Mapping[str, Any]) -> dict[str, Any]:
            """Runs in the Flower node's thread."""
            work = asyncio.run_coroutine_threadsafe(own.run_round(command), loop)
            try:
                reply = work.result(COMMAND_DEADLINE_S)
            except BaseException:
                work.cancel()
                rounds.add(1, "failed")
                raise
            rounds.add(1, "answered")
            return reply

        place = superlink_place(data)
        node = FlowerNode(name, place.address, place.ca, aggregator_key(data, name), handle)
        metrics.gauge("aggregator_flower_connected", "1 while the SuperLink answers.").read_from(
            lambda: float(node.connected)
        )
        app = _mailbox(own, tokens["aggregator"], metrics)
        async with serving(app, port_of(endpoints.aggregators[name]), f"aggregator {name}"):
            await _register(client, endpoints.coordinator, own, endpoints.aggregators[name])
            node.start()
            events.say("ready", name=name, url=endpoints.aggregators[name])
            try:
                await keep_informed(revoked, endpoints.coordinator, tokens["aggregator"])
            finally:
                await asyncio.to_thread(node.stop)


def _mailbox(own: Aggregator, token: str, metrics: Metrics) -> Starlette:
    """Takes messages of the other two. They are authenticated by their own sealing; the token keeps strangers out."""

    async def deliver(request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "expected the aggregators' token"}, status_code=401)
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAILBOX_BYTES_MAX:
                return JSONResponse({"error": f"expected at most {MAILBOX_BYTES_MAX} bytes"}, status_code=413)
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


async def _fetch_memory(client: httpx.AsyncClient, coordinator: str, round_id: str) -> bytes:
    what = f"memory of round {round_id}"
    content = bytearray()
    try:
        async with client.stream("GET", f"{coordinator}/v1/rounds/{round_id}/memory") as response:
            if response.status_code != 200:
                raise Unavailable(f"{what}: the coordinator answered {response.status_code}")
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MEMORY_BYTES_MAX:
                    raise Malformed(f"{what}: expected at most {MEMORY_BYTES_MAX} bytes")
    except httpx.HTTPError as error:
        raise Unavailable(f"{what}: the coordinator did not answer: {type(error).__name__}") from None
    return bytes(content)


async def _fetch_contributions(
    client: httpx.AsyncClient, coordinator: str, round_id: str, folder: Path
) -> Iterator[bytes]:
    """One after the other, from a file without a name in `folder`: a round of many large ones would not fit into
    memory."""
    what = f"contributions of round {round_id}"
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the generator that is returned closes it)
    try:
        async with client.stream("GET", f"{coordinator}/v1/rounds/{round_id}/contributions") as response:
            if response.status_code != 200:
                text = (await response.aread())[:200].decode(errors="replace")
                raise Unavailable(f"{what}: the coordinator answered {response.status_code}: {text}")
            async for chunk in response.aiter_bytes():
                await asyncio.to_thread(file.write, chunk)
    except httpx.HTTPError as error:
        file.close()
        raise Unavailable(f"{what}: the coordinator did not answer: {type(error).__name__}") from None
    except OSError as error:
        file.close()
        raise Unavailable(f"{what}: cannot be kept: {error.strerror}") from None
    except BaseException:
        file.close()
        raise
    return _framed(file, what)


def _framed(file: IO[bytes], what: str) -> Iterator[bytes]:
    """The contributions in `file`, which is closed at the end. Raises Malformed where a frame is cut off."""
    with file:
        left = file.seek(0, os.SEEK_END)
        file.seek(0)
        while left:
            head = file.read(_FRAME.size)
            if len(head) < _FRAME.size:
                raise Malformed(f"{what}: expected a length of {_FRAME.size} bytes, found {len(head)} and the end")
            (size,) = _FRAME.unpack(head)
            left -= _FRAME.size + size
            if left < 0:
                raise Malformed(f"{what}: expected {size} bytes, found {size + left}")
            yield file.read(size)


async def _post(client: httpx.AsyncClient, url: str, content: bytes, what: str) -> None:
    try:
        response = await client.post(url, content=content)
    except httpx.HTTPError as error:
        raise Unavailable(f"{what}: did not answer: {type(error).__name__}") from None
    if response.status_code >= 500:
        raise Unavailable(f"{what}: answered {response.status_code}")
    if response.status_code >= 300:
        raise Malformed(f"{what}: refused a message: {response.text[:200]}")
