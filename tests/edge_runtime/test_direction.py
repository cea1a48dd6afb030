"""The device's half of directing, against a director that an attacker silences, forges, repeats or holds the key of."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from edge_runtime.direction import SILENCES_ALARM, Direction, Standing, held_files
from edge_runtime.identity import Identity
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, StorageFailed
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import Blob, manifest_digest
from model_delta.patch.route import NO_LIMITS, Route
from model_delta.plan import DeviceTraits, RolloutPlan
from model_delta.topics import PlanAnswer, device_of, down
from model_delta.trust.director import (
    DEVICE_PLAN_TYPE,
    VERSION_REPORT_TYPE,
    DevicePlan,
    HeldFile,
    VersionReport,
)
from model_delta.trust.signing import key_id, open_envelope, seal_envelope, sign, verify
from tests.edge_runtime.world import eventually
from tests.fakes.link import FakeBroker
from tests.model_delta.trust.test_director import BAD, DEVICE, MODEL, NOW, OLD, PATCH, ROLLOUT, TARGET, TENANT, WANT

Answer = Callable[[VersionReport, DevicePlan], bytes | PlanAnswer | None]

HELD = (HeldFile(OLD, OLD),)


class Desk:
    """A director's desk on a broker in memory. `answer` decides what is sent to a report; mutate it."""

    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker()
        self.now = NOW
        self.keyring = EmbeddedKeyring.create(folder / "keys", TENANT, lambda: self.now)
        self.identity = Identity.create(folder / "identity", DEVICE)
        self.folder = folder
        self.reports: list[VersionReport] = []
        self.serial = 0
        self.rollout: RolloutPlan | None = ROLLOUT
        self.offered: list[bytes] = []
        self.answer: Answer = lambda report, plan: self.signed(plan)

    def start(self) -> None:
        link = self.broker.link("coordinator")
        link.subscribe("atoll/1/dev/+/up/version", self._heard)
        self._link = link

    def _heard(self, topic: str, payload: bytes) -> None:
        public = self.identity.private.public_key()
        report = unpack(verify(open_envelope(payload), VERSION_REPORT_TYPE, {key_id(public): public}), VersionReport)
        assert device_of(topic) == report.device_id
        self.reports.append(report)
        if not report.wanted:
            return
        self.serial += 1
        plan = DevicePlan(
            tenant=TENANT,
            device_id=DEVICE,
            model=MODEL,
            target=report.wanted,
            steps=(PATCH,),
            nonce=report.nonce,
            serial=self.serial,
            issued=int(self.now),
            expires=int(self.now) + 600,
        )
        answer = self.answer(report, plan)
        if isinstance(answer, bytes):
            answer = PlanAnswer(report.nonce, answer)
        if answer is not None:
            self.broker.deliver(down(DEVICE, "plan"), pack(answer))

    def signed(self, plan: DevicePlan) -> bytes:
        return seal_envelope(self.keyring.sign("director", DEVICE_PLAN_TYPE, pack(plan)))

    def direction(self, **options: Any) -> Direction:
        settings: dict[str, Any] = {
            "identity": self.identity,
            "traits": DeviceTraits(DEVICE, TENANT, "pos", "eu-west"),
            "model": MODEL,
            "link": self.broker.link(DEVICE),
            "path": self.folder / "direction.record",
            "anchors": self.keyring.anchors,
            "rollout": lambda: self.rollout,
            "offered": self.offered.append,
            "standing": lambda: Standing(OLD, 1, 7),
            "held": lambda: HELD,
            "clock": lambda: self.now,
            "limits": NO_LIMITS,
            "answer_deadline_s": 5.0,
            "ask_again_s": 0.0,
        }
        direction = Direction(**{**settings, **options})
        direction.start()
        return direction


async def asked(direction: Direction) -> Route | None:
    return await direction.route(WANT, held=HELD, files={OLD}, pieces=(), manifests={}, at_hand=("b" * 64,))


def play(story: Callable[[Desk], Awaitable[None]], folder: Path) -> None:
    async def whole() -> None:
        desk = Desk(folder)
        desk.start()
        await story(desk)

    asyncio.run(whole())


def test_an_answer_is_followed(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        direction = desk.direction(cached_cost=0.5)
        route = await asked(direction)
        assert route is not None
        assert [(step.kind, step.base, step.target) for step in route.steps] == [("patch", OLD, TARGET)]
        (report,) = desk.reports
        assert (report.wanted, report.running, report.held) == (TARGET, OLD, (HeldFile(OLD, OLD),))
        assert (report.release_floor, report.plan_serial, report.cached_cost) == (1, 7, 0.5)
        assert report.at_hand == ("b" * 64,)
        assert report.formats == ("bsdiff40", "tp1")
        assert (direction.directed, direction.refused, direction.alarm) == (1, 0, "")

    play(story, tmp_path)


def test_counters_and_serials_go_on_after_a_power_cut(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        await asked(desk.direction())
        await asked(desk.direction())
        first, second = desk.reports
        assert second.counter > first.counter == int(NOW * 1000)
        assert (first.director_serial, second.director_serial) == (0, 1)
        assert second.nonce != first.nonce
        desk.now -= 40 * 86_400  # the clock was set back
        await asked(desk.direction())
        assert desk.reports[-1].counter > second.counter
        desk.serial = 1  # a director with an older memory
        direction = desk.direction()
        assert await asked(direction) is None
        assert "expected a serial above 3, found 2" in direction.alarm

    play(story, tmp_path)


STRANGER = ed25519.Ed25519PrivateKey.generate()


def changed(**fields: Any) -> Callable[[Desk], Answer]:
    """A director whose key was stolen: whatever it signs is signed rightly."""
    return lambda desk: lambda report, plan: desk.signed(msgspec.structs.replace(plan, **fields))


def replayed(desk: Desk) -> Answer:
    kept: list[bytes] = []

    def answer(report: VersionReport, plan: DevicePlan) -> bytes:
        kept.append(desk.signed(plan))
        return kept[0]

    return answer


ATTACKS: dict[str, tuple[Callable[[Desk], Answer], str]] = {
    "wrong device": (changed(device_id="pos-0002"), "expected device 'pos-0001', found 'pos-0002'"),
    "old nonce": (changed(nonce=bytes(16)), "expected the nonce of the question just asked"),
    "expired plan": (changed(expires=int(NOW)), "expired at"),
    "an invented model": (changed(target=digest_of(b"evil")), "a director cannot choose the version"),
    "a release below the floor": (changed(target=OLD), "a director cannot choose the version"),
    "a withdrawn version": (changed(target=BAD), "was withdrawn by plan 'spring' serial 7"),
    "the stable version instead": (changed(target=ROLLOUT.stable), "expected steps to .*: a mixed bundle"),
    "mixed bundle": (changed(steps=(msgspec.structs.replace(PATCH, base=BAD),)), "a mixed bundle"),
    "partial bundle": (changed(steps=(msgspec.structs.replace(PATCH, blobs=()),)), "a partial bundle"),
    "endless data": (changed(steps=(msgspec.structs.replace(PATCH, blobs=(Blob(OLD, 1 << 40),)),)), "at most"),
    "forged": (
        lambda desk: lambda report, plan: seal_envelope(sign(DEVICE_PLAN_TYPE, pack(plan), [STRANGER])),
        "expected 1 valid signature",
    ),
    "signed by the plan role": (
        lambda desk: lambda report, plan: seal_envelope(desk.keyring.sign("plan", DEVICE_PLAN_TYPE, pack(plan))),
        "expected 1 valid signature",
    ),
    "garbage": (lambda desk: lambda report, plan: b"\xff\xff", "CBOR"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_else_is_answered_is_refused_told_and_planned_around(tmp_path: Path, attack: str) -> None:
    make, words = ATTACKS[attack]

    async def story(desk: Desk) -> None:
        honest = desk.answer
        desk.answer = make(desk)
        direction = desk.direction()
        assert await asked(direction) is None
        assert direction.refused == 1
        assert re.search(words, direction.alarm)
        desk.answer = honest
        assert await asked(desk.direction()) is not None, "the device is not lost to its director"
        assert desk.reports[-1].alarm[:40] == direction.alarm[:40]
        assert desk.reports[0].alarm == ""

    play(story, tmp_path)


def test_a_replayed_plan_is_refused(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.answer = replayed(desk)
        direction = desk.direction()
        assert await asked(direction) is not None
        assert await asked(direction) is None
        assert "a repeated answer" in direction.alarm

    play(story, tmp_path)


def test_answers_to_nobody_are_not_looked_at(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        honest = desk.answer

        def noisy(report: VersionReport, plan: DevicePlan) -> bytes | PlanAnswer | None:
            topic = down(DEVICE, "plan")
            desk.broker.deliver(topic, b"\xff")
            desk.broker.deliver(topic, bytes(1_000_000))
            desk.broker.deliver(topic, pack(PlanAnswer(bytes(16), b"x")))
            return honest(report, plan)

        desk.answer = noisy
        direction = desk.direction()
        assert await asked(direction) is not None
        assert direction.alarm == ""

    play(story, tmp_path)


def test_a_silenced_director_is_planned_around_and_told_after_a_while(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        honest = desk.answer
        desk.answer = lambda report, plan: None
        direction = desk.direction(answer_deadline_s=0.1)
        for number in range(SILENCES_ALARM):
            assert direction.alarm == ""
            assert await asked(direction) is None
            assert len(desk.reports) == number + 1
        assert direction.alarm == "no director answered 3 questions in a row"
        desk.answer = honest
        again = desk.direction()  # also after a power cut
        assert await asked(again) is not None
        assert desk.reports[-1].alarm == direction.alarm
        assert again.alarm == "", "it was heard"

    play(story, tmp_path)


def test_an_alarm_that_nobody_hears_is_told_for_a_day(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        direction = desk.direction()
        direction.failed("its route did not lead there")
        desk.now += 86_399
        assert desk.direction().alarm == direction.alarm == "its route did not lead there"
        desk.now += 1
        assert desk.direction().alarm == direction.alarm == ""

    play(story, tmp_path)


def test_a_device_does_not_ask_again_at_once(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.answer = lambda report, plan: None
        direction = desk.direction(answer_deadline_s=0.1, ask_again_s=60.0)
        await asked(direction)
        await asked(direction)
        assert len(desk.reports) == 1

    play(story, tmp_path)


def test_a_director_that_cannot_plan_is_no_alarm(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.answer = lambda report, plan: PlanAnswer(report.nonce, error="nothing leads there")
        direction = desk.direction()
        assert await asked(direction) is None
        assert (direction.refused, direction.alarm) == (0, "")

    play(story, tmp_path)


def test_a_rollout_plan_that_comes_along_is_offered_first(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.rollout = msgspec.structs.replace(ROLLOUT, target=OLD)
        desk.answer = lambda report, plan: PlanAnswer(report.nonce, desk.signed(plan), b"sealed rollout")

        def offered(data: bytes) -> None:
            assert data == b"sealed rollout"
            desk.rollout = ROLLOUT

        assert await asked(desk.direction(offered=offered)) is not None

    play(story, tmp_path)


def test_nobody_is_asked_without_a_directors_key_or_a_line(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        anchors = desk.keyring.anchors()
        bare = msgspec.structs.replace(anchors, roles={"plan": anchors.roles["plan"]})
        assert await asked(desk.direction(anchors=lambda: bare)) is None
        desk.broker.up = False
        assert await asked(desk.direction()) is None
        assert desk.reports == []

    play(story, tmp_path)


def test_an_installation_is_reported_once_the_line_is_there(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        direction = desk.direction()
        life = asyncio.create_task(direction.run())
        desk.broker.up = False
        direction.installed()
        await asyncio.sleep(0.02)
        desk.broker.up = True
        await eventually(lambda: len(desk.reports) == 1)
        assert desk.reports[0].wanted == ""
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    play(story, tmp_path)


def test_nothing_is_followed_that_could_not_be_written_down(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        direction = desk.direction(path=tmp_path / "missing" / "direction.record")
        with pytest.raises(StorageFailed, match=r"direction\.record \(No such file"):
            await asked(direction)
        assert desk.reports == []

    play(story, tmp_path)


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    (tmp_path / "direction.record").write_bytes(b"junk")
    with pytest.raises(Malformed, match=r"direction record at .*move the file away"):
        Desk(tmp_path).direction()


def test_what_stands_on_the_device_is_told_with_its_roots() -> None:
    whole = manifest_digest(WANT)
    other = msgspec.structs.replace(WANT, release=3)
    spoilt = manifest_digest(other)
    pieces = {WANT.segments[0].digest, WANT.segments[2].digest}
    found = held_files({whole: WANT, spoilt: other}, {whole}, pieces, lambda digest: "f" * 64)
    assert set(found) == {HeldFile(whole, WANT.merkle_root), HeldFile(spoilt, "f" * 64, (1,))}
