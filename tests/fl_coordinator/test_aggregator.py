"""Three aggregator shells on a network in memory: whole rounds, crashes, liars, and commands that must be refused."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from device_sim.faults import plain_average
from fl_coordinator.aggregation import OPENING_TYPE, Opening, combine_openings
from fl_coordinator.aggregator import RUNS_MAX, Aggregator
from fl_coordinator.aggregator_state import RoundProgress
from fl_coordinator.channel import Channel, ChannelMessage
from fl_coordinator.privacy import Spend, Spent, epsilon
from fl_coordinator.round_command import KEPT_S
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.freezing import Frozen
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, DigestMismatch, Expired, Malformed, SignatureInvalid, Unavailable, Untrusted
from model_delta.merkle import root
from model_delta.task import TASK_TYPE
from model_delta.trust.signing import open_envelope, seal_envelope, sign
from tests.fakes.secure_round import NAMES, NOW, SecureRound

LENGTH = 120


class Platform:
    """Three aggregators in folders under `path`. `dead` names get no message, nor is one in `lost` delivered."""

    def __init__(self, path: Path, **changes: object) -> None:
        self.path = path
        self.now = NOW
        self.dead: set[str] = set()
        self.lost: set[tuple[str, str, str]] = set()  # sender, receiver, step
        self.last_step = ("", "")  # who dies when it sends its first message of which step
        self.step_timeout_s = 0.6
        self.trace: list[tuple[str, str, str, bytes]] = []
        self.data: list[bytes] = []
        self.spent: Spent | None = None
        self.put_up: dict[str, Any] | None = None
        self.deliveries: dict[str, list[bytes]] = {}
        self.fetched: list[tuple[str, int]] = []
        self.aggregators: dict[str, Aggregator] = {}
        self.world = SecureRound(length=LENGTH, **changes)
        for name in NAMES:
            self.start(name)
        keys = tuple(self.aggregators[name].key for name in NAMES)
        self.world.task = msgspec.structs.replace(self.world.task, aggregators=keys)

    def start(self, name: str) -> None:
        """(Re)start an aggregator's process on its folder."""

        async def fetch(round_id: str, digest: str) -> bytes:
            assert round_id == self.world.task.round_id
            place = [digest_of(data) for data in self.data].index(digest)
            self.fetched.append((name, place))
            return self.deliveries.get(name, self.data)[place]

        async def fetch_attempt(round_id: str) -> bytes | None:
            return pack(self.put_up) if self.put_up is not None else None

        async def send(peer: str, step: str, data: bytes) -> None:
            if (name, step) == self.last_step and name not in self.dead:
                self.dead.add(name)
                self.died.set()
                await asyncio.Event().wait()
            if peer in self.dead or name in self.dead:
                raise Unavailable(f"{peer}: connection refused")
            self.trace.append((name, peer, step, data))
            if (name, peer, step) not in self.lost:
                self.aggregators[peer].deliver(name, step, data)

        if name in self.aggregators:
            self.aggregators[name].close()
        self.aggregators[name] = Aggregator(
            name,
            self.path / name,
            anchors=self.world.anchors,
            ca_pem=self.world.ca_pem,
            revoked=lambda: frozenset(),
            fetch=fetch,
            send=send,
            fetch_attempt=fetch_attempt,
            clock=lambda: self.now,
            step_timeout_s=self.step_timeout_s,
        )

    def stand_by(self) -> dict[str, Any]:
        """The command that comes with the announcement."""
        task = self.world.task
        return {"round_id": task.round_id, "task": self.world.announcement(), "stands_s": 30.0}

    def contribute(self, updates: Sequence[np.ndarray]) -> None:
        self.data = [self.world.contribution(f"pos-{i:04d}", update) for i, update in enumerate(updates)]

    def command(self, attempt: int = 1, **changes: object) -> dict[str, Any]:
        digests = [digest_of(data) for data in self.data]
        return {
            "round_id": self.world.task.round_id,
            "attempt": attempt,
            "task": self.world.announcement(),
            "contributions": digests,
            "root": root([bytes.fromhex(digest) for digest in digests]),
            "spent": msgspec.to_builtins(self.spent),
            **changes,
        }

    def run(self, attempt: int = 1, names: Sequence[str] = NAMES, **changes: object) -> list[Any]:
        """Every named aggregator's answer, or what it raised."""
        command = self.command(attempt, **changes)

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(
                *(self.aggregators[name].run_round(command) for name in names), return_exceptions=True
            )

        return asyncio.run(all_of_them())

    def run_until_death(self, victim: str, step: str) -> tuple[list[Any], float]:
        """The first attempt with a death in it: what the other two raise, and how long after it they did. The dead one
        is started again on its folder, all of them with patience."""
        self.last_step = (victim, step)
        others = [name for name in NAMES if name != victim]

        async def story() -> tuple[list[Any], float]:
            self.died = asyncio.Event()
            command = self.command(1)
            doomed = asyncio.create_task(self.aggregators[victim].run_round(command))
            runs = [asyncio.create_task(self.aggregators[name].run_round(command)) for name in others]
            async with asyncio.timeout(60.0):
                await self.died.wait()
            died = time.monotonic()
            doomed.cancel()
            failures = await asyncio.gather(*runs, return_exceptions=True)
            return failures, time.monotonic() - died

        found = asyncio.run(story())
        self.last_step, self.dead, self.step_timeout_s = ("", ""), set(), 10.0
        for name in NAMES:
            self.start(name)
        return found


def updates(count: int = 8, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=LENGTH)
    return [(0.05 * (common + rng.normal(size=LENGTH))).astype(np.float32) for _ in range(count)]


def steps_in(trace: list[tuple[str, str, str, bytes]]) -> set[str]:
    return {step for _, _, step, _ in trace}


def test_a_round_from_contributions_to_the_mean(tmp_path: Path) -> None:
    platform = Platform(tmp_path, hostile_max=2, selected_min=5)
    honest = updates()
    platform.contribute([*honest, -4 * honest[0], -4 * honest[1]])
    aggregate = combine_openings(platform.run(), platform.world.task)
    assert aggregate.decision.selected == tuple(range(8))
    assert {verdict.device_id for verdict in aggregate.decision.devices if verdict.reason} == {"pos-0008", "pos-0009"}
    assert aggregate.mean is not None
    assert np.abs(aggregate.mean - np.mean(honest, axis=0)).max() < 2.0**-16
    attacked = plain_average([*honest, -4 * honest[0], -4 * honest[1]])
    assert np.linalg.norm(attacked - np.mean(honest, axis=0)) > 0.5 * np.linalg.norm(np.mean(honest, axis=0))


def test_asked_again_it_gives_the_same_bytes_also_after_a_restart(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    first = platform.run()
    messages = len(platform.trace)
    assert platform.run() == first
    for name in NAMES:
        platform.start(name)
    assert platform.run() == first
    assert len(platform.trace) == messages
    assert platform.run(attempt=2) == first
    assert steps_in(platform.trace[messages:]) == {"hello", "agree"}


def test_two_askers_of_one_attempt_share_one_run(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    answers = platform.run(names=NAMES * 2)
    assert answers[:3] == answers[3:]
    assert combine_openings(answers[:3], platform.world.task).mean is not None


def test_an_attempt_that_is_fetched_and_sent_as_well_is_one_run_whatever_comes_first(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    command = platform.command()

    async def story() -> list[Any]:
        own = [platform.aggregators[name] for name in NAMES]
        standing = [asyncio.create_task(one.carry_out(platform.stand_by())) for one in own]
        await asyncio.sleep(0.01)
        sent = [asyncio.create_task(own[0].carry_out(command))]  # one has it by Flower before it can come for it
        await asyncio.sleep(0.01)
        platform.put_up = command
        await asyncio.sleep(0.1)
        sent += [asyncio.create_task(one.carry_out(command)) for one in own[1:]]
        answers: list[Any] = await asyncio.gather(*standing, *sent, return_exceptions=True)
        return answers

    answers = asyncio.run(story())
    assert answers[:3] == answers[3:]
    assert combine_openings(answers[:3], platform.world.task).mean is not None
    assert len([1 for _, _, step, _ in platform.trace if step == "hello"]) == 6, "each greets the other two once"
    assert asyncio.run(platform.aggregators["north"].carry_out(platform.stand_by())) in answers, "also when it is over"


def test_rounds_that_stood_and_come_at_once_are_bounded_and_nothing_of_them_is_begun(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.put_up = platform.command()
    own = platform.aggregators["north"]

    async def story() -> None:
        running = {f"other-{n}": (None, asyncio.create_task(asyncio.sleep(3600))) for n in range(RUNS_MAX)}
        own._running.update(running)  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match=f"is still busy with {RUNS_MAX} rounds"):
            await own.carry_out(platform.stand_by())

    asyncio.run(story())
    assert platform.trace == []
    assert not list(tmp_path.glob("*/round/*"))


def test_a_missing_aggregator_fails_the_round_by_name_and_a_new_attempt_succeeds(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.dead = {"south"}
    failures = platform.run(names=NAMES[:2])
    for failure in failures:
        assert isinstance(failure, Unavailable)
        assert "south" in str(failure)
        assert "nothing was opened" in str(failure)
    assert not list(tmp_path.glob("*/reply/*"))
    platform.dead = set()
    for name in NAMES:
        platform.start(name)
    again = platform.run(names=NAMES[:2])
    assert "attempt 1 was begun and did not finish; ask again as attempt 2" in str(again[0])
    assert combine_openings(platform.run(attempt=2), platform.world.task).mean is not None


@pytest.mark.parametrize(
    "step",
    ["compare", "coin", "range-carry-8", "range-bit-1", "range-check", "range", "lift-small", "gram", "gram-zero"],
)
def test_dying_in_any_step_opens_nothing(tmp_path: Path, step: str) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates(4))
    platform.lost = {("centre", peer, step) for peer in NAMES} | {("north", "centre", step)}
    failures = platform.run()
    assert all(isinstance(failure, Unavailable) for failure in failures), failures
    assert not list(tmp_path.glob("*/reply/*"))
    platform.lost = set()
    assert combine_openings(platform.run(attempt=2), platform.world.task).mean is not None


def test_an_attempt_that_failed_after_the_coin_does_not_get_another_one(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates(4))
    platform.lost = {("centre", peer, "gram") for peer in NAMES}
    assert all(isinstance(failure, Unavailable) for failure in platform.run())
    kept = [unpack(file.read_bytes(), RoundProgress) for file in tmp_path.glob("*/round/*")]
    assert len(kept) == 3
    platform.lost = set()
    for name in NAMES:
        platform.start(name)
    decision = combine_openings(platform.run(attempt=2), platform.world.task).decision
    said = [unpack(open_envelope(frozen).payload, Frozen) for frozen in decision.frozen]
    assert {progress.commitments for progress in kept} == {tuple(frozen.commitment for frozen in said)}
    assert {frozen.attempt for frozen in said} == {2}


@pytest.mark.slow
def test_a_death_in_any_step_is_noticed_in_bounded_time_and_the_next_attempt_succeeds(tmp_path: Path) -> None:
    whole = Platform(tmp_path / "whole")
    whole.contribute(updates(4))
    expected = combine_openings(whole.run(), whole.world.task)
    # Of steps that differ in a number alone, the levels of an adder, one stands for all.
    steps = list({re.sub(r"-[0-9]+$", "", step): step for name, _, step, _ in whole.trace if name == "centre"}.values())
    assert len(steps) > 10
    for step in steps:
        platform = Platform(tmp_path / digest_of(step.encode())[:8])
        platform.contribute(updates(4))
        failures, seconds = platform.run_until_death("centre", step)
        # One step's patience, then at most two farewells of the same length; the machine may be busy.
        assert seconds < 3 * 0.6 + 30.0, step
        answered = [failure for failure in failures if not isinstance(failure, Unavailable)]
        assert answered == [] or step == "agree", (step, answered)
        aggregate = combine_openings(platform.run(attempt=2), platform.world.task)
        assert aggregate.mean is not None, step
        assert expected.mean is not None
        assert np.abs(aggregate.mean - expected.mean).max() < 2.0**-15, step  # devices round at random


def test_an_attempt_ends_at_its_deadline_whatever_its_steps_do(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.step_timeout_s = 60.0
    for name in NAMES:
        platform.start(name)
    platform.contribute(updates(4))
    started = time.monotonic()
    (alone,) = platform.run(names=NAMES[:1], deadline_s=0.3)
    assert isinstance(alone, Unavailable)
    assert "attempt 1: took longer than its 0.3 s" in str(alone)
    assert time.monotonic() - started < 50.0
    assert combine_openings(platform.run(attempt=2), platform.world.task).mean is not None


def test_a_crash_between_agreeing_and_answering_repeats_the_same_decision(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.lost = {("north", "south", "agree")}
    first = platform.run()
    assert isinstance(first[2], Unavailable)
    platform.lost = set()
    for name in NAMES:
        platform.start(name)
    second = platform.run(attempt=2)
    assert second[:2] == first[:2]
    aggregate = combine_openings(second, platform.world.task)
    assert aggregate.decision.attempt == 1
    assert aggregate.mean is not None


@pytest.mark.slow
def test_a_round_with_noise_opened_again_after_a_crash_carries_the_same_noise(tmp_path: Path) -> None:
    cost = epsilon([Spend(0.5)], 1e-5)
    budget = {"epsilon": 2 * cost, "epsilon_device": 2 * cost, "delta": 1e-5}
    platform = Platform(tmp_path, noise_multiplier=0.5, contributions_max=16, **budget)
    platform.spent = Spent(spend=Spend(0.5), delta=1e-5, epsilon_release=cost, epsilon_device=cost)
    honest = updates()
    platform.contribute(honest)
    first = platform.run()
    aggregate = combine_openings(first, platform.world.task)
    assert aggregate.mean is not None
    spread = float(np.std(aggregate.mean - np.mean(honest, axis=0))) * len(honest)
    assert 0.7 < spread / (0.5 * platform.world.task.clip_norm_l2 * 1.5**0.5) < 1.4
    for file in (tmp_path / "south" / "reply").iterdir():
        file.unlink()
    for name in NAMES:
        platform.start(name)
    again = platform.run(attempt=2)
    assert [(reply["first"], reply["second"]) for reply in again] == [
        (reply["first"], reply["second"]) for reply in first
    ]


def test_only_the_aggregators_who_need_masked_vectors_keep_them(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    sizes = {name: [path.stat().st_size for path in (tmp_path / name).glob("copies/*.vectors")] for name in NAMES}
    assert sizes == {"north": [0], "centre": [8 * 4 * LENGTH], "south": [8 * 4 * LENGTH]}


def test_a_lost_folder_ends_a_round_that_was_opened(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    for kind in ("round", "reply"):
        for file in (tmp_path / "south" / kind).iterdir():
            file.unlink()
    failures = platform.run(attempt=2)
    assert isinstance(failures[0], Untrusted)
    assert "south no longer remembers" in str(failures[0])
    assert isinstance(failures[2], Unavailable)
    assert "gave up" in str(failures[2])


def test_another_set_of_the_same_round_is_refused(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    platform.data = platform.data[:-1]
    for failure in platform.run(attempt=2):
        assert isinstance(failure, Untrusted)
        assert "would give updates away" in str(failure)


def test_a_round_that_is_announced_anew_on_other_terms_is_refused(tmp_path: Path) -> None:
    """With the same contributions, and a smaller m_min or no noise."""
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    task = msgspec.structs.replace(platform.world.task, selected_min=2)
    for failure in platform.run(attempt=2, task=platform.world.announcement(task)):
        assert isinstance(failure, Untrusted)
        assert "was announced with the terms" in str(failure)


def test_contributions_count_on_the_terms_that_their_devices_were_told_alone(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    task = msgspec.structs.replace(platform.world.task, selected_min=2, deadline=platform.world.task.deadline + 9)
    replies = platform.run(task=platform.world.announcement(task))
    decision = combine_openings(replies, task).decision
    assert decision.refusal == "0 usable contributions, a sum of fewer than 2 is not opened"
    assert all("terms that the device was told" in device.reason for device in decision.devices)


def test_whoever_waits_for_an_attempt_to_end_begins_the_next_one_alone(tmp_path: Path) -> None:
    """Two attempts side by side could come to two decisions."""
    platform = Platform(tmp_path)
    platform.contribute(updates(4))
    north = platform.aggregators["north"]

    def begun() -> set[str]:
        names = {task.get_name() for task in asyncio.all_tasks() if not task.done()}
        return {name for name in names if name.startswith("round fraud-7 attempt")}

    async def story() -> None:
        runs = [asyncio.create_task(north.run_round(platform.command(1)))]
        async with asyncio.timeout(60.0):
            while not platform.trace:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        runs += [asyncio.create_task(north.run_round(platform.command(attempt))) for attempt in (2, 3)]
        async with asyncio.timeout(60.0):
            while not {"round fraud-7 attempt 3"} <= begun():  # noqa: ASYNC110
                await asyncio.sleep(0)
        seen = [begun() for _ in range(20) if not await asyncio.sleep(0.002)]
        assert all(len(names) == 1 for names in seen), seen
        for run in runs:
            run.cancel()
        ended = await asyncio.gather(*runs, return_exceptions=True)
        assert "attempt 1 was replaced" in str(ended[0])

    asyncio.run(story())


def test_fewer_than_selected_min_open_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path, hostile_max=1, selected_min=8)
    platform.contribute(updates(8))
    replies = platform.run()
    assert all(reply["first"] == reply["second"] == b"" for reply in replies)
    aggregate = combine_openings(replies, platform.world.task)
    assert aggregate.mean is None
    assert aggregate.decision.refusal == "7 updates selected, a sum of fewer than 8 is not opened"


def test_a_new_attempt_replaces_one_that_hangs(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())

    async def story() -> tuple[Any, list[Any]]:
        hanging = asyncio.create_task(platform.aggregators["north"].run_round(platform.command(1)))
        await asyncio.sleep(0.1)
        replies = await asyncio.gather(*(platform.aggregators[n].run_round(platform.command(2)) for n in NAMES))
        return (await asyncio.gather(hanging, return_exceptions=True))[0], replies

    replaced, replies = asyncio.run(story())
    assert isinstance(replaced, Unavailable)
    assert "attempt 1 was replaced" in str(replaced)
    assert combine_openings(replies, platform.world.task).mean is not None


def test_messages_are_unreadable_and_no_message_of_an_attempt_opens_in_another(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    sender, receiver, step, data = next(entry for entry in platform.trace if entry[2] == "gram")
    message = unpack(data, ChannelMessage)
    assert (message.sender, message.receiver, message.step) == (sender, receiver, step)
    key = platform.aggregators[sender].key.sealing
    private = platform.aggregators[receiver]._state.sealing
    place = platform.world.task.round_id, 1, platform.command()["root"]
    assert len(Channel(private, key, receiver, sender, *place).open(message)) == 8 * 36
    for other in ((place[0], 2, place[2]), (place[0], 1, "0" * 64), ("fraud-8", 1, place[2])):
        with pytest.raises(Untrusted, match="does not open"):
            Channel(private, key, receiver, sender, *other).open(message)
    for forged in (msgspec.structs.replace(message, step="range"), msgspec.structs.replace(message, attempt=2)):
        if forged.step != step:
            with pytest.raises(Untrusted, match="does not open"):
                Channel(private, key, receiver, sender, *place).open(forged)


def test_a_forged_message_does_not_stop_the_true_one(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    junk = ChannelMessage(platform.world.task.round_id, 1, "coin", "centre", "north", bytes(12), bytes(80))
    platform.aggregators["north"].deliver("centre", "coin", pack(junk))
    assert combine_openings(platform.run(), platform.world.task).mean is not None


def test_the_mailbox_takes_only_messages_from_who_says_so(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    junk = ChannelMessage("fraud-7", 1, "coin", "centre", "north", bytes(12), bytes(80))
    for sender, name, data in (
        ("south", "coin", pack(junk)),
        ("centre", "gram", pack(junk)),
        ("centre", "coin", b"\xff"),
        ("centre", "coin", pack(msgspec.structs.replace(junk, receiver="south"))),
    ):
        with pytest.raises(Malformed):
            platform.aggregators["north"].deliver(sender, name, data)


def test_a_peer_cannot_fill_the_mailbox_with_what_is_not_counted(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    junk = ChannelMessage("fraud-7", 1, "coin", "centre", "north", bytes(12), b"")
    for message in (
        msgspec.structs.replace(junk, round_id="x" * 100_000),
        msgspec.structs.replace(junk, nonce=bytes(100_000)),
        msgspec.structs.replace(junk, step="x" * 100_000),
    ):
        with pytest.raises(Malformed):
            platform.aggregators["north"].deliver("centre", message.step, pack(message))


# --- commands that must be refused ----------------------------------------------------------------------------------


def by_another_key(platform: Platform) -> dict[str, Any]:
    return {"task": seal_envelope(sign(TASK_TYPE, pack(platform.world.task), platform.world.signing[:1]))}


def without_north(platform: Platform) -> dict[str, Any]:
    others = platform.world.task.aggregators[1:]
    stranger = SecureRound().task.aggregators[0]
    return {
        "task": platform.world.announcement(
            msgspec.structs.replace(platform.world.task, aggregators=(stranger, *others))
        )
    }


def selected_min_two(platform: Platform) -> dict[str, Any]:
    return {
        "task": platform.world.announcement(msgspec.structs.replace(platform.world.task, selected_min=1, hostile_max=0))
    }


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (by_another_key, SignatureInvalid, "found 0"),
        (without_north, Untrusted, "announced without north, or with other keys"),
        (selected_min_two, Malformed, "hostile devices can subtract"),
        (lambda p: {"root": "0" * 64}, DigestMismatch, "a frozen list with root 0000"),
        (lambda p: {"round_id": "fraud-8"}, Untrusted, "the signed announcement is of 'acme', round 'fraud-7'"),
        (lambda p: {"attempt": 0}, Malformed, "expected attempt 1 to 3"),
        (lambda p: {"attempt": 4}, Malformed, "expected attempt 1 to 3"),
        (lambda p: {"task": b"junk"}, Malformed, "CBOR"),
        (lambda p: {"contributions": "x"}, Malformed, "RoundCommand"),
    ],
)
def test_a_command_that_is_not_the_rounds_is_refused(
    tmp_path: Path, change: Any, kind: type[AtollError], message: str
) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates(3))
    (failure,) = platform.run(names=["north"], **change(platform))
    assert isinstance(failure, kind), failure
    assert message in str(failure)
    assert platform.trace == []


def test_other_bytes_than_the_frozen_ones_are_refused_and_the_peers_told(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.deliveries["south"] = [*platform.data[:-1], platform.data[0]]
    failures = platform.run()
    assert isinstance(failures[2], DigestMismatch)
    assert "contribution 7" in str(failures[2])
    assert all("south" in str(failure) for failure in failures[:2])


def test_a_round_of_long_ago_is_refused_and_forgotten(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.run()
    platform.now = NOW + KEPT_S + 1000
    assert all(isinstance(failure, Expired) for failure in platform.run())
    platform.now = NOW + 3 * KEPT_S
    platform.world.task = msgspec.structs.replace(
        platform.world.task, round_id="fraud-8", deadline=int(platform.now) + 60
    )
    platform.run()
    for kind in ("round", "reply"):
        assert [file.name for file in (tmp_path / "north" / kind).iterdir()] == [digest_of(b"fraud-8")]


def test_a_clock_that_was_far_ahead_does_not_make_an_opened_round_new(tmp_path: Path) -> None:
    """Else whoever sets three clocks has another set of the same round opened, and reads the difference."""
    platform = Platform(tmp_path)
    platform.contribute(updates())
    assert combine_openings(platform.run(), platform.world.task).mean is not None
    world, opened = platform.world, platform.world.task
    platform.now = NOW + 3 * KEPT_S
    world.task = msgspec.structs.replace(opened, round_id="fraud-8", deadline=int(platform.now) + 60)
    platform.run()
    platform.now, world.task = NOW, opened
    for name in NAMES:
        platform.start(name)
    platform.contribute(updates()[:-1])
    failures = platform.run()
    assert all(isinstance(failure, Expired) for failure in failures), failures


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_damaged_memory_of_one_round_stops_no_other_one(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    platform.aggregators["centre"]._state.store.put("round", "0" * 64, b"\xff damaged")
    assert combine_openings(platform.run(), platform.world.task).mean is not None


def test_keys_are_made_once_and_for_nobody_else_to_read(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    key = platform.aggregators["north"].key
    file = tmp_path / "north" / "key" / "aggregator"
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "north").stat().st_mode & 0o777 == 0o700
    platform.start("north")
    assert platform.aggregators["north"].key == key
    file.chmod(0o640)
    with pytest.raises(Untrusted, match="chmod 600"):
        platform.start("north")


# --- openings -------------------------------------------------------------------------------------------------------


def resigned(platform: Platform, reply: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A reply in which an aggregator lies consistently: new shares or decision, signed with its own key."""
    reply = {**reply, **{k: v for k, v in changes.items() if k in ("first", "second")}}
    opening = unpack(open_envelope(reply["opening"]).payload, Opening)
    opening = msgspec.structs.replace(
        opening,
        first=digest_of(reply["first"]),
        second=digest_of(reply["second"]),
        decision=changes.get("decision", opening.decision),
    )
    key = platform.aggregators[reply["aggregator"]]._state.signing
    return {**reply, "opening": seal_envelope(sign(OPENING_TYPE, pack(opening), [key]))}


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_lying_openings_are_named(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.contribute(updates())
    north, centre, south = platform.run()
    task = platform.world.task

    def refused(*replies: dict[str, Any]) -> str:
        with pytest.raises(Untrusted) as caught:
            combine_openings(replies, task)
        return str(caught.value)

    assert "centre: share 1 of the sum is not the one it signed" in refused(
        north, {**centre, "first": flipped(centre["first"])}, south
    )
    both = resigned(platform, centre, first=flipped(centre["first"]), second=flipped(centre["second"]))
    assert refused(north, both, south).startswith("centre: a share of the opened sum differs")
    one = resigned(platform, centre, first=flipped(centre["first"]))
    assert refused(north, one, south).startswith("north or centre: a share of the opened sum differs")
    decision = unpack(unpack(open_envelope(south["opening"]).payload, Opening).decision, Decision)
    other = pack(msgspec.structs.replace(decision, selected=decision.selected[:-1]))
    assert "south: signed another decision" in refused(north, centre, resigned(platform, south, decision=other))
    assert "opened round 'fraud-7' twice" in refused(north, centre, centre)
    stranger = {**south, "opening": centre["opening"].replace(b"centre", b"south")}
    with pytest.raises(AtollError):
        combine_openings([north, centre, stranger], task)
    agreed_lie = [
        resigned(platform, north, second=flipped(north["second"])),
        resigned(platform, centre, first=flipped(centre["first"])),
    ]
    assert "another norm than the Gram matrix foretells" in refused(*agreed_lie, south)
    with pytest.raises(Malformed, match="'centre': round 'fraud-7': expected a reply with the bytes of"):
        combine_openings([north, {**centre, "first": 10**12}, south], task)  # as many zeros would be many
    with pytest.raises(Malformed, match="expected 3 openings, found 2"):
        combine_openings([north, centre], task)
