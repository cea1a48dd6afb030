"""A small MQTT 5 broker in this process, for machines without mosquitto.

It speaks MQTT 5.0 only, with QoS 0 and 1, over TLS with client certificates; the certificate's common name is the
identity that the access rules see. `mqtt_sessions` decides everything; this file owns the sockets, the clock and the
data folder. The wire format is the `mqtt5` codec's (sans-I/O), and this is its only importer.

* Without TLS (tests, loopback) the client id is the identity, so nobody is authenticated.
* A hostile or broken client costs its own connection and nothing else: packet size, handshake time, queue, write
  buffer and session count are bounded, and whatever the codec refuses closes the connection it came from.
* State (retained messages, persistent sessions and their queues) is written as two atomic snapshots at most half a
  second after it changed and again on exit, so SIGKILL loses at most the last second. PUBACK does not wait for it.
* Wills of clients that are connected when the broker stops are not published: the clients did not go away.

Fleets of production size belong on mosquitto or a broker cluster; the same contract tests run against both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import ssl
import sys
import time
from asyncio import sslproto
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import mqtt5

from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Unavailable
from regional_gateway.mqtt_sessions import (
    EXPIRY_SECONDS_MAX,
    SHARED_PREFIX,
    Acl,
    Limits,
    Message,
    RetainedSnapshot,
    Sending,
    Session,
    SessionKey,
    SessionSnapshot,
    SessionTable,
    Subscription,
    valid_filter,
    valid_identity,
    valid_topic,
)
from regional_gateway.mqtt_text import problem_in

HOUSEKEEPING_SECONDS = 0.5
CLOSE_SECONDS = 1.0
WRITE_BUFFER_BYTES = 262_144
TLS_READ_BYTES = 16_384

_log = logging.getLogger(__name__)
# Mind: the codec's enums are Rust classes; they equal integers, but have no order, no hash, and are always true.

_Snapshot = TypeVar("_Snapshot", SessionSnapshot, RetainedSnapshot)
_Connack = mqtt5.ConnAckReasonCode
_Reason = mqtt5.DisconnectReasonCode


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


class _Close(Exception):
    """The connection must end, with this reason."""

    def __init__(self, reason: mqtt5.DisconnectReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class _Refuse(Exception):
    """The CONNECT is not accepted, with this reason."""

    def __init__(self, reason: mqtt5.ConnAckReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def server_tls(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer that demands a client certificate issued by `ca`. Raises OSError and ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def serve(
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    folder: Path,
    acl: Acl,
    limits: Limits | None = None,
    revoked: Callable[[int], bool] = lambda serial: False,
    ready: Callable[[MqttBroker], None] = lambda broker: None,
) -> None:
    """Run a broker until cancelled; `ready` is called once it listens. The caller turns signals into cancellation.

    Raises Unavailable when the port is taken and Malformed for a data folder of a newer version.
    """
    async with MqttBroker(
        host=host, port=port, tls=tls, folder=folder, acl=acl, limits=limits, revoked=revoked
    ) as broker:
        ready(broker)
        await broker.failed()


class MqttBroker:
    """An MQTT 5 broker bound to (host, port) while entered; port 0 takes a free one, see `.port`.

    `tls` must demand client certificates, or be None: then nobody is authenticated and the client id is the identity.
    `revoked` is asked with the certificate's serial number. `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        folder: Path,
        acl: Acl,
        limits: Limits | None = None,
        revoked: Callable[[int], bool] = lambda serial: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if tls is not None and tls.verify_mode != ssl.CERT_REQUIRED:
            raise Malformed("broker TLS: expected a context that requires client certificates; use server_tls()")
        self.host, self.port = host, port
        self.limits = limits or Limits()
        self.metrics = BrokerMetrics()
        self.acl, self.revoked, self.clock = acl, revoked, clock
        self.table = SessionTable(self.limits)
        self.authenticated = tls is not None
        self._tls = tls
        self._folder = folder
        self._connections: set[_Connection] = set()
        self._by_session: dict[SessionKey, _Connection] = {}
        self._touched: set[Session] = set()
        self._written = {"sessions": 0, "retained": 0}
        self._stopping = asyncio.Event()
        self._empty = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        sessions = _load(self._folder / "sessions.cbor", SessionSnapshot)
        retained = _load(self._folder / "retained.cbor", RetainedSnapshot)
        if sessions is not None:
            self.table.thaw_sessions(sessions, self.acl, self.clock())
        if retained is not None:
            self.table.thaw_retained(retained)
        self._written = {"sessions": self.table.revision, "retained": self.table.retained.revision}
        if self._tls is not None:
            _shrink_tls_buffers()
        handshake = (
            {"ssl_handshake_timeout": self.limits.connect_seconds, "ssl_shutdown_timeout": 2.0} if self._tls else {}
        )
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Connection(self, loop),
                self.host,
                self.port,
                ssl=self._tls,
                backlog=1_024,
                **cast(Any, handshake),
            )
        except OSError as error:
            raise Unavailable(
                f"broker: cannot listen on {self.host}:{self.port} ({error.strerror or error}); "
                "stop the program that holds the port, or choose another one"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="broker-snapshot")
        self._housekeeping = asyncio.create_task(self._keep_house(), name="broker-housekeeping")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.close()
        for connection in list(self._connections):
            connection.shut(_Reason.SERVER_SHUTTING_DOWN, "the broker stops")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS if self._connections else 0):
                await self._empty.wait()
        for connection in list(self._connections):
            connection.abort()
        try:
            # A failure in housekeeping was raised by `failed`, or is raised here when nobody waited there.
            await self._housekeeping
        finally:
            self._save_now()
            self._writer.shutdown()

    async def failed(self) -> None:
        """Wait for ever, or until the broker's own background work fails; then raise what it raised."""
        await asyncio.shield(self._housekeeping)

    # --- for connections ---

    def admit(self, connection: _Connection) -> bool:
        """Take up a new connection unless there are clients_max already."""
        self._connections.add(connection)
        self._empty.clear()
        return len(self._connections) <= self.limits.clients_max

    def forget(self, connection: _Connection) -> None:
        """The transport is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def attach(
        self, connection: _Connection, key: SessionKey, packet: mqtt5.ConnectPacket, expiry_seconds: int
    ) -> tuple[Session, bool]:
        """The session for `connection`; an older connection of the same session is told 0x8E and closed."""
        older = self._by_session.pop(key, None)
        if older is not None:
            self.metrics.takeovers += 1
            older.taken_over(clean_start=packet.clean_start)
        opened = self.table.open(
            key, clean_start=packet.clean_start, expiry_seconds=expiry_seconds, receive_max=packet.receive_max
        )
        if opened is None:
            raise _Refuse(_Connack.QUOTA_EXCEEDED, f"{key[0]} holds too many sessions")
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

    # --- background ---

    async def _keep_house(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(HOUSEKEEPING_SECONDS):
                    await self._stopping.wait()
            except TimeoutError:
                self._sweep()
                await self._save()

    def _sweep(self) -> None:
        for connection in list(self._connections):
            connection.check_deadlines()
        for will in self.table.expire(self.clock()):
            self.publish(will)
        self.flush()
        self.metrics.clients = len(self._by_session)
        self.metrics.sessions = len(self.table.sessions)
        self.metrics.queued = self.table.queued()
        self.metrics.retained = self.table.retained.count
        self.metrics.dropped = self.table.dropped

    async def _save(self) -> None:
        for path, record, name, revision in self._unsaved():
            # Packing happens in the thread too: the records are immutable, and the loop keeps serving.
            loop = asyncio.get_running_loop()
            self._saved(name, revision, await loop.run_in_executor(self._writer, _store, path, record))

    def _save_now(self) -> None:
        for path, record, name, revision in self._unsaved():
            self._saved(name, revision, self._writer.submit(_store, path, record).result())

    def _unsaved(self) -> list[tuple[Path, SessionSnapshot | RetainedSnapshot, str, int]]:
        found: list[tuple[Path, SessionSnapshot | RetainedSnapshot, str, int]] = []
        if self.table.retained.revision != self._written["retained"]:
            record = self.table.freeze_retained()
            found.append((self._folder / "retained.cbor", record, "retained", self.table.retained.revision))
        if self.table.revision != self._written["sessions"]:
            found.append(
                (self._folder / "sessions.cbor", self.table.freeze_sessions(), "sessions", self.table.revision)
            )
        return found

    def _saved(self, name: str, revision: int, failure: str) -> None:
        if not failure:
            self._written[name] = revision
            return
        if not self.metrics.snapshot_failures:
            _log.error("broker: %s not written to %s: %s; retried twice a second", name, self._folder, failure)
        self.metrics.snapshot_failures += 1


class _Connection(asyncio.Protocol):
    """One client's socket: bytes in, packets to the rules, packets out."""

    def __init__(self, broker: MqttBroker, loop: asyncio.AbstractEventLoop) -> None:
        self._broker = broker
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._identity = ""
        self._revoked = False
        self._session: Session | None = None
        self._will: mqtt5.Will | None = None
        self._closing = False
        self._opened_at = loop.time()
        self._heard_at = self._opened_at
        self._silence_max = math.inf
        self._paused_at: float | None = None
        self._packet_bytes_max = broker.limits.packet_bytes_max
        self._expiry_seconds = 0

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._opened_at = self._heard_at = self._loop.time()
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        found = transport.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._broker.admit(self):
            self._closing = True
            self.abort()
            return
        if self._broker.authenticated:
            certificate = transport.get_extra_info("peercert") or {}
            self._identity = _common_name(certificate)
            self._revoked = self._broker.revoked(int(certificate.get("serialNumber", "0"), 16))

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._heard_at = self._loop.time()
        self._buffer += data
        try:
            self._read_packets()
        except _Close as close:
            _log.info("broker: closing %s: %s", self._identity or "a client", close)
            self.shut(close.reason, str(close))
        except _Refuse as refuse:
            _log.info("broker: refusing %s: %s", self._identity or "a client", refuse)
            self._refuse(refuse.reason)
        self._flush_out()
        self._broker.flush()

    def pause_writing(self) -> None:
        self._paused_at = self._loop.time()

    def resume_writing(self) -> None:
        self._paused_at = None
        self.send_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._buffer = bytearray()  # not clear(): a traceback may still hold a view of it
        self._broker.forget(self)
        self._leave(will=True)
        self._broker.flush()

    # --- for the broker ---

    def taken_over(self, *, clean_start: bool) -> None:
        """A newer connection has the session (section 3.1.4): say so, and settle the will."""
        if self._will is not None and self._will.will_delay_interval and not clean_start:
            self._will = None  # the client is back before the delay passed
        self.shut(_Reason.SESSION_TAKEN_OVER, "a newer connection has this session")

    def shut(self, reason: mqtt5.DisconnectReasonCode, text: str) -> None:
        """Send DISCONNECT, leave the session, close. Does nothing twice."""
        if self._closing:
            return
        self._closing = True
        if self._session is not None:
            self._out.append(mqtt5.DisconnectPacket(reason_code=reason, reason_str=text[:200]).write())
        self._leave(will=reason != _Reason.SERVER_SHUTTING_DOWN)
        self._end()

    def abort(self) -> None:
        """Drop the transport without waiting for the peer."""
        if self._transport is not None:
            self._transport.abort()

    def check_deadlines(self) -> None:
        """Close what never said CONNECT, fell silent for 1.5 keep-alives, or does not read what it is sent."""
        now, limits = self._loop.time(), self._broker.limits
        if self._closing:
            return
        if self._session is None:
            if now - self._opened_at > limits.connect_seconds:
                self._closing = True
                self.abort()
        elif self._paused_at is not None and now - self._paused_at > limits.stalled_seconds:
            _log.info("broker: %s does not read; disconnected", self._identity)
            self._closing = True
            self._leave(will=True)
            self.abort()
        elif now - self._heard_at > self._silence_max:
            self.shut(_Reason.KEEP_ALIVE_TIMEOUT, "nothing heard for 1.5 keep-alives")

    def send_waiting(self) -> None:
        """Write what the session has, until its window, its queue or the socket says stop."""
        session = self._session
        if session is None or self._closing:
            return
        now = self._broker.clock()
        size = 0
        while self._paused_at is None and (sending := session.take(now)) is not None:
            packet = _encode(sending, now, self._packet_bytes_max)
            if packet is None:
                session.acknowledge(sending.packet_id)
                session.dropped += 1
                self._broker.table.dropped += 1
                continue
            self._out.append(packet)
            self._broker.metrics.messages_out += 1
            size += len(packet)
            if size >= 65_536:
                self._flush_out()
                size = 0
        self._flush_out()

    # --- packets ---

    def _read_packets(self) -> None:
        start = 0
        view = memoryview(self._buffer)
        try:
            while not self._closing:
                limits = self._broker.limits
                if self._session is None and start < len(view) and view[start] != 0x10:
                    raise _Close(_Reason.PROTOCOL_ERROR, "expected CONNECT first")
                limit = limits.packet_bytes_max if self._session is not None else limits.connect_bytes_max
                length = _packet_length(view, start, limit)
                if length is None or start + length > len(view):
                    break
                if self._session is None:
                    _require_version_5(view[start : start + length])
                packet = _decode(view[start : start + length])
                start += length
                self._on_packet(packet)
        except _Close as close:
            if close.reason in (_Reason.MALFORMED_PACKET, _Reason.PROTOCOL_ERROR):
                self._broker.metrics.malformed += 1
            raise
        finally:
            view.release()
        del self._buffer[:start]

    def _on_packet(self, packet: mqtt5.Packet) -> None:
        if self._session is None:
            if not isinstance(packet, mqtt5.ConnectPacket):
                raise _Close(_Reason.PROTOCOL_ERROR, "expected CONNECT first")
            self._on_connect(packet)
        elif isinstance(packet, mqtt5.PublishPacket):
            self._on_publish(packet, self._session)
        elif isinstance(packet, mqtt5.PubAckPacket):
            # An unknown id is left unanswered: it may acknowledge a message from before a queue was lost.
            if self._broker.table.acknowledge(self._session, packet.packet_id):
                self._broker.touch(self._session)
        elif isinstance(packet, mqtt5.PingReqPacket):
            self._out.append(mqtt5.PingRespPacket().write())
        elif isinstance(packet, mqtt5.SubscribePacket):
            self._on_subscribe(packet, self._session)
        elif isinstance(packet, mqtt5.UnsubscribePacket):
            _require_packet_id(packet.packet_id)
            codes = [
                mqtt5.UnsubAckReasonCode.SUCCESS
                if self._broker.table.unsubscribe(self._session, pattern)
                else mqtt5.UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED
                for pattern in packet.patterns
            ]
            if not codes:
                raise _Close(_Reason.PROTOCOL_ERROR, "UNSUBSCRIBE without a filter")
            self._out.append(mqtt5.UnsubAckPacket(packet.packet_id, codes).write())
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._on_disconnect(packet)
        else:
            raise _Close(_Reason.PROTOCOL_ERROR, f"unexpected {type(packet).__name__}")

    def _on_connect(self, packet: mqtt5.ConnectPacket) -> None:
        if packet.authentication_method is not None:
            raise _Refuse(_Connack.BAD_AUTHENTICATION_METHOD, "the certificate is the only authentication")
        if not self._broker.authenticated:
            self._identity = packet.client_id
        if self._revoked:
            raise _Refuse(_Connack.NOT_AUTHORIZED, "the certificate is revoked")
        if not valid_identity(self._identity):
            raise _Refuse(_Connack.NOT_AUTHORIZED, "no name, or one with characters that a topic cannot hold")
        client_id = packet.client_id or f"{self._identity}:{secrets.token_hex(6)}"
        if not client_id.startswith(self._identity) or len(client_id) > len(self._identity) + 64 or "\0" in client_id:
            raise _Refuse(
                _Connack.CLIENT_ID_NOT_VALID, "the client id must be the certificate's name, or start with it"
            )
        self._require_will(packet.will)
        limits = self._broker.limits
        expiry = min(packet.session_expiry_interval, EXPIRY_SECONDS_MAX)
        keep_alive = min(packet.keep_alive or limits.keep_alive_seconds_max, limits.keep_alive_seconds_max)
        session, present = self._broker.attach(self, (self._identity, client_id), packet, expiry)
        self._session, self._will, self._expiry_seconds = session, packet.will, expiry
        self._silence_max = keep_alive * 1.5
        self._packet_bytes_max = min(limits.packet_bytes_max, packet.max_packet_size or limits.packet_bytes_max)
        self._broker.metrics.connects += 1
        self._out.append(
            mqtt5.ConnAckPacket(
                session_present=present,
                session_expiry_interval=expiry if expiry != packet.session_expiry_interval else None,
                assigned_client_id=None if packet.client_id else client_id,
                server_keep_alive=keep_alive if keep_alive != packet.keep_alive else None,
                receive_max=limits.receive_max,
                max_qos=mqtt5.QoS.AT_LEAST_ONCE,
                max_packet_size=limits.packet_bytes_max,
                subscription_id_available=False,
                shared_subscription_available=False,
            ).write()
        )
        self._broker.touch(session)

    def _require_will(self, will: mqtt5.Will | None) -> None:
        if will is None:
            return
        if int(will.qos) > 1:
            raise _Refuse(_Connack.QUALITY_NOT_SUPPORTED, "will with QoS 2")
        if not valid_topic(will.topic):
            raise _Refuse(_Connack.TOPIC_NAME_INVALID, "will topic")
        if not self._broker.acl(self._identity, "publish", will.topic):
            self._broker.metrics.refused += 1
            raise _Refuse(_Connack.NOT_AUTHORIZED, f"will to {will.topic[:100]!r}")

    def _on_publish(self, packet: mqtt5.PublishPacket, session: Session) -> None:
        if packet.topic_alias is not None:
            raise _Close(_Reason.TOPIC_ALIAS_INVALID, "topic aliases are not offered")
        if packet.subscription_ids:
            raise _Close(_Reason.PROTOCOL_ERROR, "PUBLISH from a client with a subscription identifier")
        if int(packet.qos) > 1:
            raise _Close(_Reason.QOS_NOT_SUPPORTED, "the maximum QoS is 1")
        if not valid_topic(packet.topic):
            raise _Close(_Reason.TOPIC_NAME_INVALID, "a topic with a wildcard, NUL or too many levels")
        code = self._route(packet, session)
        if int(packet.qos):
            packet_id = _require_packet_id(packet.packet_id or 0)
            self._out.append(mqtt5.PubAckPacket(packet_id, reason_code=code).write())

    def _route(self, packet: mqtt5.PublishPacket, session: Session) -> mqtt5.PubAckReasonCode:
        broker = self._broker
        broker.metrics.messages_in += 1
        if not broker.acl(self._identity, "publish", packet.topic):
            broker.metrics.refused += 1
            return mqtt5.PubAckReasonCode.NOT_AUTHORIZED
        message = self._message(packet, packet.message_expiry_interval, session)
        if message.retain and not broker.table.retained.fits(message):
            broker.table.dropped += 1
            return mqtt5.PubAckReasonCode.QUOTA_EXCEEDED
        broker.publish(message)
        return mqtt5.PubAckReasonCode.SUCCESS

    def _message(
        self, source: mqtt5.PublishPacket | mqtt5.Will, expiry_interval: int | None, session: Session
    ) -> Message:
        now = self._broker.clock()
        return Message(
            topic=source.topic,
            payload=source.payload or b"",
            qos=int(source.qos),
            retain=source.retain,
            sender=self._identity,
            sender_client=session.key[1],
            created=now,
            # An interval of 0 would expire at once; `expires` 0 means never.
            expires=0.0 if expiry_interval is None else now + expiry_interval,
            payload_format=source.payload_format_indicator,
            content_type=source.content_type,
            response_topic=source.response_topic,
            correlation=source.correlation_data,
            user_properties=tuple(source.user_properties),
        )

    def _on_subscribe(self, packet: mqtt5.SubscribePacket, session: Session) -> None:
        _require_packet_id(packet.packet_id)
        if not packet.topic_filters:
            raise _Close(_Reason.PROTOCOL_ERROR, "SUBSCRIBE without a filter")
        if packet.subscription_id is not None:
            raise _Close(_Reason.SUBSCRIPTION_IDS_NOT_SUPPORTED, "subscription identifiers are not offered")
        codes = [self._subscribe(wanted, session) for wanted in packet.topic_filters]
        # SUBACK goes out before the retained messages that the filters brought.
        self._out.append(mqtt5.SubAckPacket(packet.packet_id, codes).write())
        self._broker.touch(session)

    def _subscribe(self, wanted: mqtt5.TopicFilter, session: Session) -> mqtt5.SubAckReasonCode:
        if wanted.pattern.split("/", 1)[0] == SHARED_PREFIX:
            return mqtt5.SubAckReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
        if not valid_filter(wanted.pattern):
            return mqtt5.SubAckReasonCode.TOPIC_FILTER_INVALID
        if not self._broker.acl(self._identity, "subscribe", wanted.pattern):
            self._broker.metrics.refused += 1
            return mqtt5.SubAckReasonCode.NOT_AUTHORIZED
        qos = min(int(wanted.max_qos), 1)
        subscription = Subscription(
            wanted.pattern, qos, wanted.no_local, wanted.retain_as_published, int(wanted.retain_handling)
        )
        if not self._broker.table.subscribe(session, subscription, self._broker.clock()):
            return mqtt5.SubAckReasonCode.QUOTA_EXCEEDED
        return mqtt5.SubAckReasonCode(qos)

    def _on_disconnect(self, packet: mqtt5.DisconnectPacket) -> None:
        expiry = packet.session_expiry_interval
        if expiry is not None and expiry > 0 and not self._expiry_seconds:
            raise _Close(_Reason.PROTOCOL_ERROR, "DISCONNECT may not make a session persistent")
        self._closing = True
        self._leave(
            will=packet.reason_code != _Reason.NORMAL_DISCONNECTION,
            expiry_seconds=None if expiry is None else min(expiry, EXPIRY_SECONDS_MAX),
        )
        self._end()

    # --- the end of a connection ---

    def _leave(self, *, will: bool, expiry_seconds: int | None = None) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        left, self._will = self._will, None
        expiry = self._expiry_seconds if expiry_seconds is None else expiry_seconds
        self._broker.detach(session, expiry_seconds)
        if left is None or not will:
            return
        message = self._message(left, left.message_expiry_interval, session)
        if message.retain and not self._broker.table.retained.fits(message):
            return
        delay = min(left.will_delay_interval, expiry)
        if delay:
            self._broker.table.leave_will(session.key, message, self._broker.clock() + delay)
        else:
            self._broker.publish(message)

    def _refuse(self, reason: mqtt5.ConnAckReasonCode) -> None:
        self._closing = True
        self._out.append(_refusal(self._buffer, reason))
        self._end()

    def _end(self) -> None:
        self._flush_out()
        if self._transport is not None:
            if self._paused_at is not None:
                self._transport.abort()  # it does not read: nothing would be flushed
            else:
                self._transport.close()

    def _flush_out(self) -> None:
        if self._out and self._transport is not None:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)


def _packet_length(view: memoryview, start: int, limit: int) -> int | None:
    """The whole packet's length at `start`, None while its header is incomplete (section 2.1.4).

    Raises _Close before anything of an oversized packet is buffered.
    """
    length, shift = 0, 0
    for position in range(start + 1, min(start + 5, len(view))):
        byte = view[position]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            total = position + 1 - start + length
            if total > limit:
                raise _Close(_Reason.PACKET_TOO_LARGE, f"a packet of {total} bytes, at most {limit} are accepted")
            return total
    if len(view) - start >= 5:
        raise _Close(_Reason.MALFORMED_PACKET, "remaining length of more than four bytes")
    return None


def _require_version_5(packet: memoryview) -> None:
    """Raise _Refuse for a CONNECT of another protocol version: the codec would only say that it is malformed."""
    version = _protocol_version(packet)
    if version not in (0, 5):
        raise _Refuse(_Connack.UNSUPPORTED_PROTOCOL_VERSION, f"protocol level {version}, expected 5 (MQTT 5.0)")


def _protocol_version(data: memoryview | bytearray) -> int:
    """The protocol level in the bytes of a CONNECT (3: MQTT 3.1, 4: 3.1.1, 5: 5.0), 0 if they are none."""
    if len(data) < 2 or data[0] != 0x10:
        return 0
    position = 2
    while position < 5 and position <= len(data) and data[position - 1] & 0x80:
        position += 1
    head = bytes(data[position : position + 9])
    for name in (b"\x00\x04MQTT", b"\x00\x06MQIsdp"):
        if head.startswith(name) and len(head) > len(name):
            return head[len(name)]
    return 0


def _refusal(received: bytearray, reason: mqtt5.ConnAckReasonCode) -> bytes:
    """CONNACK with `reason`, in the words of the version that asked.

    MQTT 3.1 and 3.1.1 clients cannot read a version 5 CONNACK (it has one byte more), so they get their own: return
    code 1, unacceptable protocol version (MQTT 3.1.1 section 3.2.2.3). Others get 0x84 as MQTT 5.0 writes it.
    """
    if reason == _Connack.UNSUPPORTED_PROTOCOL_VERSION:
        return b"\x20\x02\x00\x01" if _protocol_version(received) in (3, 4) else b"\x20\x03\x00\x84\x00"
    return mqtt5.ConnAckPacket(reason_code=reason).write()


def _decode(data: memoryview) -> mqtt5.Packet:
    """One whole packet. Raises _Close for anything that is not MQTT 5."""
    problem = problem_in(data)
    if problem:
        raise _Close(_Reason.MALFORMED_PACKET, f"malformed packet: {problem}")
    try:
        packet, length = mqtt5.read(data)
    except (ValueError, IndexError) as error:
        raise _Close(_Reason.MALFORMED_PACKET, f"malformed packet: {str(error)[:100]}") from None
    except BaseException as error:
        # A Rust panic is no Exception. None is known beyond what `problem_in` finds, but one must not end the broker.
        if type(error).__name__ != "PanicException":
            raise
        raise _Close(_Reason.MALFORMED_PACKET, "malformed packet: the codec gave up on it") from None
    if length != len(data):
        raise _Close(_Reason.MALFORMED_PACKET, "malformed packet: its fields do not fill it")
    return packet


def _encode(sending: Sending, now: float, size_max: int) -> bytes | None:
    """The PUBLISH for one delivery; None when the client would refuse its size, or its fields cannot be written."""
    message = sending.delivery.message
    if message.size > size_max:
        return None
    try:
        data = mqtt5.PublishPacket(
            message.topic,
            message.payload,
            qos=mqtt5.QoS(sending.delivery.qos),
            retain=sending.delivery.retain,
            packet_id=sending.packet_id or None,
            duplicate=sending.duplicate,
            payload_format_indicator=message.payload_format,
            message_expiry_interval=max(1, math.ceil(message.expires - now)) if message.expires else None,
            content_type=message.content_type,
            response_topic=message.response_topic,
            correlation_data=message.correlation,
            user_properties=list(message.user_properties) or None,
        ).write()
    except ValueError:
        return None
    return data if len(data) <= size_max else None


def _require_packet_id(packet_id: int) -> int:
    if not packet_id:
        raise _Close(_Reason.PROTOCOL_ERROR, "packet identifier 0")
    return packet_id


def _common_name(certificate: dict[str, Any]) -> str:
    """The subject's one common name; "" when there is none, or more than one."""
    subject: Sequence[Sequence[tuple[str, str]]] = certificate.get("subject", ())
    names = [value for part in subject for name, value in part if name == "commonName"]
    return names[0] if len(names) == 1 and valid_identity(names[0]) else ""


def _shrink_tls_buffers() -> None:
    """Lower the read buffer of asyncio's TLS connections from 256 KiB to 16 KiB each (the size of a TLS record).

    A class attribute of CPython's own that may go away: left alone unless it is what it was in 3.11 to 3.14.
    """
    if getattr(sslproto.SSLProtocol, "max_size", None) == 256 * 1024:
        sslproto.SSLProtocol.max_size = TLS_READ_BYTES


def _load(path: Path, kind: type[_Snapshot]) -> _Snapshot | None:
    """A snapshot, None when there is none. One that cannot be read is set aside, so that the fleet is not kept down."""
    try:
        return unpack(path.read_bytes(), kind)
    except FileNotFoundError:
        return None
    except Malformed as error:
        aside = path.with_suffix(".unreadable")
        path.replace(aside)
        _log.error("broker: %s is unreadable (%s); moved to %s, starting without it", path, error, aside.name)
        return None


def _store(path: Path, record: SessionSnapshot | RetainedSnapshot) -> str:
    """Write atomically: temporary file, fsync, rename, fsync of the folder. Returns "" or what went wrong."""
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("wb") as file:
            file.write(pack(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if sys.platform != "win32":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        return f"{error.strerror or error}"
    return ""
