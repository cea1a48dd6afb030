"""One client's session: what it asked for, what waits for it, and what it has not acknowledged.

A message is one immutable value however many sessions it waits for. Everything that can grow has a bound in `Limits`;
what does not fit is dropped and counted, newest first. Sections named below are those of MQTT Version 5.0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from model_delta.topics import PACKET_BYTES_MAX

EXPIRY_SECONDS_MAX = 120 * 86_400

SessionKey = tuple[str, str]
"""(identity, client id)"""


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one broker. Bytes count payload and topic; a payload that waits for many sessions is held once.

    `connect_seconds`: for the TLS handshake, and again until CONNECT. `stalled_seconds`: how long a client may leave
    unread what was written to it.
    """

    clients_max: int = 10_000
    packet_bytes_max: int = PACKET_BYTES_MAX
    connect_bytes_max: int = 131_072
    receive_max: int = 1_000
    inflight_max: int = 1_000
    queued_max: int = 1_000
    queued_bytes_max: int = 64_000_000
    subscriptions_max: int = 256
    sessions_per_identity_max: int = 8
    retained_max: int = 20_000
    retained_bytes_max: int = 64_000_000
    retained_bytes_per_identity_max: int = 16_000_000
    keep_alive_seconds_max: int = 3_600
    connect_seconds: float = 10.0
    stalled_seconds: float = 30.0


class Message(msgspec.Struct, frozen=True):
    """One published message. `created` and `expires` are seconds since 1970 (`expires` 0: never, section 3.3.2.3.3)."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    sender: str
    created: float
    expires: float = 0.0
    sender_client: str = ""
    payload_format: int = 0
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    user_properties: tuple[tuple[str, str], ...] = ()

    def expired(self, now: float) -> bool:
        """True from the moment its expiry interval has passed."""
        return self.expires > 0 and now >= self.expires

    @property
    def size(self) -> int:
        """Payload and topic in bytes (characters for the topic)."""
        return len(self.payload) + len(self.topic)


class Subscription(msgspec.Struct, frozen=True):
    """One filter of a session with its options (section 3.8.3.1). `retain_handling` 0, 1 or 2."""

    pattern: str
    qos: int
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


class Delivery(msgspec.Struct, frozen=True):
    """A message on its way to one session: granted QoS and the retain flag it will carry."""

    message: Message
    qos: int
    retain: bool = False


class Sending(NamedTuple):
    """What to write next: `packet_id` 0 for QoS 0; `duplicate` when it may have been sent before."""

    packet_id: int
    delivery: Delivery
    duplicate: bool


class Session:
    """Subscriptions, the queue, and what was sent but not acknowledged, for one (identity, client id)."""

    __slots__ = (
        "_inflight_bytes",
        "_limits",
        "_next_id",
        "_resend",
        "connected",
        "disconnected_at",
        "dropped",
        "expired",
        "expiry_seconds",
        "inflight",
        "key",
        "subscriptions",
        "waiting",
        "waiting_bytes",
        "window",
    )

    def __init__(self, key: SessionKey, limits: Limits) -> None:
        self.key = key
        self._limits = limits
        self.connected = False
        self.disconnected_at = 0.0
        self.expiry_seconds = 0
        self.window = limits.inflight_max
        self.subscriptions: dict[str, Subscription] = {}
        self.waiting: deque[Delivery] = deque()
        self.waiting_bytes = 0
        self.inflight: dict[int, Delivery] = {}
        self._inflight_bytes = 0
        self._resend: deque[int] = deque()
        self._next_id = 1
        self.dropped = 0
        self.expired = 0

    def attach(self, expiry_seconds: int, receive_max: int) -> None:
        """A client came: what it has not acknowledged goes out again first, in order (section 4.4)."""
        self.connected = True
        self.expiry_seconds = expiry_seconds
        self.window = max(1, min(receive_max, self._limits.inflight_max))
        self._resend = deque(self.inflight)

    def detach(self, now: float) -> None:
        """The client is gone: QoS 0 is forgotten, the rest waits."""
        self.connected = False
        self.disconnected_at = now
        self._resend.clear()
        kept = deque(delivery for delivery in self.waiting if delivery.qos)
        self.waiting, self.waiting_bytes = kept, sum(delivery.message.size for delivery in kept)

    def offer(self, delivery: Delivery) -> bool:
        """Queue a delivery; False (and counted as dropped) when the session's bounds are reached."""
        if not self.connected and not delivery.qos:
            return False
        size = delivery.message.size
        if (
            len(self.waiting) >= self._limits.queued_max
            or self.waiting_bytes + self._inflight_bytes + size > self._limits.queued_bytes_max
        ):
            self.dropped += 1
            return False
        self.waiting.append(delivery)
        self.waiting_bytes += size
        return True

    def take(self, now: float) -> Sending | None:
        """The next packet to write, or None when there is none or the client's receive maximum is reached.

        Messages whose expiry passed while they waited are discarded (section 3.3.2.3.3); a message whose delivery had
        started is sent again whatever its age (section 4.4).
        """
        open_window = len(self.inflight) - len(self._resend) < self.window
        while self._resend:
            if not open_window:
                return None
            packet_id = self._resend.popleft()
            if packet_id in self.inflight:
                return Sending(packet_id, self.inflight[packet_id], True)
        while self.waiting:
            delivery = self.waiting[0]
            if not delivery.message.expired(now):
                if not delivery.qos:
                    self._pop()
                    return Sending(0, delivery, False)
                if not open_window:
                    return None
                self._pop()
                packet_id = self._free_id()
                self.inflight[packet_id] = delivery
                self._inflight_bytes += delivery.message.size
                return Sending(packet_id, delivery, False)
            self._pop()
            self.expired += 1
        return None

    def acknowledge(self, packet_id: int) -> bool:
        """The client has it. False when nothing with this id is in flight."""
        delivery = self.inflight.pop(packet_id, None)
        if delivery is None:
            return False
        self._inflight_bytes -= delivery.message.size
        return True

    def drop_expired(self, now: float) -> None:
        """Discard what expired at the head of the queue, so that an absent client's queue does not hold dead weight."""
        while self.waiting and self.waiting[0].message.expired(now):
            self._pop()
            self.expired += 1

    def restore(self, inflight: Iterable[tuple[int, Delivery]], waiting: Iterable[Delivery], next_id: int) -> None:
        """Put back what a snapshot held."""
        self.inflight = dict(inflight)
        self._inflight_bytes = sum(delivery.message.size for delivery in self.inflight.values())
        self.waiting = deque(waiting)
        self.waiting_bytes = sum(delivery.message.size for delivery in self.waiting)
        self._next_id = next_id

    @property
    def next_id(self) -> int:
        """The packet id that is tried next: 1 to 65535."""
        return self._next_id

    def _pop(self) -> None:
        self.waiting_bytes -= self.waiting.popleft().message.size

    def _free_id(self) -> int:
        # The window is at most inflight_max, far below 65,535, so this ends.
        while self._next_id in self.inflight:
            self._next_id = self._next_id % 65_535 + 1
        packet_id = self._next_id
        self._next_id = packet_id % 65_535 + 1
        return packet_id
