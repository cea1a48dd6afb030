"""What an MQTT 5 broker decides: who may say and hear what, which session gets which message, and what is kept.

These are the rules behind `mqtt_broker`, without sockets, files or a clock, so that a test can play two clients, a
broker restart and 120 days in a millisecond. Sections named below are those of MQTT Version 5.0 (OASIS Standard).

* A session belongs to an identity (the certificate's common name). Its key is (identity, client id), so no identity
  can take over, empty or watch another one's session by borrowing its client id.
* Everything that can grow has a bound in `Limits`; what does not fit is dropped and counted, newest first.
* A message is one immutable value however many sessions it waits for; a snapshot stores it once, too.

Compatibility promise of the snapshot records (`SessionSnapshot`, `RetainedSnapshot`): fields may be added with a
default; a reader refuses a `format` newer than its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from model_delta.errors import Malformed
from model_delta.topics import ROOT

SNAPSHOT_FORMAT = 1
SHARED_PREFIX = "$share"
EXPIRY_SECONDS_MAX = 120 * 86_400
LEVELS_MAX = 64

Action = Literal["publish", "subscribe"]
Acl = Callable[[str, Action, str], bool]
"""`acl(identity, action, topic or filter)`: may this identity do this?"""

SessionKey = tuple[str, str]


class Limits(msgspec.Struct, frozen=True):
    """Bounds of one broker. Bytes count payload and topic; a payload that waits for many sessions is held once.

    `connect_seconds`: for the TLS handshake, and again until CONNECT. `stalled_seconds`: how long a client may leave
    unread what was written to it.
    """

    clients_max: int = 10_000
    packet_bytes_max: int = 1_000_000
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


# --- topics and filters (section 4.7) -------------------------------------------------------------------------------


def valid_topic(topic: str) -> bool:
    """May a message be published to `topic`? No wildcard, no NUL, at most LEVELS_MAX levels."""
    return len(topic) > 0 and not any(c in topic for c in "+#\0") and topic.count("/") < LEVELS_MAX


def valid_filter(pattern: str) -> bool:
    """Is `pattern` a well-formed topic filter? `+` and `#` fill a whole level, `#` only the last (section 4.7.1)."""
    if not pattern or "\0" in pattern or pattern.count("/") >= LEVELS_MAX:
        return False
    levels = pattern.split("/")
    for position, level in enumerate(levels):
        if ("+" in level or "#" in level) and len(level) > 1:
            return False
        if level == "#" and position != len(levels) - 1:
            return False
    return True


def matches(pattern: str, topic: str) -> bool:
    """Does the filter `pattern` match `topic`? A leading wildcard never matches a topic that starts with `$`."""
    return covers(pattern, topic) if valid_topic(topic) else False


def covers(pattern: str, other: str) -> bool:
    """Does the filter `pattern` match every topic that the filter (or topic) `other` matches?

    Decides whether a subscription stays inside what is allowed, so it errs to False.
    """
    wanted, found = pattern.split("/"), other.split("/")
    if found[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position == len(found) or found[position] == "#":
            return False
        if level not in ("+", found[position]):
            return False
    return len(found) == len(wanted)


# --- who may do what ------------------------------------------------------------------------------------------------


class AccessRules(msgspec.Struct, frozen=True):
    """Filters by role; `%u` stands for the identity. `platform` names may do everything below `platform_filter`. Every
    other identity may write and read only its own branch and read what is for all. A name that begins with
    `region_prefix` is a region's (`%r`: the rest of the name): beside its own branch it hears what devices ask of this
    region, and may answer; it can neither read nor forge a device's reports, keys, contributions, or a plan."""

    write: tuple[str, ...] = (f"{ROOT}/dev/%u/up/#",)
    read: tuple[str, ...] = (f"{ROOT}/dev/%u/down/#", f"{ROOT}/cfg/#")
    platform: tuple[str, ...] = ("coordinator",)
    platform_filter: str = f"{ROOT}/#"
    region_prefix: str = "gateway-"
    region_write: tuple[str, ...] = (f"{ROOT}/dev/+/down/res", f"{ROOT}/dev/+/down/trust")
    region_read: tuple[str, ...] = (f"{ROOT}/dev/+/up/req/%r", f"{ROOT}/dev/+/up/trust/%r")

    def region_of(self, identity: str) -> str:
        """The region whose gateway `identity` is; "" when it is none."""
        return identity.removeprefix(self.region_prefix) if identity.startswith(self.region_prefix) else ""


FLEET_RULES = AccessRules()


def valid_identity(identity: str) -> bool:
    """May `identity` stand in a topic? A name with a wildcard or a slash would widen the filters made from it."""
    return 0 < len(identity) <= 128 and identity.isprintable() and not any(c in identity for c in "+#/$% ")


def access(rules: AccessRules) -> Acl:
    """The access callable for `rules`. It errs to False: a filter is allowed only if one rule covers all of it."""

    def allowed(identity: str, action: Action, topic: str) -> bool:
        if not valid_identity(identity):
            return False
        if identity in rules.platform:
            return covers(rules.platform_filter, topic)
        patterns = rules.write if action == "publish" else rules.read
        if region := rules.region_of(identity):
            patterns += rules.region_write if action == "publish" else rules.region_read
            return any(covers(pattern.replace("%u", identity).replace("%r", region), topic) for pattern in patterns)
        return any(covers(pattern.replace("%u", identity), topic) for pattern in patterns)

    return allowed


# --- messages and sessions ------------------------------------------------------------------------------------------


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


# --- snapshots ------------------------------------------------------------------------------------------------------


class StoredDelivery(msgspec.Struct, frozen=True):
    """A delivery; `message` is an index into the snapshot's messages, `packet_id` 0 when not in flight."""

    message: int
    qos: int
    retain: bool
    packet_id: int = 0


class StoredSession(msgspec.Struct, frozen=True):
    """One persistent session. `disconnected_at` 0: a client was connected when the snapshot was taken."""

    identity: str
    client_id: str
    expiry_seconds: int
    disconnected_at: float
    subscriptions: tuple[Subscription, ...]
    deliveries: tuple[StoredDelivery, ...]
    next_id: int = 1
    dropped: int = 0


class SessionSnapshot(msgspec.Struct, frozen=True):
    """All persistent sessions and the messages that wait for them."""

    format: int
    messages: tuple[Message, ...]
    sessions: tuple[StoredSession, ...]


class RetainedSnapshot(msgspec.Struct, frozen=True):
    """All retained messages."""

    format: int
    messages: tuple[Message, ...]


class SessionTable:
    """All sessions, filters and retained messages of one broker, and how a message finds its way among them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sessions: dict[SessionKey, Session] = {}
        self.retained = RetainedStore(limits)
        self.revision = 0
        self.dropped = 0
        self._filters = FilterTree()
        self._held: Counter[str] = Counter()
        self._wills: dict[SessionKey, tuple[float, Message]] = {}
        self._overdue: list[Message] = []

    def open(
        self, key: SessionKey, *, clean_start: bool, expiry_seconds: int, receive_max: int
    ) -> tuple[Session, bool] | None:
        """The session for a connecting client and whether it was there before (section 3.1.2.4).

        None when the identity holds sessions_per_identity_max others. The caller has closed an older connection.
        """
        session = self.sessions.get(key)
        if session is not None and clean_start:
            self._remove(session)
            session = None
        present = session is not None
        if session is None:
            if self._held[key[0]] >= self.limits.sessions_per_identity_max:
                return None
            session = self._insert(Session(key, self.limits))
        session.attach(expiry_seconds, receive_max)
        will = self._wills.pop(key, None)
        if will is not None and clean_start:
            self._overdue.append(will[1])  # the old session ended: its will is due now (section 3.1.3.2.2)
        self.revision += 1
        return session, present

    def close(self, session: Session, now: float, expiry_seconds: int | None = None) -> None:
        """The client is gone; `expiry_seconds` as its DISCONNECT changed it. A session that expires now is removed."""
        if expiry_seconds is not None:
            session.expiry_seconds = expiry_seconds
        session.detach(now)
        if not session.expiry_seconds:
            self._remove(session)
        self.revision += 1

    def subscribe(self, session: Session, subscription: Subscription, now: float) -> bool:
        """Add or replace a filter and queue the retained messages it asks for (section 3.8.3.1, retain handling).

        False when the session holds subscriptions_max filters already.
        """
        known = subscription.pattern in session.subscriptions
        if not known and len(session.subscriptions) >= self.limits.subscriptions_max:
            return False
        session.subscriptions[subscription.pattern] = subscription
        self._filters.add(session, subscription)
        self.revision += 1
        if subscription.retain_handling == 0 or (subscription.retain_handling == 1 and not known):
            for message in self.retained.matching(subscription.pattern, now):
                self._offer(session, Delivery(message, min(message.qos, subscription.qos), retain=True))
        return True

    def unsubscribe(self, session: Session, pattern: str) -> bool:
        """Remove a filter; False when it was not there."""
        if session.subscriptions.pop(pattern, None) is None:
            return False
        self._filters.remove(session, pattern)
        self.revision += 1
        return True

    def publish(self, message: Message) -> list[Session]:
        """Queue `message` for every session that asked for it, and retain it if it says so.

        A session with several matching filters gets one copy with the highest granted QoS (section 3.3.4). Returns the
        sessions that have something new to send. The caller has checked `retained.fits`.
        """
        if message.retain:
            self.retained.put(message)
        touched: list[Session] = []
        sender = (message.sender, message.sender_client)
        for session, subscriptions in self._filters.holders(message.topic).items():
            wanted = [s for s in subscriptions if not (s.no_local and session.key == sender)]
            if not wanted:
                continue
            qos = min(message.qos, max(subscription.qos for subscription in wanted))
            retain = message.retain and any(subscription.retain_as_published for subscription in wanted)
            if self._offer(session, Delivery(message, qos, retain)):
                touched.append(session)
        return touched

    def acknowledge(self, session: Session, packet_id: int) -> bool:
        """The client has `packet_id`; False when nothing with this id was in flight."""
        known = session.acknowledge(packet_id)
        self.revision += known
        return known

    def leave_will(self, key: SessionKey, message: Message, due: float) -> None:
        """Publish `message` at `due` unless its client comes back before (section 3.1.3.2.2)."""
        self._wills[key] = (due, message)

    def due_wills(self, now: float) -> list[Message]:
        """The wills whose time has come, removed from the table."""
        due = [key for key, (at, _) in self._wills.items() if now >= at]
        overdue, self._overdue = self._overdue, []
        return overdue + [self._wills.pop(key)[1] for key in due]

    def expire(self, now: float) -> list[Message]:
        """Remove expired sessions and messages; returns the wills that became due."""
        wills = self.due_wills(now)
        for session in list(self.sessions.values()):
            if session.connected:
                continue
            if now >= session.disconnected_at + session.expiry_seconds:
                self._remove(session)
                self.revision += 1
            elif session.waiting and session.waiting[0].message.expires:
                session.drop_expired(now)
        self.retained.drop_expired(now)
        return wills

    def queued(self) -> int:
        """Messages that wait for, or are not yet acknowledged by, some session."""
        return sum(len(session.waiting) + len(session.inflight) for session in self.sessions.values())

    def freeze_sessions(self) -> SessionSnapshot:
        """Everything a restarted broker needs to go on with its persistent sessions; each message appears once."""
        messages: dict[int, int] = {}
        kept: list[Message] = []

        def stored(delivery: Delivery, packet_id: int) -> StoredDelivery:
            position = messages.get(id(delivery.message))
            if position is None:
                position = messages[id(delivery.message)] = len(kept)
                kept.append(delivery.message)
            return StoredDelivery(position, delivery.qos, delivery.retain, packet_id)

        sessions = tuple(
            StoredSession(
                identity=session.key[0],
                client_id=session.key[1],
                expiry_seconds=session.expiry_seconds,
                disconnected_at=0.0 if session.connected else session.disconnected_at,
                subscriptions=tuple(session.subscriptions.values()),
                deliveries=(
                    *(stored(delivery, packet_id) for packet_id, delivery in session.inflight.items()),
                    *(stored(delivery, 0) for delivery in session.waiting if delivery.qos),
                ),
                next_id=session.next_id,
                dropped=session.dropped,
            )
            for session in self.sessions.values()
            if session.expiry_seconds
        )
        return SessionSnapshot(SNAPSHOT_FORMAT, tuple(kept), sessions)

    def freeze_retained(self) -> RetainedSnapshot:
        """Every retained message."""
        return RetainedSnapshot(SNAPSHOT_FORMAT, tuple(self.retained.all()))

    def thaw_sessions(self, snapshot: SessionSnapshot, acl: Acl, now: float) -> None:
        """Fill an empty table. Filters that `acl` no longer allows are left out. Raises Malformed."""
        _require_format(snapshot.format)
        for record in snapshot.sessions:
            session = Session((record.identity, record.client_id), self.limits)
            session.expiry_seconds = record.expiry_seconds
            session.disconnected_at = record.disconnected_at or now
            session.dropped = record.dropped
            try:
                deliveries = [
                    (stored.packet_id, Delivery(snapshot.messages[stored.message], stored.qos, stored.retain))
                    for stored in record.deliveries
                ]
            except IndexError:
                raise Malformed(f"session snapshot: {record.client_id!r} waits for a message not in it") from None
            session.restore(
                ((packet_id, delivery) for packet_id, delivery in deliveries if packet_id),
                (delivery for packet_id, delivery in deliveries if not packet_id),
                record.next_id,
            )
            self._insert(session)
            for subscription in record.subscriptions:
                if acl(record.identity, "subscribe", subscription.pattern):
                    session.subscriptions[subscription.pattern] = subscription
                    self._filters.add(session, subscription)

    def thaw_retained(self, snapshot: RetainedSnapshot) -> None:
        """Fill an empty store. Raises Malformed."""
        _require_format(snapshot.format)
        for message in snapshot.messages:
            self.retained.put(message)

    def _offer(self, session: Session, delivery: Delivery) -> bool:
        if session.offer(delivery):
            self.revision += delivery.qos > 0
            return True
        if session.connected or delivery.qos:
            self.dropped += 1
        return False

    def _insert(self, session: Session) -> Session:
        self.sessions[session.key] = session
        self._held[session.key[0]] += 1
        return session

    def _remove(self, session: Session) -> None:
        for pattern in session.subscriptions:
            self._filters.remove(session, pattern)
        session.subscriptions.clear()
        if self.sessions.get(session.key) is session:
            del self.sessions[session.key]
            self._held[session.key[0]] -= 1
            if not self._held[session.key[0]]:
                del self._held[session.key[0]]


def _require_format(found: int) -> None:
    if found != SNAPSHOT_FORMAT:
        raise Malformed(
            f"broker snapshot: expected format {SNAPSHOT_FORMAT}, found {found}; "
            "it was written by another version: run that version, or start with an empty folder"
        )
