"""The queue between coordinator and ServerApp, driven as the two HTTP endpoints drive it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from fl_coordinator.flower_bridge import (
    PENDING_MAX,
    STANDING_MAX,
    CommandFailed,
    FlowerBridge,
    read_command,
    write_reply,
)
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Malformed, Unavailable

NODES = ("aggregator-1", "aggregator-2")


async def fetch(bridge: FlowerBridge) -> tuple[str, tuple[str, ...], Any, float]:
    command = await bridge.next_command(1.0)
    assert command is not None
    read = read_command(command)
    return read.id, read.nodes, unpack_plain(read.payload), read.left_s


def test_a_command_reaches_its_nodes_and_their_answers_come_back() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        task = asyncio.create_task(bridge.command({"round_id": "r-1", "attempt": 2, "salt": b"\x00"}, NODES, 5.0))
        command_id, nodes, payload, left_s = await fetch(bridge)
        assert nodes == NODES
        assert payload == {"round_id": "r-1", "attempt": 2, "salt": b"\x00"}
        assert 4.0 < left_s <= 5.0
        assert bridge.reply({"id": command_id, "progress": True}) == {"wanted": True}
        answers = {node: pack({"share": node.encode(), "rows": 3}) for node in NODES}
        assert bridge.reply(write_reply(command_id, answers, {})) == {"wanted": True}
        assert await task == {node: {"share": node.encode(), "rows": 3} for node in NODES}
        assert bridge.reply(write_reply(command_id, answers, {})) == {"wanted": False}

    asyncio.run(scenario())


def test_a_command_is_handed_out_again_until_it_is_answered() -> None:
    """A ServerApp that dies with a command in its hands takes nothing with it."""

    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        task = asyncio.create_task(bridge.command({"n": 1}, NODES, 5.0))
        first, second = await fetch(bridge), await fetch(bridge)
        assert first[:3] == second[:3]
        bridge.reply(write_reply(first[0], {node: pack({}) for node in NODES}, {}))
        assert await task == {node: {} for node in NODES}
        assert await bridge.next_command(0.0) is None

    asyncio.run(scenario())


@pytest.mark.parametrize("fetched", [1, 2])
def test_failures_name_the_node_and_keep_the_other_answers(fetched: int) -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        task = asyncio.create_task(bridge.command({"n": 1}, (*NODES, "aggregator-3"), 5.0))
        for _ in range(fetched):
            command_id = (await fetch(bridge))[0]
        failures = {"aggregator-2": "is not online"}
        bridge.reply(write_reply(command_id, {"aggregator-1": pack({"ok": True})}, failures, failures))
        with pytest.raises(CommandFailed, match="1 of 3 nodes answered; aggregator-2 is not online") as caught:
            await task
        assert caught.value.replies == {"aggregator-1": {"ok": True}}
        assert caught.value.failures["aggregator-3"] == "is missing from the ServerApp's answer"
        # What a ServerApp that died asked nobody knows.
        assert caught.value.undone == ({"aggregator-2"} if fetched == 1 else set())

    asyncio.run(scenario())


def test_the_deadline_says_whether_anybody_fetched_the_command() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        with pytest.raises(CommandFailed, match="was not asked: the ServerApp fetched no command") as unasked:
            await bridge.command({"n": 1}, NODES, 0.05)
        assert unasked.value.undone == set(NODES)
        task = asyncio.create_task(bridge.command({"n": 2}, NODES, 0.1))
        command_id = (await fetch(bridge))[0]
        with pytest.raises(CommandFailed, match=r"did not answer within 0\.1 s") as silent:
            await task
        assert silent.value.undone == set()
        assert bridge.reply({"id": command_id, "progress": True}) == {"wanted": False}

    asyncio.run(scenario())


def test_a_poll_waits_for_a_command_and_tells_that_the_server_app_lives() -> None:
    async def scenario() -> None:
        now = [100.0]
        bridge = FlowerBridge(clock=lambda: now[0])
        now[0] = 130.0
        assert bridge.silent_s == 30.0
        poll = asyncio.create_task(bridge.next_command(10.0))
        await asyncio.sleep(0)
        assert bridge.silent_s == 0.0
        task = asyncio.create_task(bridge.command({"n": 1}, NODES, 5.0))
        command = await poll
        assert command is not None
        now[0] = 133.0
        assert bridge.silent_s == 3.0
        bridge.reply({"id": command["id"], "progress": True})
        assert bridge.silent_s == 0.0
        task.cancel()

    asyncio.run(scenario())


def test_the_queue_is_bounded_and_empties_when_callers_give_up() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        tasks = [asyncio.create_task(bridge.command({"n": n}, NODES, 5.0)) for n in range(PENDING_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=f"{PENDING_MAX} commands wait already"):
            await bridge.command({"n": -1}, NODES, 5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await bridge.next_command(0.0) is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"replies": {}, "failures": {}},
        {"id": "KNOWN", "replies": {}},
        {"id": "KNOWN", "replies": [], "failures": {}},
    ],
)
def test_a_malformed_answer_is_refused_and_the_command_stays(body: Any) -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        task = asyncio.create_task(bridge.command({"n": 1}, NODES, 5.0))
        command_id = (await fetch(bridge))[0]
        if isinstance(body, dict) and body.get("id") == "KNOWN":
            body["id"] = command_id
        with pytest.raises(Malformed):
            bridge.reply(body)
        assert not task.done()
        assert (await fetch(bridge))[0] == command_id
        task.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "answer",
    ["not base64!", 7, "AQI=", "AQ=="],  # the last two: two CBOR values, and a number where a map is expected
)
def test_a_node_that_answers_nonsense_is_named_at_once_and_the_others_count(answer: Any) -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        task = asyncio.create_task(bridge.command({"n": 1}, NODES, 5.0))
        command_id = (await fetch(bridge))[0]
        good = base64.b64encode(pack({})).decode()
        replies = {**dict.fromkeys(NODES, good), NODES[0]: answer}
        assert bridge.reply({"id": command_id, "replies": replies, "failures": {}}) == {"wanted": True}
        with pytest.raises(CommandFailed, match=f"{NODES[0]} sent an answer that") as failed:
            await task
        assert list(failed.value.failures) == [NODES[0]]
        assert sorted(failed.value.replies) == sorted(NODES[1:])

    asyncio.run(scenario())


def test_a_command_needs_a_node() -> None:
    async def scenario() -> None:
        with pytest.raises(Malformed, match="at least one node"):
            await FlowerBridge().command({}, (), 1.0)

    asyncio.run(scenario())


def test_a_command_that_is_held_is_not_handed_out_again_and_keeps_no_other_waiting() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        tasks = [asyncio.create_task(bridge.command({"n": n}, NODES, 5.0)) for n in range(2)]
        first = await bridge.next_command(1.0)
        assert first is not None
        second = await bridge.next_command(1.0, [first["id"]])
        assert second is not None
        assert second["id"] != first["id"]
        assert await bridge.next_command(0.0, [first["id"], second["id"]]) is None
        again = await bridge.next_command(0.0)  # a new ServerApp holds nothing
        assert again is not None
        assert again["id"] == first["id"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("steps", range(5))
def test_a_caller_that_gives_up_just_as_its_answer_comes_ends(steps: int) -> None:
    """At shutdown both can happen in the same step of the loop; who is cancelled must not wait on."""

    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        fetching = asyncio.create_task(bridge.next_command(30.0))
        await asyncio.sleep(0)
        asking = asyncio.create_task(bridge.command({"n": 1}, NODES, 30.0))
        for _ in range(1 + steps):
            await asyncio.sleep(0)
        if fetching.cancel():
            await asyncio.wait([fetching])
            assert fetching.cancelled()
        command_id = (await fetch(bridge))[0]
        bridge.reply(write_reply(command_id, {node: pack({}) for node in NODES}, {}))
        for _ in range(steps):
            await asyncio.sleep(0)
        if asking.cancel():
            await asyncio.wait([asking])
            assert asking.cancelled()

    asyncio.run(scenario())


def test_a_command_that_stands_rests_until_it_is_due_and_is_told_to_who_lets_it_rest() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        due: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(bridge.command({"n": 1}, NODES, 3600.0, due=due))
        first = await bridge.next_command(1.0)
        assert first is not None
        assert (first["rests"], first["deadline_s"] > 3000) == (True, True)
        held = [first["id"]]
        poll = asyncio.create_task(bridge.next_command(30.0, held, held))
        await asyncio.sleep(0)
        due.set_result(20.0)
        told = await poll
        assert told is not None
        assert (told["id"], told["rests"], told["deadline_s"] <= 20.0) == (first["id"], False, True)
        again = await bridge.next_command(0.0, held, held)
        assert again is not None, "what was lost on the way is told again"
        assert await bridge.next_command(0.0, held) is None, "who works on it already knows"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not bridge.reply({"id": first["id"], "progress": True})["wanted"]

    asyncio.run(scenario())


def test_a_command_that_stands_ends_by_its_own_deadline_and_by_the_one_it_gets() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        due: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        with pytest.raises(CommandFailed, match=r"within 0\.05 s") as failed:
            await bridge.command({"n": 1}, NODES, 0.05, due=due)
        assert failed.value.undone == set(), "who stood by since an earlier command was not asked by this one"
        due.set_result(0.05)
        with pytest.raises(CommandFailed, match=r"within 0\.05 s"):
            await bridge.command({"n": 2}, NODES, 3600.0, due=due)
        early = asyncio.create_task(
            bridge.command({"n": 3}, NODES, 5.0, due=asyncio.get_running_loop().create_future())
        )
        command_id = (await fetch(bridge))[0]
        bridge.reply(write_reply(command_id, {node: pack({}) for node in NODES}, {}))
        assert await early == {node: {} for node in NODES}, "an answer that comes early is one"

    asyncio.run(scenario())


def test_commands_that_stand_do_not_fill_the_queue() -> None:
    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        due: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        tasks = [asyncio.create_task(bridge.command({"n": n}, NODES, 5.0, due=due)) for n in range(STANDING_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=f"{STANDING_MAX} commands stand already"):
            await bridge.command({"n": -1}, NODES, 5.0, due=due)
        direct = asyncio.create_task(bridge.command({"n": -2}, NODES, 5.0))
        await asyncio.sleep(0)
        assert not direct.done()
        for task in (*tasks, direct):
            task.cancel()
        await asyncio.gather(*tasks, direct, return_exceptions=True)
        assert bridge._pending == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("dies", ["before it is due", "after"])
def test_of_a_command_that_stood_those_surely_did_nothing_who_say_so(dies: str) -> None:
    """A ServerApp that died while the command rested has asked nobody for anything; one that dies later may have."""

    async def scenario() -> None:
        bridge = FlowerBridge(asyncio.get_running_loop().time)
        due: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        nodes = (*NODES, "aggregator-3")
        task = asyncio.create_task(bridge.command({"n": 1}, nodes, 60.0, due=due))
        first = (await fetch(bridge))[0]
        if dies == "after":
            due.set_result(20.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert (await fetch(bridge))[0] == first, "a new ServerApp gets it again"
        if not due.done():
            due.set_result(20.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        failures = {"aggregator-2": "Unavailable: a peer gave up", "aggregator-3": "is not online"}
        bridge.reply(write_reply(first, {NODES[0]: pack({})}, failures, failures, ["aggregator-3"]))
        with pytest.raises(CommandFailed) as failed:
            await task
        assert failed.value.undone == ({"aggregator-2"} if dies == "before it is due" else set())

    asyncio.run(scenario())
