"""What hangs on a topic's levels: who subscribed to it, and its retained message.

Both are trees by level, so that finding a topic's holders, or a filter's retained messages, does not depend on the
size of the fleet. Sections named below are those of MQTT Version 5.0.
"""

from __future__ import annotations

from collections.abc import Iterator

from regional_gateway.mqtt.session import Limits, Message, Session, Subscription


class _Node:
    __slots__ = ("below", "holders", "message")

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.holders: dict[Session, Subscription] = {}
        self.message: Message | None = None

    @property
    def empty(self) -> bool:
        return not self.below and not self.holders and self.message is None


def _descend(root: _Node, levels: list[str]) -> _Node:
    node = root
    for level in levels:
        node = node.below.setdefault(level, _Node())
    return node


def _find(root: _Node, levels: list[str]) -> list[_Node] | None:
    path = [root]
    for level in levels:
        below = path[-1].below.get(level)
        if below is None:
            return None
        path.append(below)
    return path


def _prune(path: list[_Node], levels: list[str]) -> None:
    for parent, level, node in zip(reversed(path[:-1]), reversed(levels), reversed(path), strict=False):
        if not node.empty:
            return
        del parent.below[level]


class FilterTree:
    """Who subscribed to what, by level, so that finding a topic's holders does not depend on the fleet's size."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, session: Session, subscription: Subscription) -> None:
        """Add or replace."""
        _descend(self._root, subscription.pattern.split("/")).holders[session] = subscription

    def remove(self, session: Session, pattern: str) -> None:
        """Remove if there."""
        levels = pattern.split("/")
        path = _find(self._root, levels)
        if path is not None:
            path[-1].holders.pop(session, None)
            _prune(path, levels)

    def holders(self, topic: str) -> dict[Session, list[Subscription]]:
        """Every session with at least one matching filter, and those filters."""
        found: dict[Session, list[Subscription]] = {}
        levels = topic.split("/")

        def collect(node: _Node) -> None:
            for session, subscription in node.holders.items():
                found.setdefault(session, []).append(subscription)

        nodes = [self._root]
        for depth, level in enumerate(levels):
            following: list[_Node] = []
            wild = depth > 0 or not level.startswith("$")
            for node in nodes:
                if (exact := node.below.get(level)) is not None:
                    following.append(exact)
                if wild and (single := node.below.get("+")) is not None:
                    following.append(single)
                if wild and (rest := node.below.get("#")) is not None:
                    collect(rest)
            nodes = following
        for node in nodes:
            collect(node)
            if (rest := node.below.get("#")) is not None:  # `a/#` matches `a` too (section 4.7.1.2)
                collect(rest)
        return found


class RetainedStore:
    """The newest retained message of each topic, bounded in count and bytes, overall and per sender, so that one
    hostile device cannot use up the room that the signed plans need."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._root = _Node()
        self._bytes_by_sender: dict[str, int] = {}
        self._expiring = 0
        self.count = 0
        self.bytes = 0
        self.revision = 0

    def fits(self, message: Message) -> bool:
        """Would `put` stay inside the bounds? Clearing always does."""
        if not message.payload:
            return True
        path = _find(self._root, message.topic.split("/"))
        old = path[-1].message if path else None
        freed = old.size if old else 0
        own = self._bytes_by_sender.get(message.sender, 0) - (freed if old and old.sender == message.sender else 0)
        return (
            self.count + (old is None) <= self._limits.retained_max
            and self.bytes - freed + message.size <= self._limits.retained_bytes_max
            and own + message.size <= self._limits.retained_bytes_per_identity_max
        )

    def put(self, message: Message) -> None:
        """Keep `message` for its topic, or forget the topic when the payload is empty (section 3.3.1.3)."""
        levels = message.topic.split("/")
        self._forget(levels)
        if message.payload:
            _descend(self._root, levels).message = message
            self.count += 1
            self._expiring += message.expires > 0
            self.bytes += message.size
            self._bytes_by_sender[message.sender] = self._bytes_by_sender.get(message.sender, 0) + message.size
        self.revision += 1

    def matching(self, pattern: str, now: float) -> list[Message]:
        """Retained messages that the filter matches and that have not expired."""
        found: list[Message] = []
        nodes = [self._root]
        for depth, level in enumerate(pattern.split("/")):
            if level == "#":
                for node in nodes:
                    found.extend(self._below(node, skip_system=depth == 0))
                nodes = []
                break
            if level == "+":
                nodes = [
                    below
                    for node in nodes
                    for name, below in node.below.items()
                    if depth > 0 or not name.startswith("$")
                ]
            else:
                nodes = [below for node in nodes if (below := node.below.get(level)) is not None]
        found.extend(node.message for node in nodes if node.message is not None)
        return [message for message in found if not message.expired(now)]

    def drop_expired(self, now: float) -> None:
        """Forget what expired."""
        if not self._expiring:
            return
        for message in [message for message in self.all() if message.expired(now)]:
            self._forget(message.topic.split("/"))
            self.revision += 1

    def all(self) -> Iterator[Message]:
        """Every retained message."""
        return self._below(self._root, skip_system=False)

    def _forget(self, levels: list[str]) -> None:
        path = _find(self._root, levels)
        if path is None or path[-1].message is None:
            return
        old = path[-1].message
        path[-1].message = None
        _prune(path, levels)
        self.count -= 1
        self._expiring -= old.expires > 0
        self.bytes -= old.size
        left = self._bytes_by_sender[old.sender] - old.size
        if left:
            self._bytes_by_sender[old.sender] = left
        else:
            del self._bytes_by_sender[old.sender]

    def _below(self, node: _Node, *, skip_system: bool) -> Iterator[Message]:
        stack = [node]
        while stack:
            current = stack.pop()
            if current.message is not None:
                yield current.message
            for name, below in current.below.items():
                if not (skip_system and current is node and name.startswith("$")):
                    stack.append(below)
