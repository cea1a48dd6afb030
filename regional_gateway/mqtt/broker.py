"""A small MQTT 5 broker in this process, for machines without mosquitto.

It speaks MQTT 5.0 only, with QoS 0 and 1, over TLS with client certificates; the certificate's common name is the
identity that the access rules see. `session_table` decides what becomes of a message, `connection` is one client, `hub`
is what clients share; this file owns the listening socket, housekeeping and the data folder.

* Without TLS (tests, loopback) the client id is the identity, so nobody is authenticated.
* State (retained messages, persistent sessions and their queues) is written as two atomic snapshots at most half a
  second after it changed and again on exit, so SIGKILL loses at most the last second. PUBACK does not wait for it.
* Wills of clients that are connected when the broker stops are not published: the clients did not go away.

Fleets of production size belong on mosquitto or a broker cluster; the same contract tests run against both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from asyncio import sslproto
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from model_delta.durable import replace_whole
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Unavailable
from regional_gateway.mqtt.access import Acl
from regional_gateway.mqtt.connection import Connection
from regional_gateway.mqtt.hub import BrokerMetrics, Hub
from regional_gateway.mqtt.session import Limits
from regional_gateway.mqtt.session_table import SessionTable
from regional_gateway.mqtt.snapshots import RetainedSnapshot, SessionSnapshot

HOUSEKEEPING_SECONDS = 0.5
CLOSE_SECONDS = 1.0
TLS_READ_BYTES = 16_384

_log = logging.getLogger(__name__)

_Snapshot = TypeVar("_Snapshot", SessionSnapshot, RetainedSnapshot)


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
        self._limits, self._acl, self._clock = limits or Limits(), acl, clock
        self._hub = Hub(limits=self._limits, acl=acl, revoked=revoked, clock=clock, authenticated=tls is not None)
        self._tls = tls
        self._folder = folder
        self._written = {"sessions": 0, "retained": 0}
        self._stopping = asyncio.Event()

    @property
    def metrics(self) -> BrokerMetrics:
        """What was counted."""
        return self._hub.metrics

    @property
    def table(self) -> SessionTable:
        """Sessions, filters and retained messages."""
        return self._hub.table

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        sessions = _load(self._folder / "sessions.cbor", SessionSnapshot)
        retained = _load(self._folder / "retained.cbor", RetainedSnapshot)
        if sessions is not None:
            self.table.thaw_sessions(sessions, self._acl, self._clock())
        if retained is not None:
            self.table.thaw_retained(retained)
        self._written = {"sessions": self.table.revision, "retained": self.table.retained.revision}
        if self._tls is not None:
            _shrink_tls_buffers()
        handshake = (
            {"ssl_handshake_timeout": self._limits.connect_seconds, "ssl_shutdown_timeout": 2.0} if self._tls else {}
        )
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._hub, loop),
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
        for connection in list(self._hub.connections):
            connection.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS if self._hub.connections else 0):
                await self._hub.empty.wait()
        for connection in list(self._hub.connections):
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

    # --- background ---

    async def _keep_house(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(HOUSEKEEPING_SECONDS):
                    await self._stopping.wait()
            except TimeoutError:
                self._hub.sweep()
                await self._save()

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
    """Replace a snapshot. Returns "" or what went wrong."""
    try:
        replace_whole(path, pack(record), aside=path.with_suffix(".new"))
    except OSError as error:
        return f"{error.strerror or error}"
    return ""
