"""The ServerApp's loop against a Grid and a coordinator in memory."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from fl_coordinator import flower_carrier
from fl_coordinator.flower_carrier import ANSWER_BYTES_MAX, CARRY_FAILURES_MAX, CommandCarrier
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Unavailable
from tests.fakes.flower_grid import FakeCoordinator, FakeGrid, FakeNode, FakeReply

PAYLOAD = pack({"round_id": "r-1"})


@pytest.fixture(autouse=True)
def _inside_a_server_app() -> None:
    """Flower sets these in a ServerApp's process; a message cannot be made without them."""
    identity: Any = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    identity.run_id, identity.node_id, identity.task_id = 1, 1, 1


def command(
    nodes: list[str], deadline_s: float = 5.0, command_id: str = "c-1", *, rests: bool = False
) -> dict[str, Any]:
    payload = base64.b64encode(PAYLOAD).decode("ascii")
    return {"id": command_id, "nodes": nodes, "payload": payload, "deadline_s": deadline_s, "rests": rests}


def answering(node: str, node_id: int) -> FakeNode:
    return FakeNode(node, node_id, lambda command_id, payload: {"id": command_id, "payload": pack({"from": node})})


class Clock:
    """Ten milliseconds pass between two looks, whatever the machine does meanwhile."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def carrier(grid: FakeGrid, coordinator: FakeCoordinator) -> CommandCarrier:
    return CommandCarrier(grid, coordinator, poll_s=0.001, clock=Clock())  # type: ignore[arg-type]


def carry(one: CommandCarrier, *commands: Any) -> None:
    """Until nothing is held any more."""
    for each in commands:
        one.begin(each)
    while one.holds:
        one.step()


def answers_in(body: Any) -> dict[str, Any]:
    return {name: unpack_plain(base64.b64decode(reply)) for name, reply in body["replies"].items()}


def test_one_message_per_named_node_and_one_delivery() -> None:
    grid = FakeGrid([answering("a", 1), answering("b", 2), answering("c", 3)])
    coordinator = FakeCoordinator()
    carry(carrier(grid, coordinator), command(["a", "b"]))
    assert grid.delivered == [("a", PAYLOAD), ("b", PAYLOAD)]
    assert [body.get("progress") for body in coordinator.bodies] == [True, None]
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}, "b": {"from": "b"}}
    assert coordinator.bodies[-1]["failures"] == {}


def test_a_node_that_failed_ends_the_wait_for_one_that_died() -> None:
    grid = FakeGrid(
        [
            FakeNode("failing", 1, lambda command_id, payload: {"id": command_id, "error": "Unavailable: peer b"}),
            FakeNode("dead", 2, lambda command_id, payload: None),
        ]
    )
    coordinator = FakeCoordinator()
    clock = Clock()
    impatient = CommandCarrier(grid, coordinator, after_failure_s=0.1, clock=clock)  # type: ignore[arg-type]
    carry(impatient, command(["failing", "dead"], deadline_s=30.0))
    assert clock.now < 1.0
    failures = coordinator.bodies[-1]["failures"]
    assert failures == {"failing": "Unavailable: peer b", "dead": "did not answer in time"}


def test_silent_absent_and_failing_nodes_are_told_apart() -> None:
    grid = FakeGrid(
        [
            answering("a", 1),
            FakeNode("silent", 2, lambda command_id, payload: None),
            FakeNode("failing", 3, lambda command_id, payload: {"id": command_id, "error": "Untrusted: no"}),
            FakeNode("gone", 4, lambda command_id, payload: None, status="offline"),
        ]
    )
    coordinator = FakeCoordinator()
    carry(carrier(grid, coordinator), command(["a", "silent", "failing", "gone", "unknown"], 0.7))
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}}
    assert coordinator.bodies[-1]["failures"] == {
        "failing": "Untrusted: no",
        "silent": "did not answer in time",
        "gone": "is not online",
        "unknown": "is not online",
    }
    assert coordinator.bodies[-1]["undone"] == ["failing", "gone", "unknown"], "the silent one may have done its part"


def test_a_node_that_came_back_and_one_whose_answer_was_lost_are_asked_again() -> None:
    tries = {"restarted": 0, "unlucky": 0}

    def restarted(command_id: str, payload: bytes) -> dict[str, Any] | None:
        tries["restarted"] += 1
        if tries["restarted"] == 1:
            grid.nodes[0].last_activated_at = "second"  # it was killed with the command in its hands
            return None
        return {"id": command_id, "payload": pack({})}

    def unlucky(command_id: str, payload: bytes) -> dict[str, Any] | str:
        tries["unlucky"] += 1
        return "lost" if tries["unlucky"] == 1 else {"id": command_id, "payload": pack({})}

    grid = FakeGrid([FakeNode("restarted", 1, restarted), FakeNode("unlucky", 2, unlucky)])
    coordinator = FakeCoordinator()
    carry(carrier(grid, coordinator), command(["restarted", "unlucky"]))
    assert tries == {"restarted": 2, "unlucky": 2}
    assert answers_in(coordinator.bodies[-1]) == {"restarted": {}, "unlucky": {}}


def test_a_command_that_nobody_waits_for_is_dropped() -> None:
    grid = FakeGrid([FakeNode("silent", 1, lambda command_id, payload: None)])
    coordinator = FakeCoordinator(wanted=False)
    carry(carrier(grid, coordinator), command(["silent"], 30.0))
    assert coordinator.bodies == [{"id": "c-1", "progress": True}]


def test_a_relay_that_is_down_does_not_keep_the_aggregators_waiting() -> None:
    grid = FakeGrid([answering("a", 1)])
    coordinator = FakeCoordinator([command(["relay"], 30.0, "c-0"), command(["a"]), None, None, SystemExit()])
    with pytest.raises(SystemExit):
        carrier(grid, coordinator).run()
    held = [(), ("c-0",), ("c-0", "c-1"), ("c-0",), ("c-0",)]
    assert coordinator.held == held, "what is held is not handed out again"
    answered = [body for body in coordinator.bodies if "replies" in body]
    assert [(body["id"], answers_in(body)) for body in answered] == [("c-1", {"a": {"from": "a"}})]


def test_an_answer_that_cannot_be_delivered_is_kept_until_it_can() -> None:
    class Away(FakeCoordinator):
        away = 3

        def reply(self, body: Mapping[str, Any]) -> bool:
            if "replies" in body and self.away:
                self.away -= 1
                raise Unavailable("coordinator: refused")
            return super().reply(body)

    coordinator = Away()
    carry(carrier(FakeGrid([answering("a", 1)]), coordinator), command(["a"]))
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}}


def test_a_coordinator_that_is_away_or_talks_nonsense_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = FakeCoordinator(
        [Unavailable("coordinator: refused"), {"id": 1}, None, command(["a"]), None, SystemExit()]
    )
    with pytest.raises(SystemExit):
        carrier(FakeGrid([answering("a", 1)]), coordinator).run()
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}}
    assert "coordinator: refused" in capsys.readouterr().out


def test_a_grid_that_fails_is_tried_again_and_given_up_only_when_it_keeps_failing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class FailingGrid(FakeGrid):
        failures = 2

        def get_nodes(self) -> list[FakeNode]:
            if self.failures:
                self.failures -= 1
                raise ConnectionError("SuperLink: reset")
            return super().get_nodes()

    coordinator = FakeCoordinator([command(["a"]), None] * 3 + [SystemExit()])
    with pytest.raises(SystemExit):
        carrier(FailingGrid([answering("a", 1)]), coordinator).run()
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}}
    assert capsys.readouterr().out.count("ConnectionError: SuperLink: reset") == 2
    hopeless = FailingGrid([])
    hopeless.failures = 9
    with pytest.raises(ConnectionError):
        carrier(hopeless, FakeCoordinator([command(["a"]), None] * 9)).run()
    assert hopeless.failures == 9 - CARRY_FAILURES_MAX


@pytest.mark.parametrize(
    "answer",
    [{}, {"payload": 10**12}, {"payload": "text"}, {"payload": bytes(ANSWER_BYTES_MAX + 1)}, {"error": ["no", "text"]}],
)
def test_a_node_that_answers_nonsense_fails_its_command_and_ends_nobody_elses(answer: dict[str, Any]) -> None:
    grid = FakeGrid([answering("a", 1), FakeNode("lying", 2, lambda command_id, payload: answer)])
    coordinator = FakeCoordinator()
    carry(carrier(grid, coordinator), command(["a"], command_id="c-1"), command(["lying"], command_id="c-2"))
    told = {body["id"]: body for body in coordinator.bodies if "replies" in body}
    assert answers_in(told["c-1"]) == {"a": {"from": "a"}}
    assert list(told["c-2"]["failures"]) == ["lying"]


def test_an_answer_that_flower_cannot_put_together_fails_its_node_alone() -> None:
    class Grid(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[FakeReply]:
            found = super().pull_messages(message_ids)
            if any("torn" in reply.content.get("answer", {}) for reply in found):
                raise ValueError("no such object")
            return found

    grid = Grid([answering("a", 1), FakeNode("lying", 2, lambda command_id, payload: {"torn": True})])
    both = [command(["a"], command_id="c-1"), command(["lying"], command_id="c-2")]
    coordinator = FakeCoordinator()
    one = carrier(grid, coordinator)
    with pytest.raises(ValueError, match="no such object"):
        carry(one, *both)  # all that came together is lost; `run` goes on, and the commands are handed out again
    carry(one, *both)
    told = {body["id"]: body for body in coordinator.bodies if "replies" in body}
    assert answers_in(told["c-1"]) == {"a": {"from": "a"}}
    assert "cannot be put together (ValueError)" in told["c-2"]["failures"]["lying"]


def test_a_command_that_rests_is_waited_with_and_one_that_is_due_is_not() -> None:
    """Hours may pass: the ServerApp then asks as rarely as with nothing in its hands."""
    answers: dict[str, dict[str, Any]] = {}
    silent = FakeNode("a", 1, lambda command_id, payload: answers.get(command_id))
    standing, due = command(["a"], 3600.0, rests=True), command(["a"], 0.7)
    coordinator = FakeCoordinator([standing, None, None, command(["b"], 30.0, "c-2"), None, None, due, None])
    coordinator.commands.append(SystemExit())
    grid = FakeGrid([silent, answering("b", 2)])
    one = carrier(grid, coordinator)
    with pytest.raises(SystemExit):
        one.run()
    asked = [(rests, waits) for rests, waits in coordinator.rested]
    assert asked[:5] == [((), True), (("c-1",), False), (("c-1",), True), (("c-1",), True), (("c-1",), False)]
    assert asked[-2:] == [((), False), ((), False)], "once it is due it is worked on"
    carry(one)
    body = coordinator.bodies[-1]
    assert (body["id"], body["failures"]) == ("c-1", {"a": "did not answer in time"}), "by its new deadline"
    assert [name for name, _ in grid.delivered] == ["a", "b"], "it is not sent twice for that"
    assert grid.lives_s[0] > 3600, "Flower keeps a message for as long as its answer may take"


def test_failures_that_lie_far_apart_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingGrid(FakeGrid):
        failures = 2

        def get_nodes(self) -> list[FakeNode]:
            if self.failures:
                self.failures -= 1
                raise ConnectionError("SuperLink: reset")
            return super().get_nodes()

    monkeypatch.setattr(flower_carrier, "FAILURE_S", 0.0)
    monkeypatch.setattr(flower_carrier, "CARRY_FAILURES_MAX", 2)
    coordinator = FakeCoordinator([command(["a"]), None] * 3 + [SystemExit()])
    with pytest.raises(SystemExit):
        carrier(FailingGrid([answering("a", 1)]), coordinator).run()
    assert answers_in(coordinator.bodies[-1]) == {"a": {"from": "a"}}


def test_who_was_never_asked_is_told_from_who_refused() -> None:
    refusing = FakeNode("a", 1, lambda command_id, payload: {"id": command_id, "error": "Untrusted: no"})
    coordinator = FakeCoordinator()
    carry(carrier(FakeGrid([refusing]), coordinator), command(["a", "b"], 0.7))
    assert (coordinator.bodies[-1]["undone"], coordinator.bodies[-1]["unasked"]) == (["a", "b"], ["b"])
