"""One client of the broker: bytes in, packets to the rules, packets out.

A hostile or broken client costs its own connection and nothing else: packet size, handshake time, queue and write
buffer are bounded, and whatever the codec refuses closes the connection it came from. Sections named below are those of
MQTT Version 5.0.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
from collections.abc import Sequence
from typing import Any, cast

import mqtt5

from regional_gateway.mqtt.access import SHARED_PREFIX, valid_filter, valid_identity, valid_topic
from regional_gateway.mqtt.hub import Hub
from regional_gateway.mqtt.session import EXPIRY_SECONDS_MAX, Message, Session, Subscription
from regional_gateway.mqtt.wire import (
    Close,
    Connack,
    Reason,
    Refuse,
    decode,
    encode,
    packet_length,
    refusal,
    require_packet_id,
    require_version_5,
)

WRITE_BUFFER_BYTES = 262_144

_log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """One client's socket: bytes in, packets to the rules, packets out."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
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
        self._packet_bytes_max = hub.limits.packet_bytes_max
        self._expiry_seconds = 0

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._opened_at = self._heard_at = self._loop.time()
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        found = transport.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._hub.admit(self):
            self._closing = True
            self.abort()
            return
        if self._hub.authenticated:
            certificate = transport.get_extra_info("peercert") or {}
            self._identity = _common_name(certificate)
            self._revoked = self._hub.revoked(int(certificate.get("serialNumber", "0"), 16))

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._heard_at = self._loop.time()
        self._buffer += data
        try:
            self._read_packets()
        except Close as close:
            _log.info("broker: closing %s: %s", self._identity or "a client", close)
            self.shut(close.reason, str(close))
        except Refuse as refuse:
            _log.info("broker: refusing %s: %s", self._identity or "a client", refuse)
            self._refuse(refuse.reason)
        self._flush_out()
        self._hub.flush()

    def pause_writing(self) -> None:
        self._paused_at = self._loop.time()

    def resume_writing(self) -> None:
        self._paused_at = None
        self.send_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._buffer = bytearray()  # not clear(): a traceback may still hold a view of it
        self._hub.forget(self)
        self._leave(will=True)
        self._hub.flush()

    # --- for the hub ---

    def taken_over(self, *, clean_start: bool) -> None:
        """A newer connection has the session (section 3.1.4): say so, and settle the will."""
        if self._will is not None and self._will.will_delay_interval and not clean_start:
            self._will = None  # the client is back before the delay passed
        self.shut(Reason.SESSION_TAKEN_OVER, "a newer connection has this session")

    def stop(self) -> None:
        """Say that the broker stops, and close."""
        self.shut(Reason.SERVER_SHUTTING_DOWN, "the broker stops")

    def shut(self, reason: mqtt5.DisconnectReasonCode, text: str) -> None:
        """Send DISCONNECT, leave the session, close. Does nothing twice."""
        if self._closing:
            return
        self._closing = True
        if self._session is not None:
            self._out.append(mqtt5.DisconnectPacket(reason_code=reason, reason_str=text[:200]).write())
        self._leave(will=reason != Reason.SERVER_SHUTTING_DOWN)
        self._end()

    def abort(self) -> None:
        """Drop the transport without waiting for the peer."""
        if self._transport is not None:
            self._transport.abort()

    def check_deadlines(self) -> None:
        """Close what never said CONNECT, fell silent for 1.5 keep-alives, or does not read what it is sent."""
        now, limits = self._loop.time(), self._hub.limits
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
            self.shut(Reason.KEEP_ALIVE_TIMEOUT, "nothing heard for 1.5 keep-alives")

    def send_waiting(self) -> None:
        """Write what the session has, until its window, its queue or the socket says stop."""
        session = self._session
        if session is None or self._closing:
            return
        now = self._hub.clock()
        size = 0
        while self._paused_at is None and (sending := session.take(now)) is not None:
            packet = encode(sending, now, self._packet_bytes_max)
            if packet is None:
                session.acknowledge(sending.packet_id)
                session.dropped += 1
                self._hub.table.dropped += 1
                continue
            self._out.append(packet)
            self._hub.metrics.messages_out += 1
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
                limits = self._hub.limits
                if self._session is None and start < len(view) and view[start] != 0x10:
                    raise Close(Reason.PROTOCOL_ERROR, "expected CONNECT first")
                limit = limits.packet_bytes_max if self._session is not None else limits.connect_bytes_max
                length = packet_length(view, start, limit)
                if length is None or start + length > len(view):
                    break
                if self._session is None:
                    require_version_5(view[start : start + length])
                packet = decode(view[start : start + length])
                start += length
                self._on_packet(packet)
        except Close as close:
            if close.reason in (Reason.MALFORMED_PACKET, Reason.PROTOCOL_ERROR):
                self._hub.metrics.malformed += 1
            raise
        finally:
            view.release()
        del self._buffer[:start]

    def _on_packet(self, packet: mqtt5.Packet) -> None:
        if self._session is None:
            if not isinstance(packet, mqtt5.ConnectPacket):
                raise Close(Reason.PROTOCOL_ERROR, "expected CONNECT first")
            self._on_connect(packet)
        elif isinstance(packet, mqtt5.PublishPacket):
            self._on_publish(packet, self._session)
        elif isinstance(packet, mqtt5.PubAckPacket):
            # An unknown id is left unanswered: it may acknowledge a message from before a queue was lost.
            if self._hub.table.acknowledge(self._session, packet.packet_id):
                self._hub.touch(self._session)
        elif isinstance(packet, mqtt5.PingReqPacket):
            self._out.append(mqtt5.PingRespPacket().write())
        elif isinstance(packet, mqtt5.SubscribePacket):
            self._on_subscribe(packet, self._session)
        elif isinstance(packet, mqtt5.UnsubscribePacket):
            require_packet_id(packet.packet_id)
            codes = [
                mqtt5.UnsubAckReasonCode.SUCCESS
                if self._hub.table.unsubscribe(self._session, pattern)
                else mqtt5.UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED
                for pattern in packet.patterns
            ]
            if not codes:
                raise Close(Reason.PROTOCOL_ERROR, "UNSUBSCRIBE without a filter")
            self._out.append(mqtt5.UnsubAckPacket(packet.packet_id, codes).write())
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._on_disconnect(packet)
        else:
            raise Close(Reason.PROTOCOL_ERROR, f"unexpected {type(packet).__name__}")

    def _on_connect(self, packet: mqtt5.ConnectPacket) -> None:
        if packet.authentication_method is not None:
            raise Refuse(Connack.BAD_AUTHENTICATION_METHOD, "the certificate is the only authentication")
        if not self._hub.authenticated:
            self._identity = packet.client_id
        if self._revoked:
            raise Refuse(Connack.NOT_AUTHORIZED, "the certificate is revoked")
        if not valid_identity(self._identity):
            raise Refuse(Connack.NOT_AUTHORIZED, "no name, or one with characters that a topic cannot hold")
        client_id = packet.client_id or f"{self._identity}:{secrets.token_hex(6)}"
        if not client_id.startswith(self._identity) or len(client_id) > len(self._identity) + 64 or "\0" in client_id:
            raise Refuse(Connack.CLIENT_ID_NOT_VALID, "the client id must be the certificate's name, or start with it")
        self._require_will(packet.will)
        limits = self._hub.limits
        expiry = min(packet.session_expiry_interval, EXPIRY_SECONDS_MAX)
        keep_alive = min(packet.keep_alive or limits.keep_alive_seconds_max, limits.keep_alive_seconds_max)
        key = (self._identity, client_id)
        opened = self._hub.attach(
            self, key, clean_start=packet.clean_start, expiry_seconds=expiry, receive_max=packet.receive_max
        )
        if opened is None:
            raise Refuse(Connack.QUOTA_EXCEEDED, f"{self._identity} holds too many sessions")
        session, present = opened
        self._session, self._will, self._expiry_seconds = session, packet.will, expiry
        self._silence_max = keep_alive * 1.5
        self._packet_bytes_max = min(limits.packet_bytes_max, packet.max_packet_size or limits.packet_bytes_max)
        self._hub.metrics.connects += 1
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
        self._hub.touch(session)

    def _require_will(self, will: mqtt5.Will | None) -> None:
        if will is None:
            return
        if int(will.qos) > 1:
            raise Refuse(Connack.QUALITY_NOT_SUPPORTED, "will with QoS 2")
        if not valid_topic(will.topic):
            raise Refuse(Connack.TOPIC_NAME_INVALID, "will topic")
        if not self._hub.acl(self._identity, "publish", will.topic):
            self._hub.metrics.refused += 1
            raise Refuse(Connack.NOT_AUTHORIZED, f"will to {will.topic[:100]!r}")

    def _on_publish(self, packet: mqtt5.PublishPacket, session: Session) -> None:
        if packet.topic_alias is not None:
            raise Close(Reason.TOPIC_ALIAS_INVALID, "topic aliases are not offered")
        if packet.subscription_ids:
            raise Close(Reason.PROTOCOL_ERROR, "PUBLISH from a client with a subscription identifier")
        if int(packet.qos) > 1:
            raise Close(Reason.QOS_NOT_SUPPORTED, "the maximum QoS is 1")
        if not valid_topic(packet.topic):
            raise Close(Reason.TOPIC_NAME_INVALID, "a topic with a wildcard, NUL or too many levels")
        code = self._route(packet, session)
        if int(packet.qos):
            packet_id = require_packet_id(packet.packet_id or 0)
            self._out.append(mqtt5.PubAckPacket(packet_id, reason_code=code).write())

    def _route(self, packet: mqtt5.PublishPacket, session: Session) -> mqtt5.PubAckReasonCode:
        hub = self._hub
        hub.metrics.messages_in += 1
        if not hub.acl(self._identity, "publish", packet.topic):
            hub.metrics.refused += 1
            return mqtt5.PubAckReasonCode.NOT_AUTHORIZED
        message = self._message(packet, packet.message_expiry_interval, session)
        if message.retain and not hub.table.retained.fits(message):
            hub.table.dropped += 1
            return mqtt5.PubAckReasonCode.QUOTA_EXCEEDED
        hub.publish(message)
        return mqtt5.PubAckReasonCode.SUCCESS

    def _message(
        self, source: mqtt5.PublishPacket | mqtt5.Will, expiry_interval: int | None, session: Session
    ) -> Message:
        now = self._hub.clock()
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
        require_packet_id(packet.packet_id)
        if not packet.topic_filters:
            raise Close(Reason.PROTOCOL_ERROR, "SUBSCRIBE without a filter")
        if packet.subscription_id is not None:
            raise Close(Reason.SUBSCRIPTION_IDS_NOT_SUPPORTED, "subscription identifiers are not offered")
        codes = [self._subscribe(wanted, session) for wanted in packet.topic_filters]
        # SUBACK goes out before the retained messages that the filters brought.
        self._out.append(mqtt5.SubAckPacket(packet.packet_id, codes).write())
        self._hub.touch(session)

    def _subscribe(self, wanted: mqtt5.TopicFilter, session: Session) -> mqtt5.SubAckReasonCode:
        if wanted.pattern.split("/", 1)[0] == SHARED_PREFIX:
            return mqtt5.SubAckReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
        if not valid_filter(wanted.pattern):
            return mqtt5.SubAckReasonCode.TOPIC_FILTER_INVALID
        if not self._hub.acl(self._identity, "subscribe", wanted.pattern):
            self._hub.metrics.refused += 1
            return mqtt5.SubAckReasonCode.NOT_AUTHORIZED
        qos = min(int(wanted.max_qos), 1)
        subscription = Subscription(
            wanted.pattern, qos, wanted.no_local, wanted.retain_as_published, int(wanted.retain_handling)
        )
        if not self._hub.table.subscribe(session, subscription, self._hub.clock()):
            return mqtt5.SubAckReasonCode.QUOTA_EXCEEDED
        return mqtt5.SubAckReasonCode(qos)

    def _on_disconnect(self, packet: mqtt5.DisconnectPacket) -> None:
        expiry = packet.session_expiry_interval
        if expiry is not None and expiry > 0 and not self._expiry_seconds:
            raise Close(Reason.PROTOCOL_ERROR, "DISCONNECT may not make a session persistent")
        self._closing = True
        self._leave(
            will=packet.reason_code != Reason.NORMAL_DISCONNECTION,
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
        self._hub.detach(session, expiry_seconds)
        if left is None or not will:
            return
        message = self._message(left, left.message_expiry_interval, session)
        if message.retain and not self._hub.table.retained.fits(message):
            return
        delay = min(left.will_delay_interval, expiry)
        if delay:
            self._hub.table.leave_will(session.key, message, self._hub.clock() + delay)
        else:
            self._hub.publish(message)

    def _refuse(self, reason: mqtt5.ConnAckReasonCode) -> None:
        self._closing = True
        self._out.append(refusal(self._buffer, reason))
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


def _common_name(certificate: dict[str, Any]) -> str:
    """The subject's one common name; "" when there is none, or more than one."""
    subject: Sequence[Sequence[tuple[str, str]]] = certificate.get("subject", ())
    names = [value for part in subject for name, value in part if name == "commonName"]
    return names[0] if len(names) == 1 and valid_identity(names[0]) else ""
