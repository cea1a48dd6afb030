"""All sessions of one broker, and how a message finds its way among them.

These are the rules behind `broker`, without sockets, files or a clock, so that a test can play two clients, a broker
restart and 120 days in a millisecond. Sections named below are those of MQTT Version 5.0 (OASIS Standard).

A session belongs to an identity (the certificate's common name). Its key is (identity, client id), so no identity can
take over, empty or watch another one's session by borrowing its client id.
"""

from __future__ import annotations

from collections import Counter

from regional_gateway.mqtt.access import Acl
from regional_gateway.mqtt.session import Delivery, Limits, Message, Session, SessionKey, Subscription
from regional_gateway.mqtt.snapshots import (
    RetainedSnapshot,
    SessionSnapshot,
    retained_of,
    retained_snapshot,
    session_snapshot,
    sessions_of,
)
from regional_gateway.mqtt.topic_tree import FilterTree, RetainedStore


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
        """Everything a restarted broker needs to go on with its persistent sessions."""
        return session_snapshot(self.sessions.values())

    def freeze_retained(self) -> RetainedSnapshot:
        """Every retained message."""
        return retained_snapshot(self.retained.all())

    def thaw_sessions(self, snapshot: SessionSnapshot, acl: Acl, now: float) -> None:
        """Fill an empty table. Filters that `acl` no longer allows are left out. Raises Malformed."""
        for session, subscriptions in sessions_of(snapshot, self.limits, now):
            self._insert(session)
            for subscription in subscriptions:
                if acl(session.key[0], "subscribe", subscription.pattern):
                    session.subscriptions[subscription.pattern] = subscription
                    self._filters.add(session, subscription)

    def thaw_retained(self, snapshot: RetainedSnapshot) -> None:
        """Fill an empty store. Raises Malformed."""
        for message in retained_of(snapshot):
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
