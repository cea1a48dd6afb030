"""The director over a broker in memory: reports in, plans out, and what of both survives a kill."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.director import COMPOSE_BYTES_MAX, Director
from fl_coordinator.publishing import Publisher
from model_delta import topics
from model_delta.encoding import pack, unpack
from model_delta.manifest import late_delivery_name
from model_delta.patch.route import DeviceLimits
from model_delta.plan import DeviceTraits, RolloutPlan
from model_delta.segments import read_tensor, stored_tensors
from model_delta.trust.director import (
    VERSION_REPORT_TYPE,
    DevicePlan,
    DirectorState,
    HeldFile,
    Question,
    VersionReport,
    accept_device_plan,
    walkable_route,
)
from model_delta.trust.signing import open_envelope, seal_envelope, sign
from monitoring.metrics import Metrics
from tests.fl_coordinator.platform_in_memory import Platform, fraud_model, on_a_loop, until

ROLLOUT = """
apiVersion: atoll/v1
kind: Rollout
metadata: {name: all}
spec:
  model: fraud
  cohorts: [{name: everyone}]
  strategy: {canary: {stages: [{share: 100%}]}}
"""


class Asking:
    """The device's half of directing: signed reports out, answers in."""

    def __init__(self, platform: Platform, device_id: str, **traits: str) -> None:
        self.platform, self.device = platform, platform.device(device_id, **traits)
        self.answers: list[topics.PlanAnswer] = []
        self.state = DirectorState()
        self.counter = 0
        self.device.link.subscribe(topics.down(device_id, "plan"), self._on_answer)

    def _on_answer(self, _topic: str, data: bytes) -> None:
        self.answers.append(unpack(data, topics.PlanAnswer))

    def report(self, wanted: str = "", held: tuple[str, ...] = (), **fields: Any) -> VersionReport:
        self.counter += 1
        files = tuple(HeldFile(one, self.platform.publisher.manifest(one).merkle_root) for one in held)
        settled: dict[str, Any] = {
            "tenant": "acme",
            "device_id": self.device.device_id,
            "model": "fraud",
            "wanted": wanted,
            "running": held[0] if held else "",
            "held": files,
            "plan_serial": self.device.plan_serial,
            "director_serial": self.state.serial,
            "nonce": self.counter.to_bytes(16, "big"),
            "counter": self.counter,
            "time": int(self.platform.clock()),
        }
        return VersionReport(**{**settled, **fields})

    def signed(self, report: VersionReport, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
        return seal_envelope(sign(VERSION_REPORT_TYPE, pack(report), [key or self.device.key]))

    async def send(self, data: bytes) -> None:
        await self.device.link.publish(topics.up(self.device.device_id, "version"), data)

    async def ask(self, wanted: str, held: tuple[str, ...] = (), **fields: Any) -> topics.PlanAnswer:
        report = self.report(wanted, held, **fields)
        before = len(self.answers)
        await self.send(self.signed(report))
        await until(lambda: len(self.answers) > before)
        assert self.answers[-1].nonce == report.nonce
        return self.answers[-1]

    def accepted(self, answer: topics.PlanAnswer) -> DevicePlan:
        """The plan in an answer, by every check that a device makes."""
        newest = self.platform.ledger.plan("fraud")
        assert newest is not None
        rollout = unpack(open_envelope(newest[1]).payload, RolloutPlan)
        traits = DeviceTraits(self.device.device_id, "acme", "pos", "eu-west")
        plan, self.state = accept_device_plan(
            answer.plan,
            Question("fraud", answer.nonce),
            self.platform.keyring.anchors(),
            self.state,
            rollout,
            traits,
            self.platform.clock(),
        )
        return plan


async def published(platform: Platform, count: int) -> list[str]:
    """Manifests of versions that differ a little from each other, the last of them rolled out to everybody."""
    found: list[str] = []
    source = fraud_model(hidden=1_500)
    tensor = next(one for one in stored_tensors(source) if one.name == "layer0.weight")
    weights = read_tensor(source, tensor).copy()
    rng = np.random.default_rng(1)
    for _ in range(count):
        weights.reshape(-1)[rng.choice(weights.size, 1_500, replace=False)] += np.float32(0.03)
        source = source[: tensor.offset] + weights.tobytes() + source[tensor.offset + tensor.size :]
        parent = found[-1] if found else None
        now = platform.clock()
        found.append(platform.publisher.publish(source, model="fraud", now=now, parent=parent).manifest)
    await platform.coordinator.start_rollout(ROLLOUT, found[-1])
    return found


@on_a_loop
async def test_a_device_is_told_how_to_get_to_its_version(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        first, second = await published(platform, 2)
        whole = one.accepted(await one.ask(second))
        assert [step.kind for step in whole.steps] == ["whole"]
        answer = await one.ask(second, (first,))
        plan = one.accepted(answer)
        assert (plan.target, plan.serial) == (second, whole.serial + 1)
        assert [(step.kind, step.base) for step in plan.steps] == [("patch", first)]
        want = platform.publisher.manifest(second)
        route = walkable_route(plan, want, files={first}, pieces=(), manifests={}, limits=DeviceLimits())
        assert route.bytes < want.size


@pytest.mark.slow
@on_a_loop
async def test_a_device_far_behind_gets_a_patch_made_on_the_spot(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        versions = await published(platform, 5)
        name = late_delivery_name(versions[-1], versions[0])
        platform.store.remove("delivery", name)
        plan = one.accepted(await one.ask(versions[-1], (versions[0],)))
        assert [(step.kind, step.base) for step in plan.steps] == [("patch", versions[0])]
        assert platform.store.has("delivery", name)


@on_a_loop
async def test_what_does_not_fit_a_device_is_not_planned(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        first, second = await published(platform, 2)
        answer = await one.ask(second, (first,), formats=("bsdiff40",))
        assert {step.format for step in one.accepted(answer).steps} <= {"bsdiff40", ""}
        refused = await one.ask(second, (first,), flash_bytes=10)
        assert refused.plan == b""
        assert "within 10 B of flash" in refused.error
        there = await one.ask(second, (second,))
        assert "stands on pos-0001 already" in there.error


@on_a_loop
async def test_a_damaged_file_is_healed_by_the_segments_that_are_spoilt(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        (first,) = await published(platform, 1)
        manifest = platform.publisher.manifest(first)
        spoilt = HeldFile(first, "0" * 64, (0,))
        await one.send(one.signed(msgspec.structs.replace(one.report(first), held=(spoilt,))))
        await until(lambda: bool(one.answers))
        plan = one.accepted(one.answers[-1])
        assert [(step.kind, step.segments) for step in plan.steps] == [("replace", (0,))]
        assert len(manifest.segments) > 1


@on_a_loop
async def test_a_device_that_missed_the_rollout_plan_is_given_it(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        (first,) = await published(platform, 1)
        answer = await one.ask(first, plan_serial=0)
        newest = platform.ledger.plan("fraud")
        assert newest is not None
        assert answer.rollout == newest[1]
        assert (await one.ask(first, plan_serial=newest[0])).rollout == b""


@pytest.mark.slow
@on_a_loop
async def test_a_blob_that_the_region_has_is_preferred_where_it_is_cheaper(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    chain, late = Asking(platform, "pos-0001"), Asking(platform, "pos-0002")
    async with platform.running():
        versions = await published(platform, 5)
        first, second, third = versions[0], versions[2], versions[-1]
        direct = late.accepted(await late.ask(third, (first,), cached_cost=1.0))
        assert [step.base for step in direct.steps] == [first]
        platform.coordinator._director._in_region.clear()
        platform.store.remove("delivery", late_delivery_name(third, first))
        chain_blobs = chain.accepted(await chain.ask(third, (second,)))
        assert [step.base for step in chain_blobs.steps] == [second]
        delivery = platform.publisher.delivery(second)
        in_region = platform.coordinator._director._in_region["eu-west"]
        in_region.update({offer.blob.digest: None for offer in delivery.offers})
        cheap = late.accepted(await late.ask(third, (first,), cached_cost=0.0))
        assert [step.target for step in cheap.steps] == [second, third]


@pytest.mark.parametrize("attack", ["forged", "another device", "replayed", "another model", "garbage", "revoked"])
@on_a_loop
async def test_reports_that_do_not_count_change_nothing_and_are_not_answered(tmp_path: Path, attack: str) -> None:
    platform = Platform(tmp_path)
    one, two = Asking(platform, "pos-0001"), Asking(platform, "pos-0002")
    async with platform.running() as coordinator:
        (first,) = await published(platform, 1)
        await one.ask(first)
        before = platform.ledger.directed("pos-0001")
        match attack:
            case "forged":
                data = one.signed(one.report(first), two.device.key)
            case "another device":
                data = two.signed(two.report(first))
            case "replayed":
                data = before["fraud"].report
            case "another model":
                data = one.signed(one.report(first, model="x" * 2_000))
            case "garbage":
                data = b"\xff" * 100
            case _:
                data = one.signed(one.report(first))
                coordinator.revoke("pos-0001")
        await one.send(data)
        if attack != "revoked":
            await one.ask(first)  # behind it in the queue, and answered
            assert len(one.answers) == 2
            assert platform.ledger.directed("pos-0001")["fraud"].counter == one.counter
        else:
            await two.ask(first)
            assert platform.ledger.directed("pos-0001") == before
        assert set(platform.ledger.directed("pos-0001")) == {"fraud"}


def test_serials_and_counters_survive_a_kill_and_an_older_copy_of_the_ledger(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")

    async def first_life() -> str:
        async with platform.running():
            (first,) = await published(platform, 1)
            for _ in range(3):
                one.accepted(await one.ask(first))
        return first

    async def second_life(first: str, serial: int) -> None:
        async with platform.running():
            await one.send(one.signed(one.report(first, counter=3)))
            assert one.accepted(await one.ask(first)).serial == serial
            assert len(one.answers) == 4, "the repeated counter was not answered"

    first = asyncio.run(first_life())
    platform.reopen()
    asyncio.run(second_life(first, 4))
    platform.ledger._db.execute("UPDATE version_reports SET serial = 1")  # as an older copy has it
    platform.reopen()
    one.answers[:] = one.answers[:3]
    asyncio.run(second_life(first, 5))


@on_a_loop
async def test_what_was_sent_into_a_region_is_remembered(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        (first,) = await published(platform, 1)
        one.accepted(await one.ask(first))
    known = list(platform.coordinator._director._in_region["eu-west"])
    assert known
    platform.reopen()
    platform.coordinator._director.recall()
    assert list(platform.coordinator._director._in_region["eu-west"]) == known


@on_a_loop
async def test_an_alarm_is_told_to_people_once(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    async with platform.running():
        (first,) = await published(platform, 1)
        for _ in range(2):
            await one.send(one.signed(one.report(alarm="no director answered 3 times")))
        await one.ask(first, alarm="device plan 3: expected the nonce")
        told = [event.text for event in platform.ledger.events() if event.kind == "alert"]
        assert told == [
            "pos-0001: no director answered 3 times",
            "pos-0001: device plan 3: expected the nonce",
        ]
        (kept,) = platform.ledger.directed("pos-0001").values()
        assert unpack(open_envelope(kept.report).payload, VersionReport).wanted == first


@on_a_loop
async def test_a_keyring_without_a_directors_key_answers_that_it_cannot(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    one = Asking(platform, "pos-0001")
    del platform.keyring._roles["director"]
    async with platform.running():
        (first,) = await published(platform, 1)
        answer = await one.ask(first)
        assert answer.plan == b""
        assert "role 'director'" in answer.error


@pytest.mark.slow
@on_a_loop
async def test_a_patch_of_a_large_file_is_made_later(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    later: list[tuple[str, str]] = []

    class Large(Publisher):
        """Says that its versions are large."""

        def manifest(self, manifest: str) -> Any:
            return msgspec.structs.replace(super().manifest(manifest), size=COMPOSE_BYTES_MAX + 1)

    async with platform.running():
        versions = await published(platform, 5)
        platform.store.remove("delivery", late_delivery_name(versions[-1], versions[0]))
        platform.publisher.__class__ = Large
        director = Director(
            tenant="acme",
            ledger=platform.ledger,
            keyring=platform.keyring,
            link=platform.broker.link("coordinator-2"),
            publisher=platform.publisher,
            metrics=Metrics(),
            clock=platform.clock,
            note=lambda kind, text: None,
            want_direct=lambda base, target: later.append((base, target)),
        )
        one = Asking(platform, "pos-0001")
        director.inbox.put(topics.up("pos-0001", "version"), one.signed(one.report(versions[-1], (versions[0],))))
        await director.answer()
        assert later == [(versions[0], versions[-1])]


def test_one_device_cannot_crowd_out_the_others(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    inbox = platform.coordinator._director.inbox
    taken = [inbox.put(topics.up("pos-0001", "version"), b"x") for _ in range(10)]
    assert taken.count(True) == 4
    assert inbox.put(topics.up("pos-0002", "version"), b"x")
    assert not inbox.put(topics.up("pos-0003", "version"), bytes(70_000))
