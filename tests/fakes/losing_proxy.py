"""A way to a Kafka broker on which an acknowledgement gets lost: the client never learns that its batch was stored.

It carries bytes between client and broker, frame by frame, and puts its own address for the broker's wherever
the broker names that, so that a client stays on this way. After `lose_next`, the answer to the next Produce request is
dropped once the broker has given it, and the connection with it; the client connects again, as after any network fault.

Frames: Kafka protocol guide, "Protocol Primitive Types" and "Request Header": a length of four bytes, then in a request
the kind (0: Produce), its version and a correlation id, in a response the correlation id first.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

PRODUCE = 0
Carry = Callable[[socket.socket, socket.socket, set[bytes]], None]


class LosingProxy:
    """In front of `127.0.0.1:port`, on a port of its own, from `with` to the end of its block."""

    def __init__(self, port: int) -> None:
        self._broker = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.produced = 0
        self.lost = 0
        self._lose = threading.Event()
        self._sockets: set[socket.socket] = set()

    def lose_next(self) -> None:
        """Drop the next acknowledgement."""
        self._lose.set()

    def __enter__(self) -> LosingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                broker = socket.create_connection(("127.0.0.1", self._broker))
                self._sockets |= {client, broker}
                doomed: set[bytes] = set()
                for carry in (self._to_broker, self._to_client):
                    threading.Thread(target=self._both, args=(carry, client, broker, doomed), daemon=True).start()

    def _both(self, carry: Carry, client: socket.socket, broker: socket.socket, doomed: set[bytes]) -> None:
        with contextlib.suppress(OSError, EOFError):
            carry(client, broker, doomed)
        for each in (client, broker):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _to_broker(self, client: socket.socket, broker: socket.socket, doomed: set[bytes]) -> None:
        while True:
            frame = _frame(client)
            if struct.unpack(">h", frame[:2])[0] == PRODUCE:
                self.produced += 1
                if self._lose.is_set():
                    self._lose.clear()
                    doomed.add(frame[4:8])
            broker.sendall(struct.pack(">i", len(frame)) + frame)

    def _to_client(self, client: socket.socket, broker: socket.socket, doomed: set[bytes]) -> None:
        there, here = (b"127.0.0.1" + struct.pack(">i", port) for port in (self._broker, self.port))
        while True:
            frame = _frame(broker)
            if frame[:4] in doomed:
                self.lost += 1
                raise EOFError
            client.sendall(struct.pack(">i", len(frame)) + frame.replace(there, here))


def _frame(source: socket.socket) -> bytes:
    return _exactly(source, struct.unpack(">i", _exactly(source, 4))[0])


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
