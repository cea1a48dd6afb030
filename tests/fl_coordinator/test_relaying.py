"""Rounds announced through relays that are down, slow, lying or killed: the round goes on, its record names them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from atoll.relay import asking
from fl_coordinator.control import control_app
from fl_coordinator.ports import Tell
from fl_coordinator.relaying import Relaying, RelayQuestion, through
from fl_coordinator.rounds import Round
from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.errors import Malformed, Unavailable
from model_delta.task import RoundTask
from model_delta.trust.signing import open_envelope
from regional_gateway.relay import Relay
from tests.fl_coordinator.control_calls import TOKENS, calls
from tests.fl_coordinator.learning_platform import Learning, asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import Device, Platform, on_a_loop, until

REGIONS = ("eu-west", "ap-south")


class Node:
    """A region's relay behind a line that a test can cut, delay or bend; `start` is what a restart is."""

    def __init__(self, platform: Regions, region: str) -> None:
        self.platform, self.region = platform, region
        self.messages: list[Mapping[str, Any]] = []
        self.asked = 0
        self.down = self.lying = self.hanging = self.dies = False
        self.questions: list[str] = []  # the digest of the announcement of `fraud` that it has, at each question
        self.deaf = False
        self.cut = asyncio.Event()
        self.running: asyncio.Task[None] | None = None
        self.start()

    def start(self) -> None:
        link = self.platform.broker.link(f"gateway-{self.region}")
        self.relay: Relay = self.platform.relay(self.region, link, self.ask if self.platform.asking else None)
        if self.running is not None:
            self.running.cancel()
        self.running = asyncio.create_task(self.relay.run())

    @property
    def folder(self) -> Path:
        return self.platform.folder / f"relay {self.region}"

    async def ask(self, word: str, have: Mapping[str, str]) -> Mapping[str, Any]:
        """As the gateway does, over HTTP without a socket."""
        app = control_app(self.platform.coordinator, tokens=TOKENS, flower=self.platform.bridge)
        headers = {"Authorization": f"Bearer {TOKENS['gateway']}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080", headers=headers) as client:
            answer = asyncio.ensure_future(asking(client, self.region)(word, have))
            cut = asyncio.ensure_future(self.cut.wait())
            self.questions.append(have["fraud"])
            try:
                await asyncio.wait([answer, cut], return_when=asyncio.FIRST_COMPLETED)
                if self.cut.is_set():
                    raise Unavailable("the coordinator is away")
                return {} if self.deaf else answer.result()
            finally:
                answer.cancel()
                cut.cancel()
                await asyncio.gather(answer, cut, return_exceptions=True)

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
    """A platform with a relay in each of two regions, and four devices there. A relay that may fetch an end is
    waited for longer than a test waits."""

    asking = False

    def open(self) -> None:
        super().open()
        self.coordinator._relaying._grace_s = 60.0

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
        # They do not ask, so one message for the opening and at once one for the end; nothing goes over the
        # coordinator's own line.
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


# The end of a round, for which a relay asks


class AskingRegions(Regions):
    """Relays that ask the coordinator over HTTP, as the gateway's do."""

    asking = True

    async def asked_about(self, found: Round) -> None:
        """Wait until both relays ask whether an open round is over."""
        digest = digest_of(found.announcement)
        await until(lambda: all(node.questions[-1:] == [digest] for node in self.nodes.values()))

    async def equal(self, round_id: str) -> None:
        """Wait until the coordinator has heard from both relays that they announced the newest of a round, and the
        devices have heard it too."""
        sealed, known = self.coordinator.round(round_id).announcement, self.coordinator._relaying._relays.values()
        await until(lambda: all(relay.taken.get("fraud") == digest_of(sealed) for relay in known))
        assert {self.broker.retained[topics.round_topic("acme", "fraud", region)] for region in REGIONS} == {sealed}

    @property
    def told(self) -> list[list[str]]:
        """Of each relay: what its messages were about, the round and whether it was open."""
        return [
            [
                f"{task.round_id} {'open' if task.open else 'over'}"
                for message in node.messages
                for sealed in message["announcements"].values()
                for task in [unpack(open_envelope(sealed).payload, RoundTask)]
            ]
            for node in self.nodes.values()
        ]


async def opened_and_asked_about(at: Learning, platform: AskingRegions, **changes: Any) -> Round:
    opened = await at.coordinator.open_round(msgspec.structs.replace(ASKED, **changes))
    await until(lambda: all("announced_s" in one for one in at.coordinator._relaying.record(opened).values()))
    await platform.asked_about(opened)
    return opened


@on_a_loop
async def test_a_relay_that_asks_learns_the_end_without_a_second_message(tmp_path: Path) -> None:
    platform = AskingRegions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        for number in (1, 2):
            opened = await opened_and_asked_about(at, platform, quorum=8, contributions_max=8)
            await contribute_all(at.devices, opened.round_id)
            ended = await at.ended(opened.round_id)
            assert (ended.state, ended.reason) == ("PUBLISHED", "")
            await platform.equal(ended.round_id)
            await until(lambda: all(device.task is not None and not device.task.open for device in at.devices))
            assert [len(told) for told in platform.told] == [number, number]
        asked_so_far = [len(node.questions) for node in platform.nodes.values()]
        await asyncio.sleep(0.1)
        assert [len(node.questions) for node in platform.nodes.values()] == asked_so_far, "nothing is open"


@pytest.mark.parametrize("fault", ["deaf", "cut", "killed", "without its disk"])
@on_a_loop
async def test_a_relay_that_does_not_come_back_with_the_end_is_sent_it(tmp_path: Path, fault: str) -> None:
    platform = AskingRegions(tmp_path)
    platform.coordinator._relaying._grace_s = 0.2
    async with learning(platform, platform.fleet()) as at:
        opened = await opened_and_asked_about(at, platform)
        bad = platform.nodes["ap-south"]
        if fault == "deaf":
            bad.deaf = True
        elif fault == "cut":
            bad.cut.set()
        elif fault == "killed":
            assert bad.running is not None
            bad.running.cancel()
        else:
            shutil.rmtree(bad.folder)
            bad.start()
        began = asyncio.get_running_loop().time()
        await at.coordinator.abort_round(opened.round_id)
        await at.ended(opened.round_id)
        await platform.equal(opened.round_id)
        assert platform.told[1] == [f"{opened.round_id} open", f"{opened.round_id} over"]
        assert fault == "without its disk" or asyncio.get_running_loop().time() - began >= 0.2


@on_a_loop
async def test_a_relay_that_was_restarted_goes_on_asking(tmp_path: Path) -> None:
    platform = AskingRegions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        opened = await opened_and_asked_about(at, platform)
        for node in platform.nodes.values():
            node.questions.clear()
            node.start()
        await platform.asked_about(opened)
        await at.coordinator.abort_round(opened.round_id)
        await at.ended(opened.round_id)
        await platform.equal(opened.round_id)
        assert platform.told == [[f"{opened.round_id} open"]] * 2


@pytest.mark.parametrize("when", ["while it is open", "when it is over"])
@on_a_loop
async def test_a_coordinator_that_died_tells_the_relays_and_is_asked_again(tmp_path: Path, when: str) -> None:
    platform = AskingRegions(tmp_path)
    nodes = platform.nodes.values()
    async with learning(platform, platform.fleet()) as at:
        opened = await opened_and_asked_about(at, platform)
        for node in nodes:
            node.cut.set()
        if when == "when it is over":
            await at.coordinator.abort_round(opened.round_id)
            await at.ended(opened.round_id)
    platform.reopen()
    for node in nodes:
        node.messages.clear()
        node.questions.clear()
        node.cut.clear()
    async with platform.running():
        if when == "while it is open":
            await until(lambda: all(node.messages for node in nodes))
            await platform.asked_about(opened)
            await platform.coordinator.abort_round(opened.round_id)
            await at.ended(opened.round_id)
        await platform.equal(opened.round_id)
        state = "open" if when == "while it is open" else "over"
        assert platform.told == [[f"{opened.round_id} {state}"]] * 2


@on_a_loop
async def test_a_new_round_is_a_message_at_once_and_the_end_before_it_none(tmp_path: Path) -> None:
    platform = AskingRegions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        first = await opened_and_asked_about(at, platform)
        for node in platform.nodes.values():
            node.deaf = True
        await at.coordinator.abort_round(first.round_id)
        await at.ended(first.round_id)
        second = await at.coordinator.open_round(ASKED)
        await platform.equal(second.round_id)
        assert platform.told == [[f"{first.round_id} open", f"{second.round_id} open"]] * 2


@on_a_loop
async def test_that_a_round_is_open_is_neither_handed_to_who_asks_nor_believed(tmp_path: Path) -> None:
    async def never(command: Mapping[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("nobody starts this one")

    platform = Regions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        opened = await at.coordinator.open_round(ASKED)
        relaying = Relaying(ledger=platform.ledger, relays={"eu-west": never}, clock=platform.clock, tick_s=1.0)
        relay = relaying._relays["eu-west"]
        for digest in (digest_of(opened.announcement), "0" * 64):
            began = asyncio.get_running_loop().time()
            assert await relaying.ends("eu-west", RelayQuestion(relay.word, {"fraud": digest}), 0.05) == {}
            assert asyncio.get_running_loop().time() - began >= 0.05
        assert not relay.taken


@on_a_loop
async def test_a_region_asks_for_itself_alone(tmp_path: Path) -> None:
    platform = AskingRegions(tmp_path)
    async with learning(platform, platform.fleet()) as at:
        opened = await opened_and_asked_about(at, platform)
        eu, ap = platform.nodes.values()
        call, word = calls(platform), eu.messages[0]["word"]

        async def ask(region: str, **body: Any) -> int:
            return (await call("POST", f"/v1/relays/{region}/ends?wait=0", "gateway", json=body)).status_code

        taken = {region: relay.taken for region, relay in at.coordinator._relaying._relays.items()}
        for node in (eu, ap):
            node.deaf = True
        await at.coordinator.abort_round(opened.round_id)
        over = digest_of((await at.ended(opened.round_id)).announcement)
        for region, tried in (("ap-south", word), ("eu-north", word), ("eu-west", ""), ("eu-west", "no such word")):
            assert await ask(region, word=tried, have={"fraud": over}) == 404
        assert over not in taken["ap-south"].values()
        assert await ask("eu-west", word=word, have={"other": over}) == 204, "no round of it is known"
        assert await ask("eu-west", word=word, have={"fraud": "0" * 64}) == 200
        assert over not in taken["eu-west"].values()
        for have in ({}, {str(number): over for number in range(17)}, {"fraud": 1}, ["fraud"], None):
            assert await ask("eu-west", word=word, have=have) == 400
        assert await ask("eu-west", word=word, have={"fraud": over}) == 204
        assert over in taken["eu-west"].values()
        for content in (b'{"word": "\\ud800", "have": {"fraud": ""}}', b"{", b"\xff"):
            assert (await call("POST", "/v1/relays/eu-west/ends", "gateway", content=content)).status_code == 400
