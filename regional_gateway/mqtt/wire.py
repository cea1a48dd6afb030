"""MQTT 5 packets as bytes, in both directions, for hostile peers.

The wire format is the `mqtt5` codec's (sans-I/O); only this file and `connection` import it. Sizes are checked before
anything is buffered, text before the codec sees it, and whatever the codec refuses becomes a `Close`. Sections named
below are those of MQTT Version 5.0.
"""

from __future__ import annotations

import math

import mqtt5

from regional_gateway.mqtt.session import Sending
from regional_gateway.mqtt.text import problem_in

# Mind: the codec's enums are Rust classes; they equal integers, but have no order, no hash, and are always true.
Connack = mqtt5.ConnAckReasonCode
Reason = mqtt5.DisconnectReasonCode


class Close(Exception):
    """The connection must end, with this reason."""

    def __init__(self, reason: mqtt5.DisconnectReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Refuse(Exception):
    """The CONNECT is not accepted, with this reason."""

    def __init__(self, reason: mqtt5.ConnAckReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def packet_length(view: memoryview, start: int, limit: int) -> int | None:
    """The whole packet's length at `start`, None while its header is incomplete (section 2.1.4).

    Raises Close before anything of an oversized packet is buffered.
    """
    length, shift = 0, 0
    for position in range(start + 1, min(start + 5, len(view))):
        byte = view[position]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            total = position + 1 - start + length
            if total > limit:
                raise Close(Reason.PACKET_TOO_LARGE, f"a packet of {total} bytes, at most {limit} are accepted")
            return total
    if len(view) - start >= 5:
        raise Close(Reason.MALFORMED_PACKET, "remaining length of more than four bytes")
    return None


def require_version_5(packet: memoryview) -> None:
    """Raise Refuse for a CONNECT of another protocol version: the codec would only say that it is malformed."""
    version = _protocol_version(packet)
    if version not in (0, 5):
        raise Refuse(Connack.UNSUPPORTED_PROTOCOL_VERSION, f"protocol level {version}, expected 5 (MQTT 5.0)")


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


def refusal(received: bytearray, reason: mqtt5.ConnAckReasonCode) -> bytes:
    """CONNACK with `reason`, in the words of the version that asked.

    MQTT 3.1 and 3.1.1 clients cannot read a version 5 CONNACK (it has one byte more), so they get their own: return
    code 1, unacceptable protocol version (MQTT 3.1.1 section 3.2.2.3). Others get 0x84 as MQTT 5.0 writes it.
    """
    if reason == Connack.UNSUPPORTED_PROTOCOL_VERSION:
        return b"\x20\x02\x00\x01" if _protocol_version(received) in (3, 4) else b"\x20\x03\x00\x84\x00"
    return mqtt5.ConnAckPacket(reason_code=reason).write()


def decode(data: memoryview) -> mqtt5.Packet:
    """One whole packet. Raises Close for anything that is not MQTT 5."""
    problem = problem_in(data)
    if problem:
        raise Close(Reason.MALFORMED_PACKET, f"malformed packet: {problem}")
    try:
        packet, length = mqtt5.read(data)
    except (ValueError, IndexError) as error:
        raise Close(Reason.MALFORMED_PACKET, f"malformed packet: {str(error)[:100]}") from None
    except BaseException as error:
        # A Rust panic is no Exception. None is known beyond what `problem_in` finds, but one must not end the broker.
        if type(error).__name__ != "PanicException":
            raise
        raise Close(Reason.MALFORMED_PACKET, "malformed packet: the codec gave up on it") from None
    if length != len(data):
        raise Close(Reason.MALFORMED_PACKET, "malformed packet: its fields do not fill it")
    return packet


def encode(sending: Sending, now: float, size_max: int) -> bytes | None:
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


def require_packet_id(packet_id: int) -> int:
    """Return `packet_id`; 0 ends the connection (section 2.2.1)."""
    if not packet_id:
        raise Close(Reason.PROTOCOL_ERROR, "packet identifier 0")
    return packet_id
