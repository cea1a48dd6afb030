import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fl_coordinator.aggregator import Aggregator
from fl_coordinator.coordinator import Coordinator
from fl_coordinator.flower_bridge import read_command, write_reply
from fl_coordinator.following import Following
from fl_coordinator.masters import apply_mean
from fl_coordinator.promotion import Evaluation
from fl_coordinator.replay import replay
from fl_coordinator.rounds import RoundSpec, State
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.tables.records import AggregatorRecord
from fl_coordinator.updates_log import LogPart
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable
from model_delta.manifest import Manifest
from tests.fl_coordinator.platform_in_memory import FEATURES, Device, Platform, fraud_model, until
from tests.fl_coordinator.test_coordinator import adopt_first

LENGTH = FEATURES * 4 + 4 + 4 + 1
SPEC = RoundSpec(
    model="fraud",
    quorum=6,
    hostile_max=1,
    selected_min=4,
    deadline_s=30,
    clip_norm_l2=1.0,
    aggregation_s=20,
    policy="krum",
)


class CoordinatorsLog:
    """The log as the coordinator hands it out."""

    name = "embedded"

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    async def read_from(self, offset: int) -> LogPart:
        return await self._platform.coordinator.log_from(offset, 0.5)


class Aggregators:
    """Three aggregators in this process, and the ServerApp that fetches commands for them."""

    def __init__(self, platform: Platform, rngs: Mapping[str, Rng] | None = None) -> None:
        self.platform = platform
        self.down: set[str] = set()
        self.commands: list[dict[str, Any]] = []
        self.memories_asked = 0
        self.fetched = 0
        self._rngs = rngs or {}
        self.members: dict[str, Aggregator] = {}
        for name in ("a0", "a1", "a2"):
            self.start(name)
            platform.coordinator.register_aggregator(AggregatorRecord(self.members[name].key, f"http://{name}"))

    def start(self, name: str) -> None:
        """(Re)start an aggregator on its folder, as after a kill."""
        if name in self.members:
            self.members[name].close()
        self.members[name] = Aggregator(
            name,
            self.platform.folder / name,
            anchors=self.platform.keyring.anchors(),
            ca_pem=self.platform.keyring.ca_pem(),
            revoked=self.platform.keyring.revoked,
            fetch=self._fetch,
            send=self._sender(name),
            fetch_memory=self._fetch_memory,
            clock=self.platform.clock,
            step_timeout_s=1.0,
            rng=self._rngs.get(name, os.urandom),
        )

    def following(self, name: str) -> Following:
        """What keeps copies of the platform's log for an aggregator."""
        return self.members[name].following(CoordinatorsLog(self.platform), self._announcement)

    def copies(self, name: str, round_id: str) -> list[str]:
        """The digests of what an aggregator keeps of a round, in the order in which it came."""
        return list(self.members[name]._copies.devices(round_id))

    async def _announcement(self, round_id: str) -> bytes:
        return await asyncio.to_thread(self.platform.coordinator.announcement, round_id)

    async def _fetch(self, round_id: str, digest: str) -> bytes:
        self.fetched += 1
        return await asyncio.to_thread(self.platform.coordinator.frozen_contribution, round_id, digest)

    async def _fetch_memory(self, round_id: str) -> bytes:
        self.memories_asked += 1
        return await asyncio.to_thread(self.platform.coordinator.memory_proof, round_id)

    def _sender(self, sender: str) -> Any:
        async def send(peer: str, name: str, data: bytes) -> None:
            if peer in self.down:
                raise Unavailable(f"{peer} is down")
            self.members[peer].deliver(sender, name, data)

        return send

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[dict[str, Following]]:
        """All three follow the log; leaving is a kill."""
        followings = {name: self.following(name) for name in self.members}
        tasks = [asyncio.create_task(self.members[name].follow(followings[name])) for name in followings]
        try:
            yield followings
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _serve(self) -> None:
        while True:
            wire = await self.platform.bridge.next_command(1.0)
            if wire is None:
                continue
            command_id, nodes, payload, _ = read_command(wire)
            command = unpack_plain(payload)
            self.commands.append(command)
            replies, failures = {}, {}
            for name, answer in zip(
                nodes, await asyncio.gather(*(self._run(name, command) for name in nodes)), strict=True
            ):
                if isinstance(answer, str):
                    failures[name] = answer
                else:
                    replies[name] = pack(answer)
            self.platform.bridge.reply(write_reply(command_id, replies, failures))

    async def _run(self, name: str, command: dict[str, Any]) -> dict[str, Any] | str:
        if name in self.down:
            return "is down"
        try:
            return await self.members[name].run_round(command)
        except AtollError as error:
            return str(error)


def fleet(platform: Platform, count: int = 8) -> list[Device]:
    return [platform.device(f"pos-{number:04}") for number in range(count)]


def honest(seed: int) -> Any:
    return np.full(LENGTH, 0.05, np.float32) + np.random.default_rng(seed).normal(0, 0.002, LENGTH).astype(np.float32)


async def contribute_all(devices: list[Device], round_id: str, *, hostile: int = 0) -> None:
    await until(lambda: all(device.task is not None and device.task.round_id == round_id for device in devices))
    for index, device in enumerate(devices):
        update = -20 * honest(index) if index < hostile else honest(index)
        await device.contribute(device.contribution(update))
    await until(lambda: all(any(r.round_id == round_id for r in device.receipts) for device in devices))


def state(platform: Platform, round_id: str) -> State:
    return platform.coordinator.round(round_id).at


def test_a_round_learns_from_the_honest_and_publishes(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            base = await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            with pytest.raises(Unavailable, match="wait for its end"):
                await coordinator.open_round(SPEC)
            await contribute_all(devices, opened.round_id, hostile=1)
            await until(lambda: not coordinator.round(opened.round_id).live)
            ended = coordinator.round(opened.round_id)
            assert (ended.state, ended.reason) == ("PUBLISHED", "")
            assert ended.rejected.keys() == {"pos-0000"}
            assert sorted(ended.chosen) == [f"pos-{number:04}" for number in range(1, 8)]
            manifest = platform.publisher.manifest(ended.candidate)
            assert manifest.parents == (base,)
            assert (manifest.lineage.round_id, manifest.lineage.contributions_root) == (ended.round_id, ended.root)
            before, after = platform.publisher.source(base), platform.publisher.source(ended.candidate)
            assert len(before) == len(after)
            result = platform.ledger.round_result(opened.round_id)
            assert result is not None
            mean = np.frombuffer(result[0], "<f4")
            expected = np.mean([honest(seed) for seed in range(1, 8)], axis=0)
            assert np.abs(mean - expected).max() < 1e-3
            assert replay(result[1], platform.keyring.anchors()).holds
            await until(lambda: all(device.task is not None and not device.task.open for device in devices))
            # Too late: the round is over, and its receipt says so.
            late = devices[0]
            assert late.task is not None
            await late.contribute(late.contribution(honest(99)))
            await until(lambda: len(late.receipts) == 2)
            assert not late.receipts[1].accepted

    asyncio.run(story())


def test_a_resent_contribution_counts_once_and_gets_its_receipt_again(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 6)
    Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator:
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            first, second = devices[0], devices[1]
            await until(lambda: all(device.task is not None for device in devices))
            data = first.contribution(honest(0))
            for _ in range(3):
                await first.contribute(data)
            await until(lambda: len(first.receipts) == 3)
            assert [receipt.accepted for receipt in first.receipts] == [True, True, True]
            await first.contribute(first.contribution(honest(1)))  # a second, different one
            await until(lambda: len(first.receipts) == 4)
            assert first.receipts[3].reason.startswith("duplicate")
            await second.contribute(data)  # somebody else's, on the wrong line
            await until(lambda: len(second.receipts) == 1)
            assert second.receipts[0].reason.startswith("unknown certificate")
            broken = bytearray(second.contribution(honest(1)))
            broken[-5] ^= 1
            await second.contribute(bytes(broken))
            await until(lambda: len(second.receipts) == 2)
            assert not second.receipts[1].accepted
            assert [entry.device_id for entry in platform.ledger.contributions(opened.round_id)] == ["pos-0000"]
            assert sum(platform.ledger.refusals(opened.round_id).values()) == 3
            await coordinator.abort_round(opened.round_id)
            await until(lambda: state(platform, opened.round_id) is State.FAILED)

    asyncio.run(story())


def test_too_few_contributions_fail_the_round_by_name(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 6)
    Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator:
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            await contribute_all(devices[:2], opened.round_id)
            platform.clock.now += 60
            await until(lambda: state(platform, opened.round_id) is State.FAILED)
            assert "quorum of 6 contributions, found 2" in coordinator.round(opened.round_id).reason

    asyncio.run(story())


def test_an_aggregator_that_is_down_is_tried_again_with_the_same_set(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)
    aggregators.down = {"a1"}

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            await contribute_all(devices, opened.round_id)
            await until(lambda: len(coordinator.round(opened.round_id).failures) >= 1, 15)
            aggregators.down = set()
            await until(lambda: not coordinator.round(opened.round_id).live, 15)
            ended = coordinator.round(opened.round_id)
            assert ended.state == "PUBLISHED"
            assert "a1" in ended.failures[0]
            assert {command["root"] for command in aggregators.commands} == {ended.root}
            attempts = [command["attempt"] for command in aggregators.commands]
            assert attempts == sorted(set(attempts))
            assert len(attempts) > 1

    asyncio.run(story())


def test_every_crash_of_the_coordinator_during_a_round_is_survived(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator:
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            await contribute_all(devices[:4], opened.round_id)
        platform.reopen()  # died while collecting
        async with platform.running() as coordinator:
            await until(lambda: state(platform, opened.round_id) is State.COLLECTING)
            await contribute_all(devices, opened.round_id)
            await until(lambda: coordinator.round(opened.round_id).attempt == 1)
        platform.reopen()  # died while the aggregators were asked
        async with platform.running() as coordinator, aggregators.serving():
            await until(lambda: not coordinator.round(opened.round_id).live, 20)
            ended = coordinator.round(opened.round_id)
            assert ended.state == "PUBLISHED"
            assert ended.attempt == 2
            assert len(ended.frozen) == 8
        platform.reopen()
        async with platform.running() as coordinator:
            assert coordinator.round(opened.round_id).candidate == ended.candidate

    asyncio.run(story())


def test_aggregators_read_while_the_round_is_open_whoever_is_killed_meanwhile(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator:
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            async with aggregators.reading() as followings:
                await contribute_all(devices[:3], opened.round_id)
                await until(lambda: all(following.counts["kept"] == 3 for following in followings.values()))
        platform.reopen()  # the coordinator died while it collected
        aggregators.start("a1")  # and one of the aggregators
        async with platform.running() as coordinator, aggregators.reading() as followings:
            assert followings["a1"].reached == followings["a0"].reached > 0
            await contribute_all(devices, opened.round_id)
            await until(lambda: all(following.counts["kept"] == 5 for following in followings.values()))
            await until(lambda: coordinator.round(opened.round_id).root)
        aggregators.start("a2")  # died after the freeze, before the command
        async with platform.running() as coordinator, aggregators.serving():
            await until(lambda: not coordinator.round(opened.round_id).live, 20)
            ended = coordinator.round(opened.round_id)
            assert (ended.state, ended.reason) == ("PUBLISHED", "")
            assert len(ended.frozen) == 8
            for name in aggregators.members:
                assert tuple(aggregators.copies(name, ended.round_id)) == ended.frozen
            assert aggregators.fetched == 0
            async with aggregators.reading():
                await until(lambda: not any(aggregators.copies(name, ended.round_id) for name in aggregators.members))

    asyncio.run(story())


def test_contributions_of_ended_rounds_are_let_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    platform = Platform(tmp_path, segment_bytes=1)  # a file for each batch
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    def files() -> int:
        return len(list((tmp_path / "log").glob("*.log")))

    async def one_round(coordinator: Coordinator, name: str) -> None:
        aggregators.down = {"a0"}
        opened = await coordinator.open_round(msgspec.structs.replace(SPEC, name=name))
        for device in devices:
            await contribute_all([device], opened.round_id)
        await until(lambda: coordinator.round(opened.round_id).attempt > 0)
        assert files() >= 8
        assert len(platform.frozen_contributions(opened.round_id)) == 8  # aggregators may ask until the end
        aggregators.down = set()
        await until(lambda: not coordinator.round(opened.round_id).live)
        await until(lambda: files() <= 2)
        with pytest.raises(NotFound):
            platform.frozen_contributions(opened.round_id)
        with pytest.raises(NotFound, match="has ended, it is PUBLISHED"):
            coordinator.announcement(opened.round_id)
        assert coordinator.round(opened.round_id).state == "PUBLISHED"
        result = platform.ledger.round_result(opened.round_id)
        assert result is not None
        assert replay(result[1], platform.keyring.anchors()).holds

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            for name in ("first", "second"):
                await one_round(coordinator, name)

    asyncio.run(story())


def test_a_candidate_that_is_worse_is_not_released(tmp_path: Path) -> None:
    def evaluate(manifest: Manifest, file: bytes) -> Evaluation:
        return Evaluation(average_precision=0.2 if manifest.parents else 0.6, size_bytes=len(file))

    platform = Platform(tmp_path, evaluate)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            opened = await coordinator.open_round(SPEC)
            await contribute_all(devices, opened.round_id)
            await until(lambda: not coordinator.round(opened.round_id).live, 15)
            ended = coordinator.round(opened.round_id)
            assert ended.state == "REFUSED"
            assert "precision: average precision 0.2000, stable 0.6000" in ended.reason
            assert len(platform.ledger.releases("fraud")) == 1

    asyncio.run(story())


def test_a_round_that_is_asked_for_twice_under_one_name_is_one_round(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)
    named = msgspec.structs.replace(SPEC, name="monday")

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            first = await coordinator.open_round(named)
            assert (await coordinator.open_round(named)).round_id == first.round_id
            with pytest.raises(Unavailable, match="wait for its end"):
                await coordinator.open_round(msgspec.structs.replace(SPEC, name="tuesday"))
            await contribute_all(devices, first.round_id)
            await until(lambda: not coordinator.round(first.round_id).live, 15)
            again = await coordinator.open_round(named)
            assert (again.round_id, again.state) == (first.round_id, "PUBLISHED")
            assert len(platform.ledger.rounds()) == 1

    asyncio.run(story())


def test_a_round_that_cannot_work_is_refused_before_anybody_trains(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform, 3)

    async def story() -> None:
        async with platform.running() as coordinator:
            with pytest.raises(Malformed, match="no stable version"):
                await coordinator.open_round(SPEC)
            await adopt_first(platform, devices)
            with pytest.raises(Malformed, match="three aggregators"):
                await coordinator.open_round(SPEC)
            with pytest.raises(Malformed, match="quorum"):
                await coordinator.open_round(RoundSpec(model="fraud", quorum=8, hostile_max=5))
            assert platform.ledger.rounds() == []

    asyncio.run(story())


def test_masters_move_by_the_mean_and_nothing_else_changes() -> None:
    source = fraud_model(5)
    changed = apply_mean(source, np.zeros(LENGTH, np.float32))
    assert changed == source
    mean = np.zeros(LENGTH, np.float32)
    mean[0] = 0.5
    moved = apply_mean(source, mean)
    assert sum(a != b for a, b in zip(source, moved, strict=True)) <= 4
    with pytest.raises(Malformed, match="expected 33 parameters"):
        apply_mean(source, mean[:-1])
    mean[0] = np.inf
    with pytest.raises(Malformed, match="not finite"):
        apply_mean(source, mean)
