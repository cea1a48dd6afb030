"""Flower's Grid and the coordinator's endpoints, in memory: nodes come and go, answers arrive when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class FakeNode:
    """A node as `Grid.get_nodes` describes it, and how it answers: None stays silent, "lost" loses the answer."""

    name: str
    node_id: int
    answer: Callable[[str, bytes], dict[str, Any] | str | None]
    status: str = "online"
    last_activated_at: str = "first"


@dataclass
class _Metadata:
    reply_to_message_id: str


@dataclass
class FakeReply:
    """As much of a Flower message as the carrier looks at."""

    metadata: _Metadata
    content: dict[str, Any]
    lost: bool

    def has_error(self) -> bool:
        return self.lost


@dataclass
class FakeGrid:
    """Delivers pushed messages at once; the first pull after that returns the answers."""

    nodes: list[FakeNode]
    delivered: list[tuple[str, bytes]] = field(default_factory=list)
    lives_s: list[float] = field(default_factory=list)
    """How long each message is kept by Flower."""
    _replies: dict[str, FakeReply] = field(default_factory=dict)

    def get_nodes(self) -> list[FakeNode]:
        return [replace(node) for node in self.nodes]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        ids = []
        for message in messages:
            node = next(node for node in self.nodes if node.node_id == message.metadata.dst_node_id)
            record = message.content["command"]
            message_id = f"m-{len(self.delivered)}"
            self.delivered.append((node.name, record["payload"]))
            self.lives_s.append(message.metadata.ttl)
            answer = node.answer(record["id"], record["payload"])
            if answer is not None:
                lost = isinstance(answer, str)
                content = {} if lost else {"answer": answer}
                self._replies[message_id] = FakeReply(_Metadata(message_id), content, lost)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[FakeReply]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]


@dataclass
class FakeCoordinator:
    """Hands out what is in `commands` (an exception is raised), keeps what is delivered."""

    commands: list[Any] = field(default_factory=list)
    wanted: bool = True
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    held: list[tuple[str, ...]] = field(default_factory=list)
    rested: list[tuple[tuple[str, ...], bool]] = field(default_factory=list)
    """What the asker let rest, and whether it would have waited."""

    def next_command(self, holds: Collection[str], rests: Collection[str], wait_s: float) -> Any:
        self.held.append(tuple(holds))
        self.rested.append((tuple(rests), wait_s > 0))
        command = self.commands.pop(0) if self.commands else None
        if isinstance(command, BaseException):
            raise command
        return command

    def reply(self, body: Mapping[str, Any]) -> bool:
        self.bodies.append(body)
        return self.wanted
