"""A node's conversation with a SuperLink in memory: commands that hang, arrive twice, or make no sense."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fl_coordinator import flower_node
from fl_coordinator.flower_node import RESTS_MAX, WORKS_MAX, FlowerNode
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Unavailable


@dataclass
class Metadata:
    ttl: float = 30.0


@dataclass
class Message:
    """As much of a Flower message as a node looks at."""

    content: dict[str, Any]
    metadata: Metadata = field(default_factory=Metadata)


class Session:
    """Gives out what is in `messages`; keeps what is pushed. An exception in `messages` is raised."""

    def __init__(self, *messages: Message | Exception) -> None:
        self.messages = list(messages)
        self.pushed: list[Mapping[str, Any]] = []
        self.beats = 0

    def keep_alive(self) -> None:
        self.beats += 1

    def pull(self) -> Message | None:
        if not self.messages:
            return None
        found = self.messages.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def push(self, message: Message, answer: Mapping[str, Any]) -> None:
        self.pushed.append(answer)


def message(command_id: str, **payload: Any) -> Message:
    return Message({"command": {"id": command_id, "payload": pack(payload)}})


def node(handler: Callable[[dict[str, Any]], Mapping[str, Any]], poll_idle_s: float = 0.01) -> FlowerNode:
    return FlowerNode(
        *("a0", "127.0.0.1:1", Path("ca.pem"), Path("key.pem"), handler, 0.01, poll_idle_s),
        rests=lambda command: "stands" in command,
    )


def serve(one: FlowerNode, session: Session, done: Callable[[], bool]) -> None:
    """Serve the session until `done`."""
    serving = threading.Thread(target=one._serve, args=(session,))
    serving.start()
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
    one.stop()
    serving.join(30)
    assert not serving.is_alive()


def answers(session: Session) -> dict[str, Any]:
    return {
        str(answer["id"]): unpack_plain(answer["payload"]) if "payload" in answer else answer["error"]
        for answer in session.pushed
    }


def test_a_command_that_hangs_keeps_neither_the_next_one_nor_the_heartbeat_waiting() -> None:
    release = threading.Event()

    def handler(command: dict[str, Any]) -> dict[str, Any]:
        if command["attempt"] == 1:
            assert release.wait(60)
        return {"attempt": command["attempt"]}

    session = Session(message("one", attempt=1), message("two", attempt=2))
    one = node(handler)
    serve(one, session, lambda: len(session.pushed) == 1 and session.beats > 10)
    release.set()
    assert answers(session) == {"two": {"attempt": 2}}


def test_a_command_that_comes_twice_runs_once_and_is_answered_twice() -> None:
    runs: list[int] = []

    def handler(command: dict[str, Any]) -> dict[str, Any]:
        runs.append(1)
        time.sleep(0.05)
        return {"runs": len(runs)}

    session = Session(message("one"), message("one"))
    one = node(handler)
    serve(one, session, lambda: len(session.pushed) == 2)
    again = Session(message("one"))  # a new session: the answer was lost with the old one
    one._stop.clear()
    serve(one, again, lambda: len(again.pushed) == 1)
    assert answers(session) == answers(again) == {"one": {"runs": 1}}


def test_the_number_of_hanging_commands_is_bounded_and_said() -> None:
    release = threading.Event()

    def handler(command: dict[str, Any]) -> dict[str, Any]:
        assert release.wait(60)
        return {}

    session = Session(*(message(f"c{number}") for number in range(WORKS_MAX + 1)))
    serve(node(handler), session, lambda: bool(session.pushed))
    release.set()
    assert answers(session) == {f"c{WORKS_MAX}": f"is still busy with {WORKS_MAX} earlier commands"}


def test_what_makes_no_sense_is_answered_and_a_lost_line_ends_the_session() -> None:
    session = Session(Message({"question": 1}), Message({"command": {"id": "x", "payload": b"\xff"}}))
    serve(node(lambda command: {}), session, lambda: len(session.pushed) == 2)
    assert all("does not understand the command" in str(answer["error"]) for answer in session.pushed)
    broken = Session(message("one"), Unavailable("SuperLink: away"))
    with pytest.raises(Unavailable, match="away"):
        node(lambda command: {})._serve(broken)  # type: ignore[arg-type]


def test_commands_that_rest_keep_no_other_waiting_and_are_bounded_by_themselves() -> None:
    release = threading.Event()

    def handler(command: dict[str, Any]) -> dict[str, Any]:
        if "stands" in command:
            assert release.wait(60)
            raise Unavailable("the round is over")
        return {"attempt": 1}

    resting = [message(f"s{number}", stands=1) for number in range(RESTS_MAX + 1)]
    session = Session(*resting, message("direct"))
    one = node(handler)
    serve(one, session, lambda: len(session.pushed) == 2)
    busy = f"is still busy with {RESTS_MAX} earlier commands"
    assert answers(session) == {f"s{RESTS_MAX}": busy, "direct": {"attempt": 1}}
    release.set()
    again = Session(message("direct"))
    one._stop.clear()
    serve(one, again, lambda: not one._works and len(again.pushed) == 1)
    assert answers(again) == {"direct": {"attempt": 1}}, "many short failures push no answer out"


def test_a_command_that_rests_is_no_reason_to_ask_for_others_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_node, "BUSY_S", 0.0)
    release = threading.Event()

    def handler(command: dict[str, Any]) -> dict[str, Any]:
        assert release.wait(60)
        return {}

    session = Session(message("one", stands=1))
    one = node(handler, poll_idle_s=60.0)
    serving = threading.Thread(target=one._serve, args=(session,))
    serving.start()
    time.sleep(0.15)
    beats = session.beats
    release.set()
    end = time.monotonic() + 30.0
    while not session.pushed:
        assert time.monotonic() < end, "its answer goes out when it is there, not at the next look"
        time.sleep(0.01)
    one.stop()
    one._finished.set()
    serving.join(30)
    assert beats <= 3
