"""A region's relay against a broker in memory: what it takes, what it refuses, and what is left after it died."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound, Unavailable
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.store import DirectoryStore
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import seal_envelope
from model_delta.trust.updater import TrustAnchors
from monitoring.metrics import Metrics
from regional_gateway.mirror import HEARD_S, Mirror
from regional_gateway.relay import ANNOUNCEMENTS_MAX, ASK_AFTER_S, Ask, Relay
from tests.fakes.link import FakeBroker

NOW = 1_000_000.0
TOPIC = topics.round_topic("acme", "fraud", "eu-west")


class Region:
    """A keyring that signs announcements, a broker, a device that listens, and a relay that may be started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keyring = EmbeddedKeyring.create(folder / "keyring", "acme")
        self.broker = FakeBroker()
        self.now = NOW
        self.heard: list[bytes] = []
        self.renewed: list[bool] = []

    def listen(self) -> None:
        device = self.broker.link("pos-0001")
        device.subscribe(TOPIC, lambda topic, payload: self.heard.append(payload))

    def relay(
        self,
        anchors: TrustAnchors | None = None,
        renew: Callable[[], Awaitable[None]] | None = None,
        ask: Ask | None = None,
    ) -> Relay:
        self.metrics = Metrics()
        return Relay(
            tenant="acme",
            region="eu-west",
            link=self.broker.link("gateway-eu-west"),
            folder=self.folder / "relay",
            anchors=lambda: anchors or self.keyring.anchors(),
            renew=renew,
            reachable=lambda: 7,
            ask=ask,
            metrics=self.metrics,
            clock=lambda: self.now,
            tick_s=0.01,
        )

    def announcement(self, role: str = "round", **changes: object) -> bytes:
        task = RoundTask(
            tenant="acme",
            model="fraud",
            round_id="r-1",
            base=digest_of(b"base"),
            training_graph=digest_of(b"graph"),
            parameters=(),
            length=8,
            issued=int(NOW),
            deadline=int(NOW) + 60,
        )
        return seal_envelope(self.keyring.sign(role, TASK_TYPE, pack(msgspec.structs.replace(task, **changes))))


def of_fraud(announcement: bytes) -> dict[str, object]:
    return {"announcements": {"fraud": announcement}}


def test_what_the_role_round_signed_is_retained_for_the_regions_devices(tmp_path: Path) -> None:
    async def story() -> None:
        region = Region(tmp_path)
        region.listen()
        relay, opened = region.relay(), region.announcement()
        expected = {"taken": {"fraud": digest_of(opened)}, "refused": {}, "reachable": 7}
        assert await relay.carry_out(of_fraud(opened)) == expected
        assert await relay.carry_out(of_fraud(opened)) == expected
        await asyncio.sleep(0)
        assert region.heard == [opened], "a duplicate is not published again"
        region.now += 3600
        closed = region.announcement(open=False, issued=int(NOW) + 1)
        assert (await relay.carry_out(of_fraud(closed)))["refused"] == {}
        assert region.broker.retained == {TOPIC: closed}

    asyncio.run(story())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"role": "plan"}, "SignatureInvalid"),
        ({"tenant": "other"}, "Untrusted"),
        ({"model": "other"}, "Untrusted"),
        ({"deadline": int(NOW) - 1}, "Expired"),
        ({"issued": int(NOW) - 1}, "RolledBack"),
    ],
)
def test_what_is_not_a_round_of_now_never_reaches_a_device(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    async def story() -> None:
        region = Region(tmp_path)
        region.listen()
        relay, good = region.relay(), region.announcement()
        await relay.carry_out(of_fraud(good))
        answer = await relay.carry_out(of_fraud(region.announcement(**changes)))  # type: ignore[arg-type]
        assert answer["taken"] == {}
        assert answer["refused"]["fraud"].startswith(f"{why}: ")
        assert region.broker.retained == {TOPIC: good}

    asyncio.run(story())


def test_a_command_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    async def story() -> None:
        relay = Region(tmp_path).relay()
        crowd = {f"m{number}": b"" for number in range(ANNOUNCEMENTS_MAX + 1)}
        commands: list[dict[str, object]] = [{}, {"announcements": {}}, {"announcements": crowd}]
        for command in [*commands, of_fraud(bytes(1 << 20))]:
            with pytest.raises(Malformed, match="relay eu-west"):
                await relay.carry_out(command)

    asyncio.run(story())


def test_keys_that_were_replaced_are_asked_for_once(tmp_path: Path) -> None:
    async def story() -> None:
        region = Region(tmp_path)
        stale = TrustAnchors("acme", {**region.keyring.anchors().roles})
        stale.roles["round"] = stale.roles["plan"]

        async def renew() -> None:
            stale.roles["round"] = region.keyring.anchors().roles["round"]

        opened = region.announcement()
        answer = await region.relay(stale, renew).carry_out(of_fraud(opened))
        assert answer["taken"] == {"fraud": digest_of(opened)}

    asyncio.run(story())


def test_killed_between_its_disk_and_the_broker_it_announces_at_its_next_start(tmp_path: Path) -> None:
    async def story() -> None:
        region = Region(tmp_path)
        region.listen()
        opened = region.announcement()
        region.broker.up = False
        with pytest.raises(Unavailable):
            await region.relay().carry_out(of_fraud(opened))  # and here it dies
        region.broker.up = True
        again = asyncio.create_task(region.relay().run())
        async with asyncio.timeout(5):
            while not region.heard:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        region.broker.up = False  # and the broker loses everything
        region.broker.retained.clear()
        await asyncio.sleep(0.05)
        region.broker.up = True
        async with asyncio.timeout(5):
            while TOPIC not in region.broker.retained:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        again.cancel()
        assert set(region.heard) == {opened}

    asyncio.run(story())


def test_devices_that_asked_the_mirror_lately_are_within_reach(tmp_path: Path) -> None:
    async def story() -> None:
        async def fetch(kind: str, name: str) -> bytes:
            raise Unavailable("the coordinator is away")

        broker = FakeBroker()
        mirror = Mirror(
            region="eu-west",
            link=broker.link("gateway-eu-west"),
            store=DirectoryStore(tmp_path),
            fetch=fetch,
            metrics=Metrics(),
        )
        serving = asyncio.create_task(mirror.run())
        await asyncio.sleep(0)
        for device in ("pos-0001", "pos-0002", "pos-0001"):
            await broker.link(device).publish(topics.up(device, "trust/eu-west"), b"a question")
        await asyncio.sleep(0.01)
        assert mirror.reachable() == 2
        mirror._heard["pos-0002"] -= HEARD_S + 1.0
        assert mirror.reachable() == 1
        serving.cancel()

    asyncio.run(story())


def test_a_clock_that_is_set_back_does_not_stop_the_announcing_again(tmp_path: Path) -> None:
    async def story() -> None:
        region = Region(tmp_path)
        relay, opened = region.relay(), region.announcement()
        await relay.carry_out(of_fraud(opened))
        running = asyncio.create_task(relay.run())
        await asyncio.sleep(0.05)
        region.now -= 86_400
        region.broker.retained.clear()  # a broker that lost its memory
        async with asyncio.timeout(5):
            while not region.broker.retained:  # noqa: ASYNC110 - the broker has no event for it
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())


# Asking whether a round is over


class Coordinator:
    """Answers as the coordinator does: with the newest that a relay has not got, or after a little waiting nothing."""

    def __init__(self) -> None:
        self.newest: dict[str, Any] = {}
        self.questions: list[tuple[str, dict[str, str]]] = []
        self.fails: Exception | None = None

    async def ask(self, word: str, have: Mapping[str, str]) -> Mapping[str, Any]:
        self.questions.append((word, dict(have)))
        await asyncio.sleep(0.005)
        if self.fails is not None:
            raise self.fails
        return {model: sealed for model, sealed in self.newest.items() if have.get(model) != digest_of(sealed)}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - neither broker nor relay has an event for it
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def asking(region: Region, coordinator: Coordinator, **command: object) -> AsyncIterator[Relay]:
    """A relay at work, told by a message that has these fields; leaving ends it."""
    relay = region.relay(ask=coordinator.ask)
    if command:
        await relay.carry_out(command)
    running = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=5)
        assert running.cancelled()


async def no_more_questions(coordinator: Coordinator) -> None:
    await asyncio.sleep(0.02)
    before = len(coordinator.questions)
    await asyncio.sleep(0.15)
    assert len(coordinator.questions) == before


def test_it_asks_until_the_round_is_over_and_says_what_it_announced(tmp_path: Path) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        region.listen()
        opened = region.announcement()
        async with asking(region, coordinator, **of_fraud(opened), word="w-1"):
            await until(lambda: len(coordinator.questions) > 2)
            assert coordinator.questions == [("w-1", {"fraud": digest_of(opened)})] * len(coordinator.questions)
            closed = region.announcement(open=False, issued=int(NOW) + 1)
            coordinator.newest["fraud"] = closed
            await until(lambda: coordinator.questions[-1] == ("w-1", {"fraud": digest_of(closed)}))
            assert region.broker.retained == {TOPIC: closed}
            await no_more_questions(coordinator)
        assert (region.heard[0], region.heard[-1]) == (opened, closed)
        for how in ("taken", "fetched"):
            assert region.metrics.value("atoll_relay_announcements_total", result=how) == 1

    asyncio.run(story())


@pytest.mark.parametrize(
    "bad",
    [
        lambda region: {"fraud": region.announcement(role="plan", open=False, issued=int(NOW) + 1)},
        lambda region: {"fraud": region.announcement(open=False, issued=int(NOW) - 1)},
        lambda region: {"fraud": region.announcement(open=False, issued=int(NOW) + 1, tenant="other")},
        lambda region: {"fraud": region.announcement(open=False, issued=int(NOW) + 1, model="other")},
        lambda region: {"other": region.announcement(open=False, issued=int(NOW) + 1, model="other")},
        lambda region: {"fraud": b"nothing that was ever signed"},
        lambda region: {"fraud": bytes(1 << 20)},
    ],
    ids=["forged", "older", "of another tenant", "of another model", "not asked about", "no envelope", "too long"],
)
def test_an_answer_that_would_not_do_as_a_message_never_reaches_a_device(
    tmp_path: Path, bad: Callable[[Region], dict[str, bytes]]
) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        opened = region.announcement()
        coordinator.newest = bad(region)
        async with asking(region, coordinator, **of_fraud(opened), word="w-1"):
            await until(lambda: len(coordinator.questions) > 1)
            assert region.broker.retained == {TOPIC: opened}
            assert all(have == {"fraud": digest_of(opened)} for _, have in coordinator.questions)
            closed = region.announcement(open=False, issued=int(NOW) + 1)
            coordinator.newest = {"fraud": closed}
            await until(lambda: region.broker.retained == {TOPIC: closed})

    asyncio.run(story())


def test_a_coordinator_that_is_away_is_asked_again_also_by_a_relay_that_was_restarted(tmp_path: Path) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        opened = region.announcement()
        coordinator.fails = Unavailable("the coordinator did not answer")
        async with asking(region, coordinator, **of_fraud(opened), word="w-1"):
            await asyncio.sleep(0.2)
            assert len(coordinator.questions) <= 2, "with growing pauses"
            await until(lambda: len(coordinator.questions) > 2)
        coordinator.questions.clear()
        coordinator.fails = None
        async with asking(region, coordinator):
            await until(lambda: coordinator.questions == [("w-1", {"fraud": digest_of(opened)})])

    asyncio.run(story())


def test_it_asks_for_no_longer_than_a_round_may_last_whatever_its_clock_does(tmp_path: Path) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        async with asking(region, coordinator, **of_fraud(region.announcement()), word="w-1"):
            region.now = NOW + 60 + ASK_AFTER_S
            await until(lambda: len(coordinator.questions) > 1)
            for jump in (0.5, 1e9):
                region.now += jump
                await no_more_questions(coordinator)
            before = len(coordinator.questions)
            region.now = 0.0
            await until(lambda: len(coordinator.questions) > before)

    asyncio.run(story())


def test_it_asks_by_no_word_that_is_not_known_any_more_and_by_none_at_all(tmp_path: Path) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        opened = region.announcement()
        coordinator.fails = NotFound("a coordinator that was started since")
        async with asking(region, coordinator, **of_fraud(opened)) as relay:
            await no_more_questions(coordinator)
            assert not coordinator.questions, "a coordinator that is not asked gives no word"
            for number, word in enumerate(("w-1", "w-2")):
                await relay.carry_out({**of_fraud(opened), "word": word})
                await until(lambda number=number: len(coordinator.questions) > number)  # type: ignore[misc]
                await no_more_questions(coordinator)
            for nonsense in (b"w-3", 3, "", "w" * 1000, None):
                await relay.carry_out({**of_fraud(opened), "word": nonsense})
            await no_more_questions(coordinator)
            assert [word for word, _ in coordinator.questions] == ["w-1", "w-2"]

    asyncio.run(story())


def test_what_the_broker_has_not_got_is_not_said_to_be_announced(tmp_path: Path) -> None:
    async def story() -> None:
        region, coordinator = Region(tmp_path), Coordinator()
        async with asking(region, coordinator, **of_fraud(region.announcement()), word="w-1"):
            region.broker.up = False
            closed = region.announcement(open=False, issued=int(NOW) + 1)
            coordinator.newest["fraud"] = closed
            await until(lambda: region.metrics.value("atoll_relay_announcements_total", result="failed") == 1)
            await no_more_questions(coordinator)
            assert digest_of(closed) not in [have["fraud"] for _, have in coordinator.questions]
            region.broker.up = True
            await until(lambda: region.broker.retained == {TOPIC: closed})

    asyncio.run(story())
