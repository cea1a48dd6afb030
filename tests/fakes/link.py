"""A broker in memory that behaves: retained messages, wildcards, persistent sessions, the platform's access rules.

broker = FakeBroker()
link = broker.link("pos-0001")          # a `Link`; a second call takes the session over, as MQTT does
broker.up = False                       # everybody is cut off: publish raises Unavailable
broker.lose = lambda topic, payload: "res" in topic   # swallow matching messages
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable

from edge_runtime.link import Handler, topic_matches
from model_delta.errors import Malformed, Unavailable
from model_delta.topics import PACKET_BYTES_MAX
from regional_gateway.mqtt.access import FLEET_RULES, access

QUEUE_MAX = 1000
_allowed = functools.cache(access(FLEET_RULES))


def may_publish(identity: str, topic: str) -> bool:
    """The access rule of both real brokers for writing."""
    return _allowed(identity, "publish", topic)


def may_read(identity: str, topic: str) -> bool:
    """The access rule of both real brokers for delivery."""
    return _allowed(identity, "subscribe", topic)


class FakeLink:
    """One identity's connection. `close()` leaves the session at the broker, which then queues for it."""

    def __init__(self, broker: FakeBroker, identity: str) -> None:
        self.broker, self.identity = broker, identity
        self.open = True
        self.handlers: list[tuple[str, Handler]] = []

    @property
    def connected(self) -> bool:
        return self.open and self.broker.up

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        await asyncio.sleep(0)  # a real publish always yields to the loop
        if not self.connected:
            raise Unavailable(f"publish to {topic}: the fake broker is away")
        if len(payload) + len(topic) + 64 > PACKET_BYTES_MAX:
            raise Malformed(f"publish to {topic}: at most {PACKET_BYTES_MAX} bytes in a packet, found {len(payload)}")
        if not may_publish(self.identity, topic):
            raise Unavailable(f"publish to {topic}: refused: {self.identity} is not authorised")
        self.broker.deliver(topic, bytes(payload), retain=retain)

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        self.handlers.append((topic_filter, handler))
        if self.connected:
            self.broker.subscribed(self, topic_filter)

    def close(self) -> None:
        self.open = False


class FakeBroker:
    """Everything that was published is in `log` as (topic, payload)."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.log: list[tuple[str, bytes]] = []
        self.lose: Callable[[str, bytes], bool] = lambda topic, payload: False
        self._up = True
        self._links: dict[str, FakeLink] = {}
        self._filters: dict[str, set[str]] = {}
        self._queues: dict[str, deque[tuple[str, bytes]]] = {}

    @property
    def up(self) -> bool:
        return self._up

    @up.setter
    def up(self, value: bool) -> None:
        was, self._up = self._up, value
        if value and not was:  # everybody reconnects and renews its subscriptions
            for link in self._links.values():
                if link.open:
                    for topic_filter, _ in list(link.handlers):
                        self.subscribed(link, topic_filter)

    def link(self, identity: str) -> FakeLink:
        """Connect as `identity`; an older connection of the same identity is closed."""
        older = self._links.get(identity)
        if older is not None:
            older.close()
        self._links[identity] = FakeLink(self, identity)
        return self._links[identity]

    def subscribed(self, link: FakeLink, topic_filter: str) -> None:
        """Remember a subscription; hand over what waited for it and the retained messages that match."""
        self._filters.setdefault(link.identity, set()).add(topic_filter)
        queue = self._queues.get(link.identity, deque())
        waiting = [item for item in queue if topic_matches(topic_filter, item[0])]
        for item in waiting:
            queue.remove(item)
        retained = [item for item in self.retained.items() if topic_matches(topic_filter, item[0])]
        for topic, payload in waiting + retained:
            self._hand_over(link, topic, payload)

    def deliver(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """What the broker does with one accepted publish."""
        self.log.append((topic, payload))
        if self.lose(topic, payload):
            return
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for identity, filters in self._filters.items():
            if not any(topic_matches(topic_filter, topic) for topic_filter in filters):
                continue
            link = self._links[identity]
            if link.open:
                self._hand_over(link, topic, payload)
            else:
                self._queues.setdefault(identity, deque(maxlen=QUEUE_MAX)).append((topic, payload))

    def _hand_over(self, link: FakeLink, topic: str, payload: bytes) -> None:
        if not may_read(link.identity, topic):
            return
        for topic_filter, handler in link.handlers:
            if topic_matches(topic_filter, topic):
                asyncio.get_running_loop().call_soon(_call_if_open, link, handler, topic, payload)


def _call_if_open(link: FakeLink, handler: Handler, topic: str, payload: bytes) -> None:
    if link.open:
        handler(topic, payload)
