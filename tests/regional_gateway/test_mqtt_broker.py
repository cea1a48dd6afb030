"""The embedded broker, packet by packet: what mosquitto does differently, refusals, bounds, and its data folder."""

from __future__ import annotations

import asyncio
import ssl
import threading
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import pytest

from model_delta.encoding import pack
from model_delta.errors import Malformed, Unavailable
from model_delta.topics import down, up
from regional_gateway.mqtt.access import FLEET_RULES, access
from regional_gateway.mqtt.broker import MqttBroker, serve, server_tls
from regional_gateway.mqtt.session import Limits
from regional_gateway.mqtt.snapshots import SessionSnapshot
from tests.regional_gateway.mqtt_stage import (
    Authority,
    connect_packet,
    packet,
    publish_packet,
    subscribe_packet,
    text,
)

FLEET = access(FLEET_RULES)
PERSISTENT = b"\x11\x00\x00\xff\xff"  # session expiry interval 65,535 s


class Wire:
    """A raw client: sends bytes, reads whole packets, every read with a deadline."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._port, self._tls = port, tls

    async def __aenter__(self) -> Self:
        name = "127.0.0.1" if self._tls else None
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._tls, server_hostname=name, limit=2**21
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    def send(self, *packets: bytes) -> None:
        self._writer.write(b"".join(packets))

    def stop_reading(self) -> None:
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def packet(self) -> tuple[int, bytes]:
        """(first byte, body); (0, b"") when the broker closed."""
        async with asyncio.timeout(30):
            try:
                first = await self._reader.readexactly(1)
                length = shift = 0
                while True:
                    byte = (await self._reader.readexactly(1))[0]
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    if byte < 0x80:
                        return first[0], await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return 0, b""

    async def packets(self) -> list[tuple[int, bytes]]:
        """All packets until the broker closes."""
        found = []
        while (one := await self.packet())[0]:
            found.append(one)
        return found

    async def join(self, client_id: str, *, clean: bool = True, properties: bytes = b"", keep_alive: int = 60) -> bool:
        """CONNECT; returns session present."""
        self.send(connect_packet(client_id, clean_start=clean, properties=properties, keep_alive=keep_alive))
        first, body = await self.packet()
        assert (first, body[1]) == (0x20, 0)
        return body[0] == 1

    async def subscribe(self, pattern: str, qos: int = 1) -> int:
        self.send(subscribe_packet(pattern, qos=qos))
        first, body = await self.packet()
        assert first == 0x90
        return body[-1]


def play(folder: Path, scene: Callable[[MqttBroker], Awaitable[None]], limits: Limits | None = None) -> MqttBroker:
    """Run `scene` with a broker without TLS on `folder`; returns the stopped broker."""

    async def run() -> MqttBroker:
        async with MqttBroker(host="127.0.0.1", port=0, tls=None, folder=folder, acl=FLEET, limits=limits) as broker:
            await scene(broker)
        assert len(asyncio.all_tasks()) == 1
        return broker

    broker = asyncio.run(run())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("broker")]
    return broker


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (the condition is the broker's own state, or a file)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("level", "answer"),
    [(3, b"\x20\x02\x00\x01"), (4, b"\x20\x02\x00\x01"), (6, b"\x20\x03\x00\x84\x00")],
    ids=["3.1", "3.1.1", "a later one"],
)
def test_other_protocol_versions_are_refused_in_words_they_know(tmp_path: Path, level: int, answer: bytes) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire:
            wire.send(connect_packet("pos-1", level=level))
            assert await wire.packets() == [(answer[0], answer[2:])]

    play(tmp_path, scene)


def test_connack_says_what_is_offered(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire:
            wire.send(connect_packet("pos-1", keep_alive=0, properties=b"\x11\xff\xff\xff\xff"))
            _, body = await wire.packet()
            assert b"\x24\x01" in body  # maximum QoS 1
            assert b"\x2a\x00" in body  # no shared subscriptions
            assert b"\x29\x00" in body  # no subscription identifiers
            assert b"\x27" + (5_000_000).to_bytes(4, "big") in body
            assert b"\x13" + (3_600).to_bytes(2, "big") in body  # keep alive "none" becomes an hour
            assert b"\x11" + (120 * 86_400).to_bytes(4, "big") in body  # expiry "never" becomes 120 days

    play(tmp_path, scene)


def test_filters_are_judged_at_subscribe(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire:
            await wire.join("pos-1")
            assert await wire.subscribe(down("pos-1", "#"), qos=2) == 1
            assert await wire.subscribe(down("pos-1", "ack"), qos=0) == 0
            for pattern in ("#", "atoll/1/#", down("+", "#"), down("pos-2", "#"), up("pos-1", "#"), "$SYS/#"):
                assert await wire.subscribe(pattern) == 0x87
            assert await wire.subscribe("$share/g/atoll/1/cfg/#") == 0x9E
            assert await wire.subscribe("a/#/b") == 0x8F
            assert broker.metrics.refused == 6

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (publish_packet(up("pos-1", "x"), b"", qos=2), 0x9B),
        (publish_packet(up("pos-1", "#"), b""), 0x90),
        (publish_packet(up("pos-1", "a\0b"), b""), 0x90),
        (publish_packet("/".join("a" * 100), b""), 0x90),
        (publish_packet(up("pos-1", "x"), b"", qos=1, packet_id=0), 0x82),
        (packet(0x30, text(up("pos-1", "x")) + b"\x03\x23\x00\x01"), 0x94),  # a topic alias
        (packet(0x30, text(up("pos-1", "x")) + b"\x02\x0b\x01"), 0x82),  # a subscription identifier
        (packet(0x82, b"\0\x01\x02\x0b\x01" + text("a") + b"\0"), 0xA1),
        (packet(0x82, b"\0\x01\0"), 0x82),
        (packet(0xA2, b"\0\x01\0"), 0x82),
        (packet(0x30, text(b"\xff\xfe") + b"\0"), 0x81),
        (packet(0xE0, b"\x00\x05\x11\x00\x00\x00\x09"), 0x82),  # DISCONNECT that makes the session persistent
        (connect_packet("pos-1"), 0x82),
        (b"\x30\xff\xff\xff\xff\x01", 0x81),
        (b"\x30\xff\xff\xff\x7f", 0x95),
        (b"\xf0\x02\x18\x00", 0x82),
    ],
)
def test_a_broken_rule_ends_the_connection_with_its_reason(tmp_path: Path, hostile: bytes, reason: int) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire, Wire(broker.port) as bystander:
            await bystander.join("pos-2")
            await wire.join("pos-1")
            wire.send(hostile)
            ((first, body),) = await wire.packets()
            assert (first, hex(body[0])) == (0xE0, hex(reason))
            bystander.send(b"\xc0\x00")
            assert await bystander.packet() == (0xD0, b"")

    play(tmp_path, scene)


@pytest.mark.parametrize("hostile", [b"\xc0\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, publish_packet("a", b"b")])
def test_what_does_not_start_with_connect_is_closed_without_an_answer(tmp_path: Path, hostile: bytes) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire:
            wire.send(hostile)
            assert await wire.packets() == []

    assert play(tmp_path, scene).metrics.malformed == 1


def test_wills_obey_the_access_rules(tmp_path: Path) -> None:
    def with_will(topic: str, flags: int = 0x0E) -> bytes:
        return packet(
            0x10, text("MQTT") + bytes((5, flags)) + b"\0\x3c\0" + text("pos-1") + b"\0" + text(topic) + text(b"gone")
        )

    async def scene(broker: MqttBroker) -> None:
        for hello, code in (
            (with_will(up("pos-2", "x")), 0x87),
            (with_will(up("pos-1", "x"), flags=0x16), 0x9B),
            (with_will(up("pos-1", "x")), 0),
        ):
            async with Wire(broker.port) as wire:
                wire.send(hello)
                _, body = await wire.packet()
                assert body[1] == code

    play(tmp_path, scene)


@pytest.mark.slow
def test_silence_of_one_and_a_half_keep_alives_ends_the_connection(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as wire:
            await wire.join("pos-1", keep_alive=1)
            ((first, body),) = await wire.packets()
            assert (first, body[0]) == (0xE0, 0x8D)

    play(tmp_path, scene)


def test_a_reader_that_stands_still_costs_a_bounded_amount(tmp_path: Path) -> None:
    limits = Limits(queued_bytes_max=2_000_000)

    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as slow, Wire(broker.port) as coordinator:
            await slow.join("pos-1")
            await slow.subscribe(down("pos-1", "#"))
            await coordinator.join("coordinator")
            slow.stop_reading()
            for index in range(60):
                coordinator.send(publish_packet(down("pos-1", "res"), bytes(500_000), qos=1, packet_id=index + 1))
                first, _ = await coordinator.packet()
                assert first == 0x40
            (session,) = [session for key, session in broker.table.sessions.items() if key[0] == "pos-1"]
            held = session.waiting_bytes + sum(delivery.message.size for delivery in session.inflight.values())
            assert held <= 2_000_000
            assert session.dropped == broker.table.dropped > 40

    play(tmp_path, scene, limits)


def test_who_never_connects_and_who_never_reads_is_shown_out(tmp_path: Path) -> None:
    limits = Limits(connect_seconds=0.2, stalled_seconds=0.2)

    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as silent, Wire(broker.port) as slow, Wire(broker.port) as coordinator:
            await slow.join("pos-1", clean=False, properties=PERSISTENT)
            await slow.subscribe(down("pos-1", "#"))
            await coordinator.join("coordinator")
            slow.stop_reading()
            for index in range(40):
                coordinator.send(publish_packet(down("pos-1", "res"), bytes(500_000), qos=1, packet_id=index + 1))
                await coordinator.packet()
            await until(lambda: ("pos-1", "pos-1") in broker.table.sessions and broker.metrics.clients == 1)
            assert await silent.packets() == []
            coordinator.send(b"\xc0\x00")
            assert await coordinator.packet() == (0xD0, b"")
        assert broker.table.sessions["pos-1", "pos-1"].inflight  # kept for when it is back

    play(tmp_path, scene, limits)


def test_packets_larger_than_the_client_takes_are_left_out(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as small, Wire(broker.port) as coordinator:
            await small.join("pos-1", properties=b"\x27\x00\x00\x00\x80")
            await small.subscribe(down("pos-1", "#"))
            await coordinator.join("coordinator")
            for index, size in enumerate((500, 60)):
                coordinator.send(publish_packet(down("pos-1", "res"), bytes(size), qos=1, packet_id=index + 1))
            first, body = await small.packet()
            assert first & 0xF0 == 0x30
            assert body.endswith(bytes(60))
            assert len(body) < 128
            assert broker.table.dropped == 1

    play(tmp_path, scene)


def test_an_empty_client_id_and_a_suffix_are_bound_to_the_identity(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    authority.issue("pos-stolen")

    async def run() -> None:
        async with MqttBroker(
            host="127.0.0.1",
            port=0,
            tls=server_tls(authority.ca, *authority.issue("broker", server=True)),
            folder=tmp_path / "data",
            acl=FLEET,
            revoked=lambda serial: serial == authority.serials["pos-stolen"],
        ) as broker:
            assert sslproto.SSLProtocol.max_size == 16_384
            for identity, client_id, code in (
                ("pos-1", "", 0),
                ("pos-1", "pos-1", 0),
                ("pos-1", "pos-1:second", 0),
                ("pos-1", "pos-2", 0x85),
                ("pos-1", "coordinator", 0x85),
                ("pos-stolen", "pos-stolen", 0x87),
                ("two words", "two words", 0x87),
            ):
                authority.issue(identity)
                async with Wire(broker.port, authority.client_tls(identity)) as wire:
                    wire.send(connect_packet(client_id))
                    first, body = await wire.packet()
                    assert (first, body[1]) == (0x20, code), client_id
                    if not client_id:
                        assert b"pos-1:" in body
                    if client_id == "pos-1:second":  # the access rules see the certificate, not the client id
                        wire.send(publish_packet(up("pos-1:second", "x"), b"", qos=1))
                        assert (await wire.packet())[1][2] == 0x87
            # pos-1 and pos-10 are different people, though one name begins with the other.
            async with Wire(broker.port, authority.client_tls("pos-10")) as owner:
                assert not await owner.join("pos-10", clean=False, properties=PERSISTENT)
                async with Wire(broker.port, authority.client_tls("pos-1")) as other:
                    assert not await other.join("pos-10", clean=False, properties=PERSISTENT)
                    owner.send(b"\xc0\x00")
                    assert await owner.packet() == (0xD0, b"")

    asyncio.run(run())


def test_takeover_names_its_reason_and_a_stop_says_goodbye(tmp_path: Path) -> None:
    async def run() -> None:
        async with MqttBroker(host="127.0.0.1", port=0, tls=None, folder=tmp_path, acl=FLEET) as broker:
            first, second = Wire(broker.port), Wire(broker.port)
            async with first:
                await first.join("pos-1", clean=False, properties=PERSISTENT)
                await second.__aenter__()
                assert await second.join("pos-1", clean=False, properties=PERSISTENT)
                ((kind, body),) = await first.packets()
                assert (kind, body[0]) == (0xE0, 0x8E)
            assert broker.metrics.takeovers == 1
        ((kind, body),) = await second.packets()
        assert (kind, body[0]) == (0xE0, 0x8B)
        await second.__aexit__()

    asyncio.run(run())


def test_state_is_on_disk_within_a_second_and_nothing_else_is_left(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as device:
            await device.join("pos-1", clean=False, properties=PERSISTENT)
            await device.subscribe(down("pos-1", "#"))
        await until(lambda: broker.metrics.clients == 0)
        async with Wire(broker.port) as coordinator:
            await coordinator.join("coordinator")
            coordinator.send(publish_packet(down("pos-1", "ack"), b"a queued message", qos=1))
            await coordinator.packet()
            loop, stored = asyncio.get_running_loop(), tmp_path / "sessions.cbor"
            started = loop.time()
            await until(lambda: stored.exists() and b"a queued message" in stored.read_bytes())
            assert loop.time() - started < 1.0

    play(tmp_path, scene)
    assert {path.name for path in tmp_path.iterdir()} == {"sessions.cbor"}


def test_a_snapshot_that_cannot_be_written_is_counted_and_retried(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    async def scene(broker: MqttBroker) -> None:
        async with Wire(broker.port) as coordinator:
            await coordinator.join("coordinator")
            folder.rmdir()
            coordinator.send(publish_packet("atoll/1/cfg/acme/plan/fraud", b"the plan", qos=1, retain=1))
            await until(lambda: broker.metrics.snapshot_failures > 0)
            folder.mkdir()
            await until(lambda: (folder / "retained.cbor").exists())

    play(folder, scene)


def test_a_newer_data_folder_is_refused_and_an_unreadable_one_set_aside(tmp_path: Path) -> None:
    async def nothing(broker: MqttBroker) -> None:
        assert broker.port

    (tmp_path / "sessions.cbor").write_bytes(pack(SessionSnapshot(9, (), ())))
    with pytest.raises(Malformed, match="expected format 1, found 9"):
        play(tmp_path, nothing)
    assert (tmp_path / "sessions.cbor").exists()
    (tmp_path / "sessions.cbor").write_bytes(b"\x83rubbish")
    play(tmp_path, nothing)
    assert (tmp_path / "sessions.unreadable").read_bytes() == b"\x83rubbish"


def test_a_taken_port_and_a_lax_tls_context_are_named(tmp_path: Path) -> None:
    async def scene(broker: MqttBroker) -> None:
        with pytest.raises(Unavailable, match=rf"cannot listen on 127\.0\.0\.1:{broker.port}.*another"):
            await serve(host="127.0.0.1", port=broker.port, tls=None, folder=tmp_path / "second", acl=FLEET)

    play(tmp_path, scene)
    with pytest.raises(Malformed, match="requires client certificates"):
        MqttBroker(host="127.0.0.1", port=0, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), folder=tmp_path, acl=FLEET)


def test_serve_runs_until_cancelled_and_closes_the_port(tmp_path: Path) -> None:
    async def run() -> None:
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(
                host="127.0.0.1",
                port=0,
                tls=None,
                folder=tmp_path,
                acl=FLEET,
                ready=lambda broker: ready.set_result(broker.port),
            )
        )
        port = await ready
        async with Wire(port) as wire:
            await wire.join("pos-1")
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(run())
