"""What a restarted broker goes on from: its sessions and retained messages as two records.

A snapshot stores each message once, however many sessions it waits for. Compatibility promise of the records
(`SessionSnapshot`, `RetainedSnapshot`): fields may be added with a default; a reader refuses a `format` newer than its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from model_delta.errors import Malformed
from regional_gateway.mqtt.session import Delivery, Limits, Message, Session, Subscription

SNAPSHOT_FORMAT = 1


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


def session_snapshot(sessions: Iterable[Session]) -> SessionSnapshot:
    """What a restarted broker needs to go on with the persistent ones of `sessions`; each message appears once."""
    messages: dict[int, int] = {}
    kept: list[Message] = []

    def stored(delivery: Delivery, packet_id: int) -> StoredDelivery:
        position = messages.get(id(delivery.message))
        if position is None:
            position = messages[id(delivery.message)] = len(kept)
            kept.append(delivery.message)
        return StoredDelivery(position, delivery.qos, delivery.retain, packet_id)

    records = tuple(
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
        for session in sessions
        if session.expiry_seconds
    )
    return SessionSnapshot(SNAPSHOT_FORMAT, tuple(kept), records)


def retained_snapshot(messages: Iterable[Message]) -> RetainedSnapshot:
    """`messages` as a record."""
    return RetainedSnapshot(SNAPSHOT_FORMAT, tuple(messages))


def sessions_of(
    snapshot: SessionSnapshot, limits: Limits, now: float
) -> Iterator[tuple[Session, tuple[Subscription, ...]]]:
    """The sessions of a snapshot, nobody connected, and what each had subscribed to. Raises Malformed."""
    _require_format(snapshot.format)
    for record in snapshot.sessions:
        session = Session((record.identity, record.client_id), limits)
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
        yield session, record.subscriptions


def retained_of(snapshot: RetainedSnapshot) -> tuple[Message, ...]:
    """The messages of a snapshot. Raises Malformed."""
    _require_format(snapshot.format)
    return snapshot.messages


def _require_format(found: int) -> None:
    if found != SNAPSHOT_FORMAT:
        raise Malformed(
            f"broker snapshot: expected format {SNAPSHOT_FORMAT}, found {found}; "
            "it was written by another version: run that version, or start with an empty folder"
        )
