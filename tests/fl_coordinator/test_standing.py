"""One Flower message an aggregator and round, whoever asks, comes, dies or lies meanwhile; and what is said of a round
whose attempt somebody may have."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fl_coordinator import standing_by
from fl_coordinator.flower_bridge import CommandFailed, FlowerBridge, read_command, write_reply
from fl_coordinator.rounds import State
from fl_coordinator.standing import TRAVEL_TICKS, Standing
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import NotFound, Unavailable
from tests.fl_coordinator.learning_platform import SPEC, Learning, asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import on_a_loop, until

NAMES = ("a0", "a1", "a2")
ROUND = "fraud-1"
ATTEMPT = {"round_id": ROUND, "attempt": 1, "contributions": ["d" * 64]}
TICK_S = 0.02


class World:
    """A coordinator's side with a command that stands, and what a ServerApp and aggregators do with it."""

    def __init__(self) -> None:
        self.bridge = FlowerBridge(asyncio.get_running_loop().time)
        self.standing = Standing(self.bridge, TICK_S)
        self.fetched = asyncio.Event()
        self.said: set[str] = set()
        """Who said in the last answer that it failed."""
        self.standing.begin(ROUND, b"announcement", NAMES, 60.0)

    async def ask(self, name: str, wait_s: float = 5.0) -> dict[str, Any] | None:
        found = await self.standing.attempt_for(ROUND, name, wait_s)
        return None if found is None else unpack_plain(found)

    def asking(self, *names: str) -> list[asyncio.Task[dict[str, Any] | None]]:
        return [asyncio.create_task(self.ask(name)) for name in names]

    def attempt(self, deadline_s: float = 20.0) -> asyncio.Task[dict[str, dict[str, Any]]]:
        return asyncio.create_task(self.standing.command(ATTEMPT, NAMES, deadline_s, self.fetched))

    async def message(self, *holds: str, rests: tuple[str, ...] = ()) -> tuple[str, dict[str, Any], bool, float]:
        """What the ServerApp is given: id, payload, whether it rests, seconds left."""
        wire = await self.bridge.next_command(5.0, holds, rests)
        assert wire is not None
        read = read_command(wire)
        assert read.nodes == NAMES
        return read.id, unpack_plain(read.payload), read.rests, read.left_s

    def answer(self, command_id: str, failures: Mapping[str, str] | None = None, unasked: tuple[str, ...] = ()) -> bool:
        """Every aggregator answers, some that they failed."""
        failures = failures or {}
        replies = {name: pack({"by": name}) for name in NAMES if name not in failures}
        self.said = failures.keys() - set(unasked)
        return self.bridge.reply(write_reply(command_id, replies, failures, failures, unasked))["wanted"]


ALL = {name: {"by": name} for name in NAMES}


@on_a_loop
async def test_one_message_stands_for_a_whole_round() -> None:
    world = World()
    first, payload, rests, left_s = await world.message()
    assert payload == {"round_id": ROUND, "task": b"announcement", "stands_s": 60.0}
    assert rests
    assert 50 < left_s <= 60
    assert await world.ask("a0", 0.0) is None, "nothing is frozen yet"
    asking = world.asking(*NAMES)
    attempt = world.attempt()
    assert await asyncio.gather(*asking) == [ATTEMPT] * 3
    assert world.fetched.is_set()
    again, _, rests, left_s = await world.message(first, rests=(first,))
    assert (again, rests) == (first, False), "the ServerApp hears that answers are due, and by when"
    assert left_s <= 20
    assert await world.bridge.next_command(0.0, [first]) is None, "nothing else was sent"
    assert await world.ask("a1") == ATTEMPT, "whoever was killed with it gets it again"
    assert world.answer(first)
    assert await attempt == ALL
    with pytest.raises(NotFound):
        await world.ask("a1")


@on_a_loop
async def test_nothing_is_put_up_before_all_three_ask_for_it_however_long_flower_takes() -> None:
    world = World()
    early = world.asking("a0", "a1")
    attempt = world.attempt()
    await asyncio.sleep(3 * TICK_S)
    assert not world.fetched.is_set(), "two who begin would wait for the third"
    (late,) = world.asking("a2")
    assert await asyncio.gather(*early, late) == [ATTEMPT] * 3
    first, *_ = await world.message()
    world.answer(first)
    assert await attempt == ALL


@pytest.mark.parametrize("before", [(), ("a0", "a1")])
@on_a_loop
async def test_who_never_asks_is_sent_the_attempt_and_nobody_had_it_before(before: tuple[str, ...]) -> None:
    world = World()
    first, *_ = await world.message()
    asking = world.asking(*before)
    await asyncio.sleep(0)
    attempt = world.attempt()
    second, payload, rests, left_s = await world.message(first)
    assert (payload, rests) == (ATTEMPT, False)
    assert 18 < left_s <= 20 - TRAVEL_TICKS * TICK_S / 2, "all ways together take no longer than an attempt may"
    assert not world.answer(first), "nobody waits for the first any more"
    for one in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(one, NotFound)
    with pytest.raises(NotFound, match="no command stands for 'a0'"):
        await world.ask("a0")
    world.answer(second, {"a2": "is not online"}, ("a2",))
    with pytest.raises(CommandFailed) as failed:
        await attempt
    assert failed.value.undone == {"a2"}


@on_a_loop
async def test_one_that_asked_and_does_not_come_has_the_attempt_sent_to_all_and_who_has_it_counts() -> None:
    world = World()
    first, *_ = await world.message()
    gone = world.asking("a0", "a1")
    await asyncio.sleep(0)
    assert await world.ask("a2", 0.0) is None
    last = asyncio.create_task(world.standing.attempt_for(ROUND, "a2", 30.0))
    await asyncio.sleep(0)
    for task in (*gone, last):  # all ask at this moment, and two of the lines are cut in the same step
        assert not task.done()
    attempt = world.attempt()
    await asyncio.sleep(0)
    gone[1].cancel()
    last.cancel()
    second, payload, *_ = await world.message(first)
    assert payload == ATTEMPT
    assert await gone[0] == ATTEMPT
    # Every node says that it refused the second message. One of them may run what it had before.
    world.answer(second, dict.fromkeys(NAMES, "is still busy with 4 earlier commands"))
    with pytest.raises(CommandFailed) as failed:
        await attempt
    assert failed.value.failures.keys() == set(NAMES)
    assert failed.value.undone == {"a1", "a2"}


@on_a_loop
async def test_a_queue_that_is_full_clears_nobody_who_has_the_attempt() -> None:
    class Full(FlowerBridge):
        async def command(self, payload: Mapping[str, Any], *rest: Any, **named: Any) -> dict[str, dict[str, Any]]:
            if "attempt" in payload:
                raise Unavailable("512 commands wait already")
            return await super().command(payload, *rest, **named)

    world = World()
    world.standing._bridge = Full()
    asking = world.asking(*NAMES)
    await asyncio.sleep(0)
    attempt = world.attempt()
    await asyncio.sleep(0)
    asking[2].cancel()
    with pytest.raises(CommandFailed, match="wait already") as failed:
        await attempt
    assert failed.value.undone == {"a2"}


@on_a_loop
async def test_a_command_that_fails_before_the_freeze_ends_and_the_attempt_is_sent() -> None:
    world = World()
    first, *_ = await world.message()
    asking = world.asking("a0", "a2")
    await asyncio.sleep(0)
    world.answer(first, {"a1": "Malformed: does not know such a command"})
    for one in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(one, NotFound)
    attempt = world.attempt()
    second, payload, *_ = await world.message()
    assert payload == ATTEMPT
    world.answer(second)
    assert await attempt == ALL


@on_a_loop
async def test_failures_of_an_attempt_that_all_have_are_its_own_and_who_was_not_asked_may_have_done_it() -> None:
    world = World()
    first, *_ = await world.message()
    asking = world.asking(*NAMES)
    attempt = world.attempt()
    await asyncio.gather(*asking)
    world.answer(first, {"a0": "Unavailable: a1 gave up", "a1": "is not online"}, ("a1",))
    with pytest.raises(CommandFailed) as failed:
        await attempt
    # a1 stood by since another ServerApp asked it: this one never reached it, and it came for the attempt all the same.
    assert failed.value.undone == {"a0"}
    assert await world.bridge.next_command(0.0) is None, "the next attempt is another one"


@on_a_loop
async def test_answers_that_do_not_come_end_with_the_attempts_time() -> None:
    world = World()
    first, *_ = await world.message()
    asking = world.asking(*NAMES)
    attempt = world.attempt(0.1)
    await asyncio.gather(*asking)
    with pytest.raises(CommandFailed, match=r"did not answer within 0\.1 s") as failed:
        await attempt
    assert failed.value.undone == set()
    assert not world.answer(first)


@on_a_loop
async def test_who_aborts_before_anybody_came_knows_it() -> None:
    world = World()
    asking = world.asking("a0", "a1")
    attempt = world.attempt()
    await asyncio.sleep(TICK_S)
    attempt.cancel()
    await asyncio.gather(attempt, return_exceptions=True)
    assert not world.fetched.is_set()
    assert all(isinstance(one, NotFound) for one in await asyncio.gather(*asking, return_exceptions=True))
    assert await world.bridge.next_command(0.0) is None
    assert world.standing._places == {}


@on_a_loop
async def test_strangers_and_rounds_that_do_not_stand_get_nothing() -> None:
    world = World()
    for round_id, name in ((ROUND, "a3"), ("fraud-2", "a0"), ("x" * 10_000, "y" * 10_000)):
        with pytest.raises(NotFound) as refused:
            await world.standing.attempt_for(round_id, name, 5.0)
        assert len(str(refused.value)) < 400
    await world.standing.end(ROUND)
    with pytest.raises(NotFound):
        await world.ask("a0")


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_in_whatever_order_whoever_was_given_the_attempt_is_counted(seed: int) -> None:
    """Aggregators ask, are cut off, and answer at random; the ServerApp may die and be replaced; the attempt may be
    aborted. Nobody who was given it is ever said to have surely done nothing, and everything ends."""
    rng = random.Random(seed)

    async def story() -> None:
        world = World()
        given: set[str] = set()
        sent: list[str] = []

        async def aggregator(name: str) -> None:
            for _ in range(40):
                try:
                    async with asyncio.timeout(rng.choice([0.002, 0.01, 5.0])):
                        if await world.ask(name, rng.choice([0.0, 0.005, 5.0])) is not None:
                            given.add(name)
                except TimeoutError:
                    given.update({name} & _taken(world))  # cut off: the bytes may have been on their way
                except NotFound:
                    return
                await asyncio.sleep(rng.choice([0.0, 0.001, 0.01]))

        async def server_app() -> None:
            held: dict[str, bool] = {}
            while True:
                if rng.random() < 0.1:
                    held.clear()
                wire = await world.bridge.next_command(0.005, held, [one for one, rests in held.items() if rests])
                if wire is not None:
                    held[wire["id"]] = wire["rests"]
                    if "attempt" in unpack_plain(read_command(wire).payload):
                        sent.append(wire["id"])
                if held and rng.random() < 0.2:
                    failed = {name: "failed" for name in NAMES if rng.random() < 0.5}
                    one = rng.choice(list(held))
                    unasked = tuple(name for name in failed if rng.random() < 0.3)
                    if held.pop(one) is False or rng.random() < 0.3:
                        world.answer(one, failed, unasked)

        tasks = [asyncio.create_task(server_app()), *(asyncio.create_task(aggregator(name)) for name in NAMES)]
        await asyncio.sleep(rng.choice([0.0, 0.003, 0.02]))
        attempt = world.attempt(0.4)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.choice([0.0, 0.01, 0.05]))
            attempt.cancel()
        async with asyncio.timeout(5.0):
            await asyncio.wait([attempt])
        error = None if attempt.cancelled() else attempt.exception()
        if error is not None:
            assert isinstance(error, CommandFailed)
            # Of a second message nobody knows what became of the first; of the first those know who say so.
            assert not given & (error.undone - (set() if sent else world.said))
        assert world.fetched.is_set() or not (given or sent)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert world.standing._places == {}
        assert world.bridge._pending == {}

    asyncio.run(story())


def _taken(world: World) -> set[str]:
    place = world.standing._places.get(ROUND)
    return set() if place is None else set(place.taken)


# In a platform: what a round's record, its privacy account and its aggregators make of it


def waiting(at: Learning) -> int:
    """How many aggregators stand by."""
    members = at.aggregators.members.values()
    return sum(len(one._standing_by._waiting) for one in members if one._standing_by is not None)


@on_a_loop
async def test_a_round_takes_one_message_and_a_failed_attempt_one_more(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        assert (await at.learned(asked(name="first"))).state == "PUBLISHED"
        assert [message.keys() for message in at.aggregators.messages] == [{"round_id", "task", "stands_s"}]
        asked_for, lost = at.aggregators._run, {"a1"}

        async def unheard(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)
            if name not in lost:
                return answer
            lost.clear()
            return "its answer was lost"

        at.aggregators._run = unheard  # type: ignore[method-assign]
        ended = await at.learned(asked(name="second"))
        assert (ended.state, ended.attempt) == ("PUBLISHED", 2)
        assert "a1 its answer was lost" in ended.failures[0]
        assert [message.get("attempt") for message in at.aggregators.messages[1:]] == [None, 2]
        assert waiting(at) == 0


@on_a_loop
async def test_an_aggregator_that_cannot_ask_costs_a_message_and_no_attempt(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        at.aggregators.deaf = {"a2"}
        ended = await at.learned(SPEC)
        assert (ended.state, ended.attempt, ended.failures) == ("PUBLISHED", 1, ())
        assert [message.get("attempt") for message in at.aggregators.messages] == [None, 1]
        assert at.replayed(ended).holds
        await until(lambda: waiting(at) == 1)  # it stands by for what it cannot ask; the others know that it is over
        at.aggregators.deaf = set()
        await until(lambda: waiting(at) == 0)


@on_a_loop
async def test_whoever_dies_while_a_round_collects_the_next_one_has_the_aggregators_stand_by(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: waiting(at) == 3)
    at.platform.reopen()  # the coordinator died, and the ServerApp
    async with at.platform.running():
        await until(lambda: at.coordinator.round(opened.round_id).at is State.COLLECTING)
        async with at.aggregators.serving():
            await until(lambda: len(at.aggregators.messages) == 2)
        async with at.aggregators.serving():  # the ServerApp died alone
            await until(lambda: len(at.aggregators.messages) == 3)
            await contribute_all(at.devices, opened.round_id)
            ended = await at.ended(opened.round_id)
        assert (ended.state, ended.attempt) == ("PUBLISHED", 1)
        assert [message.get("attempt") for message in at.aggregators.messages] == [None] * 3
        assert [command["attempt"] for command in at.aggregators.commands] == [1]
        assert waiting(at) == 0


@on_a_loop
async def test_an_aggregator_that_was_killed_while_it_stood_by_is_sent_the_attempt(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: waiting(at) == 3)
        at.aggregators.start("a0")
        await contribute_all(at.devices, opened.round_id)
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.attempt, ended.failures) == ("PUBLISHED", 1, ())


@on_a_loop
async def test_a_round_that_ends_without_an_attempt_lets_the_aggregators_go(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        aborted = await at.coordinator.open_round(asked(name="aborted"))
        await until(lambda: waiting(at) == 3)
        await at.coordinator.abort_round(aborted.round_id)
        await at.ended(aborted.round_id)
        await until(lambda: waiting(at) == 0)
        few = await at.coordinator.open_round(asked(name="few"))
        await until(lambda: waiting(at) == 3 and at.coordinator.round(few.round_id).at is State.COLLECTING)
        at.platform.clock.now += 60
        assert "quorum" in (await at.ended(few.round_id)).reason
        await until(lambda: waiting(at) == 0)
        assert at.ledger.opened_without_noise("fraud") == []
        assert at.platform.bridge._pending == {}


@on_a_loop
async def test_an_abort_counts_as_an_opening_only_if_somebody_came_for_the_attempt(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        at.coordinator._standing._grace_s = at.coordinator._standing._travel_s = 30.0
        at.aggregators.deaf = {"a1"}
        opened = await at.coordinator.open_round(asked(aggregation_s=3600))
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).attempt == 1)
        await at.coordinator.abort_round(opened.round_id)
        assert (await at.ended(opened.round_id)).reason == "an operator aborted it"
        assert at.aggregators.commands == []
        assert at.ledger.opened_without_noise("fraud") == []


@on_a_loop
async def test_who_asks_in_anothers_name_takes_nothing_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregators share one token: one of them can have the coordinator think that another came for the list."""
    monkeypatch.setattr(standing_by, "_PAUSE_MAX_S", 0.02)
    async with learning(tmp_path, 6) as at:
        at.aggregators.deaf = {"a2"}
        opened = await at.coordinator.open_round(SPEC)
        await until(lambda: at.coordinator.round(opened.round_id).at is State.COLLECTING)
        liar = asyncio.create_task(at.coordinator.attempt_for(opened.round_id, "a2", 20.0))
        await contribute_all(at.devices, opened.round_id)
        assert await liar is not None
        at.aggregators.deaf = set()
        ended = await at.ended(opened.round_id)
        assert (ended.state, ended.attempt) == ("PUBLISHED", 1)
