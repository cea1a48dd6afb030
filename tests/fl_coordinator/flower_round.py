"""A coordinator, three aggregators and two relays that reach each other over somebody's running Flower."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

from fl_coordinator.flower_bridge import FlowerBridge
from fl_coordinator.flower_node import FlowerNode, Handler
from fl_coordinator.local_round import LocalAggregators
from fl_coordinator.ports import Tell
from fl_coordinator.relaying import RelayQuestion, through
from fl_coordinator.round_command import stands_s
from fl_coordinator.shares.fixed_point import Rng
from model_delta.digest import digest_of
from tests.fl_coordinator.learning_platform import Aggregators, asked, honest
from tests.fl_coordinator.platform_in_memory import Device, Platform, adopt_first

REGIONS = ("eu-west", "ap-south")
AGGREGATORS = ("a0", "a1", "a2")
ROUND = asked(policy="robust", quorum=8, contributions_max=8, aggregation_s=60)

MakeNode = Callable[[str, Handler], FlowerNode]


def drawing(number: int) -> Rng:
    """Keys and coins (32 bytes) are always the same ones, everything else is random."""
    return lambda count: bytes([number + 1]) * count if count == 32 else os.urandom(count)


class FlowerRound(Platform):
    """Everything but Flower and the broker is real. `make_node` makes a registered node, not yet started."""

    def __init__(self, folder: Path, bridge: FlowerBridge, make_node: MakeNode) -> None:
        self.make_node = make_node
        self.nodes: dict[str, FlowerNode] = {}
        self.begun: dict[str, threading.Event] = {}
        """Set when the node of that name has taken up its first command; an aggregator, when it has an attempt."""
        super().__init__(folder, bridge=bridge)
        rngs = {name: drawing(number) for number, name in enumerate(AGGREGATORS)}
        self.local = LocalAggregators(tuple(rngs.values()), AGGREGATORS)
        self.aggregators = Aggregators(self, rngs)
        self.aggregators.on_attempt = lambda name: self.begun[name].set()
        self.stood: list[str] = []
        self.sent: list[str] = []
        """Whom a command to stand by has reached, and whom an attempt or an announcement, by Flower."""
        self.relaying: dict[str, asyncio.Task[None]] = {}
        assert self.local.keys == tuple(member.key for member in self.aggregators.members.values())

    def open(self) -> None:
        super().open()
        standing = self.coordinator._standing  # a platform would send attempts and ends if the machine were this busy
        standing._grace_s = standing._travel_s = self.coordinator._relaying._grace_s = 30.0

    def relays(self) -> Mapping[str, Tell]:
        return {region: through(self.bridge, f"relay-{region}", 60.0) for region in REGIONS}

    async def __aenter__(self) -> Self:
        self._life = contextlib.AsyncExitStack()
        await self._life.enter_async_context(self.running())
        for name, member in self.aggregators.members.items():
            self._start(name, member.carry_out)
        for region in REGIONS:
            self.start_relay(region)
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes.values():
            await asyncio.to_thread(node.stop)
        for task in self.relaying.values():
            task.cancel()
        await asyncio.gather(*self.relaying.values(), return_exceptions=True)
        await self._life.aclose()

    async def restart_aggregator(self, name: str) -> None:
        """As after a kill: whatever it was about to do is forgotten, and Flower sees it come again."""
        await asyncio.to_thread(self.nodes[name].stop)
        self.aggregators.start(name)
        self._start(name, self.aggregators.members[name].carry_out)

    def start_relay(self, region: str) -> None:
        """As a gateway that starts does."""

        async def ask(word: str, have: Mapping[str, str]) -> Mapping[str, bytes]:
            return await self.coordinator.round_ends(region, RelayQuestion(word, dict(have)), 2.0)

        relay = self.relay(region, self.broker.link(f"gateway-{region}"), ask)
        if region in self.relaying:
            self.relaying[region].cancel()
        self.relaying[region] = asyncio.create_task(relay.run())
        self._start(f"relay-{region}", relay.carry_out)

    def dies_with_its_first_command(self, region: str) -> asyncio.Event:
        """Has a relay that is about to be killed take a command and say no more; set when it has one."""
        name, loop, taken = f"relay-{region}", asyncio.get_running_loop(), asyncio.Event()

        def handle(command: Mapping[str, Any]) -> dict[str, Any]:
            loop.call_soon_threadsafe(taken.set)
            threading.Event().wait(30.0)
            return {}

        self.nodes[name]._handler = handle
        return taken

    @contextlib.asynccontextmanager
    async def keeps_its_answer(self, name: str) -> AsyncIterator[asyncio.Event]:
        """An aggregator that decides and opens its part, and is heard at the end only; set when it has opened."""
        node, loop, decided, go_on = self.nodes[name], asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        handler = node._handler

        def handle(command: dict[str, Any]) -> Mapping[str, Any]:
            answer = handler(command)
            loop.call_soon_threadsafe(decided.set)
            go_on.wait(30.0)
            return answer

        node._handler = handle
        try:
            yield decided
        finally:
            go_on.set()
            node._handler = handler
            for event in self.begun.values():
                event.clear()

    def announced_everywhere(self, round_id: str) -> bool:
        """Whether the devices of both regions have heard, and the coordinator has heard that they have."""
        told = self.coordinator._relaying.record(self.coordinator.round(round_id)).values()
        tasks = [one.task for one in self.devices.values()]
        heard = all(task is not None and task.round_id == round_id for task in tasks)
        return heard and all("announced_s" in one for one in told)

    def over_everywhere(self, round_id: str) -> bool:
        """Whether both relays have announced that a round is over, and the coordinator has heard that they have."""
        over = digest_of(self.coordinator.round(round_id).announcement)
        return all(relay.taken.get("fraud") == over for relay in self.coordinator._relaying._relays.values())

    async def ready(self) -> list[Device]:
        """Four devices in each region, on their first version."""
        devices = [self.device(f"pos-{region}-{number}", region=region) for region in REGIONS for number in range(4)]
        await adopt_first(self, devices)
        return devices

    async def contribute(self, devices: list[Device]) -> dict[str, bytes]:
        """One contribution each, by digest."""
        sent = {}
        for number, device in enumerate(devices):
            data = device.contribution((1 + number / 8) * honest(number))
            sent[digest_of(data)] = data
            await device.contribute(data)
        return sent

    def _start(self, name: str, work: Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        loop = asyncio.get_running_loop()

        async def done(command: Mapping[str, Any]) -> dict[str, Any]:
            return await work(command)

        begun = self.begun[name] = threading.Event()

        def handle(command: dict[str, Any]) -> Mapping[str, Any]:
            if stands_s(command) is None:
                begun.set()
                self.sent.append(name)
            else:
                self.stood.append(name)
            return asyncio.run_coroutine_threadsafe(done(command), loop).result(60.0)

        self.nodes[name] = self.make_node(name, handle)
        self.nodes[name].start()
