"""A platform that learns: its devices and three aggregators, and what tests of rounds do with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.aggregator import Aggregator
from fl_coordinator.coordinator import Coordinator
from fl_coordinator.flower_bridge import WireCommand, read_command, write_reply
from fl_coordinator.following import Following
from fl_coordinator.ledger import Ledger
from fl_coordinator.replay import Replay, replay
from fl_coordinator.round_command import stands_s
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.shares.contribution import CONTRIBUTION_TYPE, Claim, Contribution, parse, sealing_info
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.standing_by import FetchAttempt
from fl_coordinator.tables.records import AggregatorRecord
from fl_coordinator.updates_log import LogPart
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.errors import AtollError, NotFound, Unavailable
from model_delta.keys.encryption import seal_to
from model_delta.trust.signing import pre_authentication_encoding
from model_delta.trust.sitting_out import sitting_out_message
from monitoring.telemetry import SittingOut
from tests.fl_coordinator.platform_in_memory import FEATURES, Device, Platform, adopt_first, fleet, until

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


def asked(**changes: Any) -> RoundSpec:
    """The round that most tests ask for, with changes."""
    return msgspec.structs.replace(SPEC, **changes)


class CoordinatorsLog:
    """The log as the coordinator hands it out."""

    name = "embedded"

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    async def read_from(self, offset: int) -> LogPart:
        return await self._platform.coordinator.log_from(offset, 0.5)


class Aggregators:
    """Three aggregators in this process, and the ServerApp that fetches commands for them. `commands` are the attempts
    that any of them heard of, from wherever; `messages` is all that came by the bridge."""

    step_timeout_s = 10.0

    def __init__(self, platform: Platform, rngs: Mapping[str, Rng] | None = None) -> None:
        self.platform = platform
        self.down: set[str] = set()
        self.commands: list[dict[str, Any]] = []
        self.on_attempt: Callable[[str], None] = lambda name: None
        """Told who has come for the attempt that it stood by for."""
        self._attempts: dict[str, FetchAttempt] = {}
        self.messages: list[dict[str, Any]] = []
        self.deaf: set[str] = set()
        """Who does not get at what it stands by for."""
        self.answered = 0
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
            fetch_attempt=self._attempts_for(name),
            clock=self.platform.clock,
            step_timeout_s=self.step_timeout_s,
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

    def _attempts_for(self, name: str) -> FetchAttempt:
        """For the newest start of an aggregator: one that was killed before asks for nothing any more."""

        async def fetch(round_id: str) -> bytes | None:
            if self._attempts[name] is not fetch:
                raise NotFound(f"{name} was killed")
            if name in self.down | self.deaf:
                raise Unavailable(f"{name} is cut off")
            found = await self.platform.coordinator.attempt_for(round_id, name, 0.5)
            if found is not None:
                self._heard(unpack_plain(found))
                self.on_attempt(name)
            return found

        self._attempts[name] = fetch
        return fetch

    def _heard(self, command: dict[str, Any]) -> None:
        key = command["round_id"], command["attempt"]
        if key not in {(one["round_id"], one["attempt"]) for one in self.commands}:
            self.commands.append(command)

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
        carried: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                carried = {name: work for name, work in carried.items() if not work.done()}
                wire = await self.platform.bridge.next_command(1.0, carried)
                if wire is not None:
                    command = read_command(wire)
                    carried[command.id] = asyncio.create_task(self._carry(command))
        finally:
            for work in carried.values():
                work.cancel()
            await asyncio.gather(*carried.values(), return_exceptions=True)

    async def _carry(self, wire: WireCommand) -> None:
        command = unpack_plain(wire.payload)
        self.messages.append(command)
        if stands_s(command) is None:
            self._heard(command)
        replies, failures = {}, {}
        answers = await asyncio.gather(*(self._run(name, command) for name in wire.nodes))
        for name, answer in zip(wire.nodes, answers, strict=True):
            if isinstance(answer, str):
                failures[name] = answer
            else:
                replies[name] = pack(answer)
        self.platform.bridge.reply(write_reply(wire.id, replies, failures, failures.keys()))
        self.answered += 1

    async def _run(self, name: str, command: dict[str, Any]) -> dict[str, Any] | str:
        if name in self.down:
            return "is down"
        try:
            return await self.members[name].carry_out(command)
        except AtollError as error:
            return str(error)


def honest(seed: int) -> Any:
    return np.full(LENGTH, 0.05, np.float32) + np.random.default_rng(seed).normal(0, 0.002, LENGTH).astype(np.float32)


def signed(device: Device, **changes: Any) -> bytes:
    """The device's own contribution with another claim, signed all the same."""
    found = parse(device.contribution(honest(0)))
    claim = pack(msgspec.structs.replace(unpack(found.claim, Claim), **changes))
    message = pre_authentication_encoding(CONTRIBUTION_TYPE, claim)
    return pack(Contribution(claim, device.key.sign(message, ec.ECDSA(hashes.SHA256())), found.masked))


def inconsistent(device: Device) -> bytes:
    """A contribution whose seeds for one aggregator are not those that the other holders of its shares have."""
    assert device.task is not None
    first, _, third = unpack(parse(device.contribution(honest(0))).claim, Claim).sealed
    other = seal_to(device.task.aggregators[1].sealing, bytes(64), sealing_info(device.task, device.device_id, 1))
    return signed(device, sealed=(first, other, third))


def sitting_out(device: Device, round_id: str, reason: str) -> SittingOut:
    """What a device says of a round that it sits out."""
    assert device.task is not None
    message = sitting_out_message(msgspec.structs.replace(device.task, round_id=round_id), device.device_id, reason)
    return SittingOut(round_id, reason, device.key.sign(message, ec.ECDSA(hashes.SHA256())))


async def contribute_all(devices: list[Device], round_id: str, *, hostile: int = 0) -> None:
    await until(lambda: all(device.task is not None and device.task.round_id == round_id for device in devices))
    for index, device in enumerate(devices):
        update = -20 * honest(index) if index < hostile else honest(index)
        await device.contribute(device.contribution(update))
    await until(lambda: all(any(r.round_id == round_id for r in device.receipts) for device in devices))


class Learning:
    """What a test of rounds has at hand. The coordinator and the ledger are those of the newest start."""

    def __init__(self, place: Path | Platform, devices: int | Sequence[Device] = 8) -> None:
        self.platform = place if isinstance(place, Platform) else Platform(place)
        self.devices = fleet(self.platform, devices) if isinstance(devices, int) else list(devices)
        self.aggregators = Aggregators(self.platform)
        self.base = ""

    @property
    def coordinator(self) -> Coordinator:
        return self.platform.coordinator

    @property
    def ledger(self) -> Ledger:
        return self.platform.ledger

    async def ended(self, round_id: str) -> Round:
        """A round, once it has ended."""
        await until(lambda: not self.coordinator.round(round_id).live)
        return self.coordinator.round(round_id)

    async def learned(self, spec: RoundSpec, *, hostile: int = 0) -> Round:
        """A round from its announcement to its end, with every device in it."""
        opened = await self.coordinator.open_round(spec)
        await contribute_all(self.devices, opened.round_id, hostile=hostile)
        return await self.ended(opened.round_id)

    def mean(self, ended: Round) -> Any:
        """The mean that the aggregators opened, (LENGTH,) or empty."""
        return np.frombuffer(self._result(ended)[0], "<f4")

    def transcript(self, ended: Round) -> bytes:
        """The packed transcript of a round that the aggregators have decided."""
        return self._result(ended)[1]

    def replayed(self, ended: Round) -> Replay:
        """The replay of a round's transcript, which has to hold."""
        told = replay(self.transcript(ended), self.platform.keyring.anchors())
        assert told.holds, told.checks
        return told

    def _result(self, ended: Round) -> tuple[bytes, bytes]:
        result = self.ledger.round_result(ended.round_id)
        assert result is not None
        return result


@contextlib.asynccontextmanager
async def learning(place: Path | Platform, devices: int | Sequence[Device] = 8) -> AsyncIterator[Learning]:
    """A new platform at work, whose devices have adopted its first version; leaving is a crash."""
    at = Learning(place, devices)
    async with at.platform.running(), at.aggregators.serving():
        at.base = await adopt_first(at.platform, at.devices)
        yield at
