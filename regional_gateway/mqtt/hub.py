"""What a broker's connections share: the rules, the present sizes, and who holds which session.

A connection is told here when a newer one takes its session, and when its session has something to send. Nothing here
knows packets, sockets or files; `clock` gives seconds since 1970.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from regional_gateway.mqtt.access import Acl
from regional_gateway.mqtt.session import Limits, Message, Session, SessionKey
from regional_gateway.mqtt.session_table import SessionTable


@dataclass
class BrokerMetrics:
    """Counts since the start, and the present sizes as of the last housekeeping (at most half a second old).

    `dropped`: deliveries that a bound did not let through. `refused`: publishes and filters the access rules denied.
    `malformed`: connections closed for bytes that are not MQTT 5. `snapshot_failures`: state not written, see the log.
    """

    clients: int = 0
    sessions: int = 0
    queued: int = 0
    retained: int = 0
    connects: int = 0
    messages_in: int = 0
    messages_out: int = 0
    dropped: int = 0
    refused: int = 0
    malformed: int = 0
    takeovers: int = 0
    snapshot_failures: int = 0


class Client(Protocol):
    """A connection, as far as the others are concerned."""

    def taken_over(self, *, clean_start: bool) -> None:
        """A newer connection has the session."""

    def send_waiting(self) -> None:
        """Write what the session has."""

    def check_deadlines(self) -> None:
        """Close if it was silent, or deaf, for too long."""

    def stop(self) -> None:
        """Say goodbye and close."""

    def abort(self) -> None:
        """Drop the transport."""


class Hub:
    """The sessions of one broker and the connections that hold them. `revoked` is asked with a certificate's serial
    number; unless `authenticated`, the client id is the identity."""

    def __init__(
        self,
        *,
        limits: Limits,
        acl: Acl,
        revoked: Callable[[int], bool],
        clock: Callable[[], float],
        authenticated: bool,
    ) -> None:
        self.limits, self.acl, self.revoked, self.clock = limits, acl, revoked, clock
        self.authenticated = authenticated
        self.metrics = BrokerMetrics()
        self.table = SessionTable(limits)
        self.connections: set[Client] = set()
        self.empty = asyncio.Event()
        self._by_session: dict[SessionKey, Client] = {}
        self._touched: set[Session] = set()

    def admit(self, connection: Client) -> bool:
        """Take up a new connection unless there are clients_max already."""
        self.connections.add(connection)
        self.empty.clear()
        return len(self.connections) <= self.limits.clients_max

    def forget(self, connection: Client) -> None:
        """The transport is gone."""
        self.connections.discard(connection)
        if not self.connections:
            self.empty.set()

    def attach(
        self, connection: Client, key: SessionKey, *, clean_start: bool, expiry_seconds: int, receive_max: int
    ) -> tuple[Session, bool] | None:
        """The session for `connection` and whether it was there before; an older connection of the same session is told
        0x8E and closed. None when the identity holds too many sessions."""
        older = self._by_session.pop(key, None)
        if older is not None:
            self.metrics.takeovers += 1
            older.taken_over(clean_start=clean_start)
        opened = self.table.open(key, clean_start=clean_start, expiry_seconds=expiry_seconds, receive_max=receive_max)
        if opened is not None:
            self._by_session[key] = connection
        return opened

    def detach(self, session: Session, expiry_seconds: int | None = None) -> None:
        """The session's client is gone."""
        self._by_session.pop(session.key, None)
        self.table.close(session, self.clock(), expiry_seconds)

    def publish(self, message: Message) -> None:
        """Route an admitted message; connections that have something to send are flushed by the next `flush`."""
        self._touched.update(self.table.publish(message))

    def touch(self, session: Session) -> None:
        """`session` may have something to send."""
        self._touched.add(session)

    def flush(self) -> None:
        """Write what is due to every touched session with a live connection."""
        touched, self._touched = self._touched, set()
        for session in touched:
            connection = self._by_session.get(session.key)
            if connection is not None:
                connection.send_waiting()

    def sweep(self) -> None:
        """Close whoever missed a deadline, let expire what has expired, publish the wills that are due, count."""
        for connection in list(self.connections):
            connection.check_deadlines()
        for will in self.table.expire(self.clock()):
            self.publish(will)
        self.flush()
        self.metrics.clients = len(self._by_session)
        self.metrics.sessions = len(self.table.sessions)
        self.metrics.queued = self.table.queued()
        self.metrics.retained = self.table.retained.count
        self.metrics.dropped = self.table.dropped
