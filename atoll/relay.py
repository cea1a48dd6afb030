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

from atoll.flower_nodes import relay_key, superlink_place
from atoll.platform import relay_name
from atoll.settings import TENANT, DataFolder
from edge_runtime.link import MqttLink
from fl_coordinator.flower_node import FlowerNode
from monitoring.metrics import Metrics
from regional_gateway.relay import Relay
from regional_gateway.vouching import Vouching

COMMAND_DEADLINE_S = 30.0

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def relaying(
    data: DataFolder,
    region: str,
    *,
    link: MqttLink,
    vouching: Vouching,
    reachable: Callable[[], int],
    metrics: Metrics,
) -> AsyncIterator[None]:
    """Announce rounds in `region` while entered; nothing on a platform without Flower."""
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
