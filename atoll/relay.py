"""Wiring of a region's relay: a Flower node in the gateway's process, on the gateway's line to the broker.

The gateway does not need Flower for anything else. Where it is not installed, the region's devices hear of no rounds
that begin meanwhile, and each round's record says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from atoll.bounded_answers import answer
from atoll.flower_nodes import relay_key, superlink_place
from atoll.platform import relay_name
from atoll.settings import TENANT, DataFolder
from edge_runtime.link import MqttLink
from fl_coordinator.flower_node import FlowerNode
from model_delta.encoding import unpack_plain
from model_delta.errors import Malformed
from monitoring.metrics import Metrics
from regional_gateway.relay import ANNOUNCEMENT_BYTES_MAX, ANNOUNCEMENTS_MAX, Ask, Relay
from regional_gateway.vouching import Vouching

COMMAND_DEADLINE_S = 30.0
END_WAIT_S = 2.0
"""Short, because a coordinator that is told to stop finishes what it answers."""
ENDS_BYTES_MAX = ANNOUNCEMENTS_MAX * (ANNOUNCEMENT_BYTES_MAX + 1024)

log = logging.getLogger(__name__)


def asking(client: httpx.AsyncClient, region: str) -> Ask:
    """Asks the coordinator, whose address and token `client` has, which rounds announced in `region` are over."""

    async def ask(word: str, have: Mapping[str, str]) -> Mapping[str, Any]:
        what, url = "ends of rounds", f"/v1/relays/{quote(region, safe='')}/ends?wait={END_WAIT_S:g}"
        body = {"word": word, "have": dict(have)}
        data = await answer(client, "POST", url, what, ENDS_BYTES_MAX, wait_s=END_WAIT_S, body=body)
        found = unpack_plain(data) if data else {}
        if not isinstance(found, dict):
            raise Malformed(f"{what}: expected a map by model from the coordinator, found {type(found).__name__}")
        return found

    return ask


@contextlib.asynccontextmanager
async def relaying(
    data: DataFolder,
    region: str,
    *,
    link: MqttLink,
    client: httpx.AsyncClient,
    vouching: Vouching,
    reachable: Callable[[], int],
    metrics: Metrics,
) -> AsyncIterator[None]:
    """Announce rounds in `region` while entered; nothing on a platform without Flower. `client` reaches the
    coordinator."""
    if not data.endpoints().flower_port:
        yield
        return
    relay = Relay(
        tenant=TENANT,
        region=region,
        link=link,
        folder=data.child("gateways", region) / "relay",
        anchors=lambda: vouching.anchors,
        renew=vouching.refresh,
        reachable=reachable,
        ask=asking(client, region),
        metrics=metrics,
    )
    loop = asyncio.get_running_loop()

    def handle(command: Mapping[str, Any]) -> dict[str, Any]:
        """Runs in the Flower node's thread."""
        work = asyncio.run_coroutine_threadsafe(relay.carry_out(command), loop)
        try:
            return work.result(COMMAND_DEADLINE_S)
        except BaseException:
            work.cancel()
            raise

    place = superlink_place(data)
    node = FlowerNode(relay_name(region), place.address, place.ca, relay_key(data, region), handle)
    connected = metrics.gauge("relay_flower_connected", "1 while the SuperLink answers this region's relay.")
    connected.read_from(lambda: float(node.connected))
    running = asyncio.create_task(relay.run(), name="relay")
    try:
        if importlib.util.find_spec("flwr") is None:
            log.warning("region %s announces no rounds: Flower is missing; install atoll[relay] here", region)
        else:
            node.start()
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.to_thread(node.stop)
