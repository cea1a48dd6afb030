"""Rounds announced through relays that are down, slow, lying or killed: the round goes on, its record names them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fl_coordinator.ports import Tell
from fl_coordinator.relaying import Relaying, through
from model_delta import topics
from model_delta.encoding import unpack
from model_delta.errors import Malformed, Unavailable
from model_delta.task import RoundTask
from model_delta.trust.signing import open_envelope
from regional_gateway.relay import Relay
from tests.fl_coordinator.learning_platform import asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import Device, Platform, on_a_loop, until

REGIONS = ("eu-west", "ap-south")


class Node:
    """A region's relay behind a line that a test can cut, delay or bend; `start` is what a restart is."""

    def __init__(self, platform: Regions, region: str) -> None:
        self.platform, self.region = platform, region
        self.messages: list[Mapping[str, Any]] = []
        self.asked = 0
        self.down = self.lying = self.hanging = self.dies = False
        self.start()

    def start(self) -> None:
        self.relay: Relay = self.platform.relay(self.region, self.platform.broker.link(f"gateway-{self.region}"))

    async def tell(self, command: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked += 1
        if self.down:
            await asyncio.sleep(0.02)
            raise Unavailable("is not online")
        self.messages.append(command)
        if self.hanging:
            await asyncio.Event().wait()
        if self.lying:
            return {"taken": {"fraud": "0" * 64}, "refused": {}, "reachable": 4}
        answer = await self.relay.carry_out(command)
        if self.dies:
            self.down = True
            raise Unavailable("did not answer in time")
        return answer

    def announced(self) -> RoundTask | None:
        sealed = self.platform.broker.retained.get(topics.round_topic("acme", "fraud", self.region))
        return None if sealed is None else unpack(open_envelope(sealed).payload, RoundTask)


class Regions(Platform):
    """A platform with a relay in each of two regions, and four devices there."""

    def relays(self) -> Mapping[str, Tell]:
        if not hasattr(self, "nodes"):
            self.nodes = {region: Node(self, region) for region in REGIONS}
        return {region: node.tell for region, node in self.nodes.items()}

    def fleet(self) -> list[Device]:
        return [
            self.device(f"pos-{region}-{number}", region=region, device_class="pos")
            for region in REGIONS
            for number in range(4)
        ]


ASKED = asked(quorum=4, selected_min=3, hostile_max=0, contributions_max=4)


def alerts(platform: Platform) -> list[str]:
    return [event.text for event in platform.ledger.events() if event.kind == "alert"]


@on_a_loop
async def test_every_regions_devices_hear_of_a_round_from_their_own_relay(tmp_path: Path) -> None:
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        ended = await at.learned(msgspec.structs.replace(ASKED, quorum=8, contributions_max=8))
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        told = ended.figures["relays"]
        assert {region: (one["devices"], one["contributions"]) for region, one in told.items()} == {
            "eu-west": (-1, 4),
            "ap-south": (-1, 4),
        }
        await until(lambda: all(not device.task.open for device in at.devices if device.task is not None))
        # One message for the opening, one for the end; nothing goes over the coordinator's own line.
        assert [len(node.messages) for node in platform.nodes.values()] == [2, 2]
        assert topics.round_topic("acme", "fraud") not in platform.broker.retained


@pytest.mark.parametrize("fault", ["down", "lying", "hanging"])
@on_a_loop
async def test_a_relay_that_fails_stops_nobody_and_is_named(tmp_path: Path, fault: str) -> None:
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        bad = platform.nodes["ap-south"]
        setattr(bad, fault, True)
        opened = await at.coordinator.open_round(ASKED)
        if fault != "hanging":
            await until(lambda: bad.asked > 1)  # asked again: its first answer has been heard
        await contribute_all(at.devices[:4], opened.round_id)
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason) == ("PUBLISHED", "")
        assert bad.announced() is None
        assert ended.figures["relays"]["eu-west"]["contributions"] == 4
        why = {
            "down": "is not online",
            "lying": "it did not say that it took this announcement",
            "hanging": "did not answer yet",
        }[fault]
        assert ended.figures["relays"]["ap-south"] == {"failure": why, "contributions": 0}
        assert f"round {ended.round_id}: relay of ap-south did not announce it: {why}" in alerts(platform)


@on_a_loop
async def test_a_relay_whose_region_stays_silent_is_named(tmp_path: Path) -> None:
    """It says that it announced the round, and did not: only its devices' silence shows."""
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        bad = platform.nodes["ap-south"]
        honest = bad.relay.carry_out

        async def silent(command: Mapping[str, Any]) -> dict[str, Any]:
            platform.broker.lose = lambda topic, payload: topic.endswith("/ap-south")
            return {**await honest(command), "reachable": 4}

        bad.relay.carry_out = silent  # type: ignore[method-assign]
        opened = await at.coordinator.open_round(ASKED)
        await contribute_all(at.devices[:4], opened.round_id)
        await at.ended(opened.round_id)
        said = f"round {opened.round_id}: relay of ap-south says that it announced it, but none of its 4 devices"
        assert f"{said} came" in alerts(platform)


@pytest.mark.parametrize("when", ["before it heard", "after it announced"])
@on_a_loop
async def test_a_killed_relay_that_returns_gets_the_open_announcement_again(tmp_path: Path, when: str) -> None:
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        node = platform.nodes["ap-south"]
        node.down, node.dies = when == "before it heard", when == "after it announced"
        opened = await at.coordinator.open_round(ASKED)
        await until(lambda: at.coordinator.round(opened.round_id).state == "COLLECTING")
        await until(lambda: "ap-south" not in at.coordinator._relaying.record(opened) or node.down)
        node.down = node.dies = False
        node.start()
        await until(lambda: "announced_s" in at.coordinator._relaying.record(opened)["ap-south"])
        task = node.announced()
        assert task is not None
        assert task.round_id == opened.round_id
        assert task.open
        await at.coordinator.abort_round(opened.round_id)
        await until(lambda: not (node.announced() or task).open)


@on_a_loop
async def test_no_relay_at_all_ends_the_round_by_name(tmp_path: Path) -> None:
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        for node in platform.nodes.values():
            node.down = True
        opened = await at.coordinator.open_round(ASKED)
        await until(lambda: "is not online" in str(at.coordinator._relaying.record(opened)))
        platform.clock.now += 60
        ended = await at.ended(opened.round_id)
        assert ended.state == "FAILED"
        assert ended.reason == (
            "the deadline passed before it could be announced: relay of eu-west did not announce it: "
            "is not online; relay of ap-south did not announce it: is not online"
        )


@on_a_loop
async def test_a_coordinator_that_died_tells_the_relays_again(tmp_path: Path) -> None:
    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        opened = await at.coordinator.open_round(ASKED)
    platform.reopen()
    async with platform.running():
        await until(lambda: at.coordinator.round(opened.round_id).state == "COLLECTING")
        await until(lambda: all(node.announced() is not None for node in platform.nodes.values()))


@pytest.mark.parametrize("steps", range(5))
@on_a_loop
async def test_relaying_ends_even_when_there_is_news_in_the_same_moment(tmp_path: Path, steps: int) -> None:
    async def away(command: Mapping[str, Any]) -> Mapping[str, Any]:
        raise Unavailable("is not online")

    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        await at.coordinator.open_round(ASKED)
    relaying = Relaying(ledger=platform.ledger, relays={"eu-west": away}, clock=platform.clock, tick_s=15.0)

    async def relayed() -> None:
        async with asyncio.TaskGroup() as group:
            relaying.start(group)

    work = asyncio.create_task(relayed())
    await until(lambda: relaying._relays["eu-west"].failure == "is not online")
    relaying.wake()
    for _ in range(steps):
        await asyncio.sleep(0)
    work.cancel()
    await asyncio.wait([work], timeout=10.0)
    assert work.cancelled()


@on_a_loop
async def test_a_relay_is_one_node_and_somebody_must_be_told(tmp_path: Path) -> None:
    class Bridge:
        async def command(self, payload: Any, nodes: Any, deadline_s: float) -> dict[str, dict[str, Any]]:
            return {node: {"asked": dict(payload), "nodes": list(nodes)} for node in nodes}

    answer = await through(Bridge(), "relay-eu-west")({"announcements": {}})
    assert answer == {"asked": {"announcements": {}}, "nodes": ["relay-eu-west"]}
    with pytest.raises(Malformed, match="at least one"):
        Relaying(ledger=Platform(tmp_path).ledger, relays={}, clock=lambda: 0.0, tick_s=1.0)
