"""The line to the broker, on a real mosquitto; and the fake broker, by the same contract."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from edge_runtime import link as link_module
from edge_runtime.link import Link, MqttLink, TlsFiles, reconnect_delay_s, topic_matches
from model_delta.errors import Malformed, Unavailable
from model_delta.topics import MESSAGE_BYTES_MAX, PACKET_BYTES_MAX, plan_topic, up
from tests.fakes.link import FakeBroker
from tests.fakes.real_servers import absent
from tests.regional_gateway.mqtt_stage import Authority, publish_packet

MOSQUITTO = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")


class Mosquitto:
    """A real broker on a free loopback port; state survives `stop` and `start` of one object."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
            f"user {getpass.getuser()}\npersistence true\npersistence_location {folder}/\n"
            f"max_packet_size {PACKET_BYTES_MAX}\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO
        self.process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("mosquitto did not open its port in 60 s")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            self.process = None


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    if not MOSQUITTO:
        absent("mosquitto on the PATH")
    folder = tmp_path / "broker"
    folder.mkdir(mode=0o777)
    broker = Mosquitto(folder)
    try:
        yield broker
    finally:
        broker.stop()


def link_to(broker: Mosquitto, identity: str, deadline_s: float = 60.0) -> MqttLink:
    return MqttLink(
        host="127.0.0.1",
        port=broker.port,
        client_id=identity,
        publish_deadline_s=deadline_s,
        rng=random.Random(identity),
    )


async def eventually(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "condition not reached in time"
        await asyncio.sleep(0.01)


Opener = Callable[[str], Awaitable[Link]]


async def contract(open_link: Opener) -> None:
    """What every `Link` promises, with identities that the platform's access rules know."""
    device, coordinator = await open_link("pos-0001"), await open_link("coordinator")
    await eventually(lambda: device.connected and coordinator.connected)
    got: list[tuple[str, bytes]] = []
    heard: list[bytes] = []
    coordinator.subscribe("atoll/1/dev/+/up/#", lambda topic, payload: got.append((topic, payload)))
    await coordinator.publish(plan_topic("acme", "fraud"), b"first", retain=True)
    await coordinator.publish(plan_topic("acme", "fraud"), b"second", retain=True)
    device.subscribe(plan_topic("acme", "fraud"), lambda _, payload: heard.append(payload))
    await eventually(lambda: b"second" in heard)
    assert heard == [b"second"], "only the newest retained message is there for a late subscriber"
    for index in range(50):
        await device.publish(up("pos-0001", "report"), b"%d" % index)
    await eventually(lambda: len(got) >= 50)
    assert got == [(up("pos-0001", "report"), b"%d" % index) for index in range(50)]


def test_fake_broker_keeps_the_contract() -> None:
    broker = FakeBroker()

    async def open_link(identity: str) -> Link:
        return broker.link(identity)

    asyncio.run(contract(open_link))


def test_mosquitto_keeps_the_contract(mosquitto: Mosquitto) -> None:
    mosquitto.start()

    async def story() -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def open_link(identity: str) -> Link:
                return await stack.enter_async_context(link_to(mosquitto, identity))

            await contract(open_link)

    asyncio.run(story())


def test_an_absent_broker_is_retried_and_connected_tells_the_truth(mosquitto: Mosquitto) -> None:
    async def story() -> None:
        async with link_to(mosquitto, "pos-0002", deadline_s=1.0) as link:
            assert not link.connected
            with pytest.raises(Unavailable, match=r"no acknowledgement by 127.0.0.1:\d+ in 1 s"):
                await link.publish("a/b", b"x")
            with pytest.raises(Unavailable, match=r"no connection as pos-0002 within 0.1 s"):
                await link.wait_connected(0.1)
            heard: list[bytes] = []
            link.subscribe("a/#", lambda _, payload: heard.append(payload))
            link._publish_deadline_s = 60.0
            await asyncio.to_thread(mosquitto.start)
            await link.wait_connected(60)
            await link.publish("a/b", b"y")
            await eventually(lambda: heard == [b"y"])
            await asyncio.to_thread(mosquitto.stop)
            await eventually(lambda: not link.connected)
            await asyncio.to_thread(mosquitto.start)
            await link.wait_connected(60)
            await link.publish("a/b", b"z")
            await eventually(lambda: heard == [b"y", b"z"])

    before = threading.active_count()
    asyncio.run(story())
    assert threading.active_count() == before, "closing leaves no thread"


def test_the_session_keeps_messages_while_the_device_is_away(mosquitto: Mosquitto) -> None:
    mosquitto.start()

    async def story() -> None:
        heard: list[bytes] = []
        async with link_to(mosquitto, "pos-0003") as link:
            link.subscribe("down/#", lambda _, payload: heard.append(payload))
            await link.wait_connected(60)
            await link.publish("other", b"a round trip, so the subscription stands")
        async with link_to(mosquitto, "coordinator") as other:
            await other.publish("down/receipt", b"kept")
        await asyncio.to_thread(mosquitto.stop)
        await asyncio.to_thread(mosquitto.start)
        async with link_to(mosquitto, "pos-0003") as link:
            link.subscribe("down/#", lambda _, payload: heard.append(payload))
            await eventually(lambda: heard == [b"kept"])

    asyncio.run(story())


def test_sixty_four_links_in_one_process(mosquitto: Mosquitto) -> None:
    mosquitto.start()

    async def story() -> None:
        async with contextlib.AsyncExitStack() as stack:
            links = [await stack.enter_async_context(link_to(mosquitto, f"pos-{n:04d}")) for n in range(64)]
            got: dict[str, int] = {}
            for link in links:
                link.subscribe(f"to/{link.client_id}", lambda topic, _: got.update({topic: got.get(topic, 0) + 1}))
            async with asyncio.TaskGroup() as group:
                for link in links:
                    group.create_task(link.publish(f"to/{link.client_id}", bytes(30_000)))
            await eventually(lambda: len(got) == 64)

    before = threading.active_count()
    asyncio.run(story())
    assert threading.active_count() == before


def test_too_big_a_message_is_refused_before_it_can_break_the_line(mosquitto: Mosquitto) -> None:
    mosquitto.start()

    async def story() -> None:
        async with link_to(mosquitto, "pos-0004") as link:
            await link.wait_connected(60)
            with pytest.raises(Malformed, match="at most 5000000 bytes in a packet, found 5000000"):
                await link.publish("a", bytes(PACKET_BYTES_MAX))
            await link.publish("a", bytes(MESSAGE_BYTES_MAX))

    asyncio.run(story())


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / "certificate.pem", tmp_path / "key.pem")
    with pytest.raises(Unavailable, match=r"expected a PEM file at .*ca.pem, found none; enrol"):
        MqttLink(host="127.0.0.1", port=1, client_id="pos-0005", tls=files)


def test_the_fake_refuses_what_the_broker_would() -> None:
    async def story() -> None:
        broker = FakeBroker()
        device, other = broker.link("pos-0001"), broker.link("pos-0002")
        seen: list[bytes] = []
        other.subscribe("atoll/1/dev/pos-0001/down/#", lambda _, payload: seen.append(payload))
        with pytest.raises(Unavailable, match="not authorised"):
            await device.publish(plan_topic("acme", "fraud"), b"forged")
        await broker.link("coordinator").publish("atoll/1/dev/pos-0001/down/ack", b"private")
        await asyncio.sleep(0)
        assert seen == []
        broker.up = False
        assert not device.connected
        with pytest.raises(Unavailable, match="away"):
            await device.publish(up("pos-0001", "hello"), b"")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("topic_filter", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+/c", "a/b/c", True),
        ("a/+", "a", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/broker", False),
        ("+/b", "$SYS/b", False),
    ],
)
def test_topic_filters(topic_filter: str, topic: str, matches: bool) -> None:
    assert topic_matches(topic_filter, topic) is matches


def test_backoff_grows_is_jittered_and_bounded() -> None:
    rng = random.Random(1)
    delays = [reconnect_delay_s(n, rng) for n in range(40)]
    assert all(0.125 <= delay <= 15.0 for delay in delays)
    assert min(delays[10:]) >= 7.5
    assert len({round(delay, 6) for delay in delays[10:]}) > 20


def test_a_packet_whose_hundredth_piece_is_its_last_arrives_without_waiting_for_another(tmp_path: Path) -> None:
    """Pieces are what one read brings: over TLS a record, here all at once, so that no read finds the line empty."""
    authority = Authority(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    tls.load_cert_chain(*authority.issue("broker", server=True))
    payload = bytes(4_000)
    whole = publish_packet("a", payload)

    def broker(listener: socket.socket) -> None:
        line, _ = listener.accept()
        with line:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            secured = tls.wrap_bio(incoming, outgoing, server_side=True)
            for step in (secured.do_handshake, secured.read):  # CONNECT is what it reads
                while True:
                    try:
                        step()
                        break
                    except ssl.SSLWantReadError:
                        line.sendall(outgoing.read())
                        incoming.write(line.recv(65_536))
            secured.write(bytes([0x20, 3, 0, 0, 0]))  # CONNACK: accepted
            for piece in range(99):
                secured.write(whole[piece * 40 : piece * 40 + 40])
            secured.write(whole[99 * 40 :])
            line.sendall(outgoing.read())
            while line.recv(65_536):  # until the link is closed
                pass

    async def story(listener: socket.socket) -> None:
        heard: list[bytes] = []
        certificate, key = authority.issue("pos-1")
        files = TlsFiles(authority.ca, certificate, key)
        host, port = listener.getsockname()
        async with MqttLink(host=host, port=port, client_id="pos-1", tls=files, keepalive_s=600) as link:
            link.subscribe("a", lambda _, payload: heard.append(payload))
            await eventually(lambda: heard == [payload])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=broker, args=(listener,))
        serving.start()
        asyncio.run(story(listener))
        serving.join()


def test_what_is_not_acknowledged_is_neither_sent_twice_nor_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line so slow, or a broker so silent, that no acknowledgement comes in time."""
    monkeypatch.setattr(link_module, "UNACKNOWLEDGED_BYTES_MAX", 10_000)
    arrived = bytearray()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)  # CONNECT
        writer.write(bytes([0x20, 3, 0, 0, 0]))  # CONNACK: accepted
        while data := await reader.read(65_536):
            arrived.extend(data)
        writer.close()

    async def story() -> None:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with MqttLink(host="127.0.0.1", port=port, client_id="pos-1", publish_deadline_s=0.05) as link:
            await link.wait_connected(60)
            for _ in range(3):
                with pytest.raises(Unavailable, match="no acknowledgement"):
                    await link.publish("a", b"contribution" + bytes(4_000))
            for number in range(3):
                with pytest.raises(Unavailable):
                    await link.publish("a", b"report-%d" % number + bytes(4_000))
            await eventually(lambda: arrived.count(b"report-") == 1)
            with pytest.raises(Unavailable, match="bytes wait for"):
                await link.publish("a", b"one more" + bytes(4_000))
        server.close()
        assert arrived.count(b"contribution") == 1
        assert arrived.count(b"report-") == 1

    asyncio.run(story())
