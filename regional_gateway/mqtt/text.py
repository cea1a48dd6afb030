"""Is all text in an MQTT packet UTF-8? Asked before the codec sees the packet.

The codec (mqtt5 0.8.0) answers text that is not UTF-8 with a Rust panic, which writes to stderr and leaks about 25 KB
each time. A device with a valid certificate could so exhaust the broker's memory. This walk over the packet's fields
(MQTT 5.0, chapters 2 and 3) finds the text and leaves every other judgement to the codec.
"""

from __future__ import annotations

CONNECT, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 3, 4, 5, 6, 7
SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT, AUTH = 8, 10, 12, 14, 15

_WIDTH = dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1)
_WIDTH |= dict.fromkeys((0x13, 0x21, 0x22, 0x23), 2) | dict.fromkeys((0x02, 0x11, 0x18, 0x27), 4)
_TEXT = frozenset((0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, 0x1F))
_BINARY = frozenset((0x09, 0x16))
_VARIABLE, _PAIR = 0x0B, 0x26


def problem_in(packet: memoryview) -> str:
    """What is wrong with one whole packet's text or with its form as far as text depends on it; "" if nothing is.

    `packet` starts at the fixed header and has the length that the header says. Packet types that only a server sends
    are a problem, too.
    """
    try:
        _Walk(packet).check()
    except UnicodeDecodeError:
        return "text is not UTF-8"
    except (IndexError, ValueError) as error:
        return str(error) or "its fields overrun it"
    return ""


class _Walk:
    def __init__(self, packet: memoryview) -> None:
        self._packet = packet
        self._at = 1
        self._variable()

    def check(self) -> None:
        first = self._packet[0]
        kind = first >> 4
        if kind == PUBLISH:
            self._text()
            self._skip(2 if first & 0x06 else 0)
            self._properties()
        elif kind == CONNECT:
            self._connect()
        elif kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
            self._skip(2)
            self._reason()
        elif kind in (SUBSCRIBE, UNSUBSCRIBE):
            self._skip(2)
            self._properties()
            while self._left:
                self._text()
                self._skip(1 if kind == SUBSCRIBE else 0)
        elif kind in (DISCONNECT, AUTH):
            self._reason()
        elif kind != PINGREQ:
            raise ValueError(f"packet type {kind} is not for a client to send")

    @property
    def _left(self) -> int:
        return len(self._packet) - self._at

    def _connect(self) -> None:
        self._text()
        self._skip(1)
        flags = self._packet[self._at]
        self._skip(3)
        self._properties()
        self._text()
        if flags & 0x04:
            self._properties()
            self._text()
            self._binary()
        if flags & 0x80:
            self._text()
        if flags & 0x40:
            self._binary()

    def _reason(self) -> None:
        if self._left:
            self._skip(1)
        if self._left:
            self._properties()

    def _properties(self) -> None:
        length = self._variable()
        end = self._at + length
        while self._at < end:
            name = self._packet[self._at]
            self._skip(1)
            if name in _TEXT:
                self._text()
            elif name == _PAIR:
                self._text()
                self._text()
            elif name in _WIDTH:
                self._skip(_WIDTH[name])
            elif name in _BINARY:
                self._binary()
            elif name == _VARIABLE:
                self._variable()
            else:
                raise ValueError(f"property 0x{name:02x} does not exist")
        if self._at != end:
            raise ValueError("properties overrun their length")

    def _text(self) -> None:
        start = self._at + 2
        self._binary()
        str(self._packet[start : self._at], "utf-8")

    def _binary(self) -> None:
        at = self._at
        self._skip(2)
        self._skip(self._packet[at] << 8 | self._packet[at + 1])

    def _variable(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._packet[self._at]
            self._skip(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift == 28:
                raise ValueError("a length of more than four bytes")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._packet):
            raise IndexError
