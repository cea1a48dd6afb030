"""Where a device gets TUF files from, and how long it lets itself be held up.

A `Source` opens a file by name and yields its bytes as they come. There are four: a store, a folder, HTTP, and a
callable that asks for a range and gets it (an MQTT link hands in its request and response). None of them is trusted.
What the client's library does not bound is bounded here, in `paced`: the whole time a file may take, and the least rate
it must come at, because a mirror that sends one byte a second would otherwise hold a device for ever.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

import msgspec

from model_delta.errors import Malformed, NotFound, TooLarge, TooSlow, Unavailable
from model_delta.store import ArtifactStore

PIECE_BYTES = 32_768
_IN_PATHS = "/%!$&'()*+,;=:@~"
"""What a path may hold as it is (RFC 3986 section 3.3), and `%`: names of roles come with their escapes."""
Monotonic = Callable[[], float]
Ask = Callable[[str, int, int, float], tuple[int, bytes]]
"""(name, offset, length, timeout in seconds) to (the file's size, bytes from offset). Raises NotFound, Unavailable."""


class Patience(msgspec.Struct, frozen=True):
    """How long to wait: seconds for a file, seconds for a whole refresh, and after `rate_after_s` bytes a second."""

    file_s: float = 60.0
    refresh_s: float = 300.0
    rate_min: float = 256.0
    rate_after_s: float = 5.0


class Source(Protocol):
    """A place that has files by name."""

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        """The file's bytes in pieces; waits at most about `timeout_s` in all. Raises NotFound, Unavailable, TooSlow."""


def paced(
    pieces: Iterator[bytes], name: str, size_max: int, patience: Patience, monotonic: Monotonic, started: float
) -> Iterator[bytes]:
    """The same pieces, as long as they keep to `size_max` and `patience`. Raises TooLarge and TooSlow."""
    received = 0
    for piece in pieces:
        received += len(piece)
        if received > size_max:
            raise TooLarge(f"{name}: expected at most {size_max} bytes, found more")
        waited = monotonic() - started
        if waited > patience.file_s:
            raise TooSlow(f"{name}: expected within {patience.file_s:g} s, found {received} bytes after {waited:.1f} s")
        if waited > patience.rate_after_s and received < patience.rate_min * waited:
            raise TooSlow(
                f"{name}: expected {patience.rate_min:g} bytes a second, found {received} bytes in {waited:.1f} s"
            )
        yield piece


class StoreSource:
    """Files of one `kind` in a store. A store has no folders: a target is found by the last part of its path, which
    begins with its hash."""

    def __init__(self, store: ArtifactStore, kind: str) -> None:
        self._store, self._kind = store, kind

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        """See `Source.open`. A name that no store could have is not there."""
        name = name.rpartition("/")[2]
        try:
            total, piece = self._store.read(self._kind, name, 0, PIECE_BYTES)
            at = len(piece)
            yield piece
            while at < total and piece:
                _, piece = self._store.read(self._kind, name, at, PIECE_BYTES)
                at += len(piece)
                yield piece
        except Malformed:
            raise NotFound(f"store: no {self._kind} named {name[:80]!r}") from None


class FolderSource:
    """Files in a folder, by their relative path: a stick that somebody brought."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        """See `Source.open`. What lies outside of the folder is not there."""
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise NotFound(f"{self._folder}: no file {name[:80]!r}")
        try:
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise Unavailable(f"{path}: {error.strerror}") from None


class AskSource:
    """Files by request and response, a range at a time, out of a mirror's store: what an MQTT link offers."""

    def __init__(self, ask: Ask, monotonic: Monotonic = time.monotonic) -> None:
        self._ask, self._monotonic = ask, monotonic

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        """See `Source.open`. Raises Malformed for an answer that is not the range asked for."""
        end, at, name = self._monotonic() + timeout_s, 0, name.rpartition("/")[2]
        while True:
            left = end - self._monotonic()
            if left <= 0:
                raise TooSlow(f"{name}: expected within {timeout_s:g} s, found {at} bytes")
            try:
                total, piece = self._ask(name, at, PIECE_BYTES, left)
            except TimeoutError:
                raise TooSlow(f"{name}: expected within {timeout_s:g} s, found {at} bytes") from None
            except OSError as error:  # the line's, which must not be taken for the disk's
                raise Unavailable(f"{name}: {error.strerror or type(error).__name__}") from None
            if total < 0 or at + len(piece) > total or (at < total and not piece):
                raise Malformed(f"{name}: expected bytes from {at} of {total}, found {len(piece)}")
            at += len(piece)
            yield piece
            if at >= total:
                return


class HttpSource:
    """Files below an address, by HTTP/1.1 GET; https checks the server's certificate. Redirects are not followed."""

    def __init__(self, base: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Malformed(f"mirror: expected http:// or https:// and a host, found {base[:80]!r}")
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        """See `Source.open`. 403 and 404 are NotFound, every other answer but 200 is Unavailable."""
        connection, late = self._connection(timeout_s), threading.Event()
        alarm: threading.Timer | None = None
        try:
            connection.connect()
            # Socket timeouts start anew with every byte: only this ends a server that trickles.
            alarm = threading.Timer(timeout_s, _cut, (connection.sock, late))
            alarm.daemon = True
            alarm.start()
            path = f"{self._path}/{quote(name, safe=_IN_PATHS)}"
            connection.request("GET", path, headers={"Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in (403, 404):
                raise NotFound(f"{self._host}: no {name[:80]!r} ({response.status})")
            if response.status != 200:
                raise Unavailable(f"{self._host}: {name[:80]!r}: expected status 200, found {response.status}")
            while piece := response.read1(PIECE_BYTES):
                yield piece
            if late.is_set():
                raise TooSlow(f"{self._host}: {name[:80]!r}: expected within {timeout_s:g} s")
            if response.length:
                raise Unavailable(f"{self._host}: {name[:80]!r}: the line broke {response.length} bytes before the end")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise TooSlow(f"{self._host}: {name[:80]!r}: expected within {timeout_s:g} s") from None
            raise Unavailable(f"{self._host}: {name[:80]!r}: {type(error).__name__}") from None
        finally:
            if alarm is not None:
                alarm.cancel()
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)


def _cut(line: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it had ended by itself
        socket.socket.shutdown(line, socket.SHUT_RDWR)  # not TLS's own, which is not for another thread to call
