"""One contract for both brokers: what Atoll relies on must hold on mosquitto and on the embedded broker alike."""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_delta.topics import PACKET_BYTES_MAX, down, plan_topic, round_topic, up
from regional_gateway import mosquitto
from tests.regional_gateway.mqtt_stage import (
    PATIENCE_SECONDS,
    Authority,
    BrokerProcess,
    Client,
    connect_packet,
    publish_packet,
    tls_socket,
)

PLATFORM = ("coordinator", "gateway-eu-west")
DAYS_120 = 120 * 86_400


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def make(kind: str, folder: Path, authority: Authority) -> BrokerProcess:
    if kind == "mosquitto" and mosquitto.find() is None:
        assert os.environ.get("ATOLL_REQUIRE_SERVERS") != "1", "mosquitto is required here and was not found"
        pytest.skip("mosquitto is not installed")
    return BrokerProcess(kind, folder, authority, PLATFORM)


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[BrokerProcess]:
    """A broker that the whole module shares: tests keep apart by using their own names."""
    process = make(request.param, tmp_path_factory.mktemp(request.param) / "data", authority)
    process.start()
    yield process
    assert process.running, process.log.read_text()
    assert process.stop() == 0
    assert "Traceback" not in process.log.read_text()


@pytest.fixture(params=["embedded", "mosquitto"])
def own_broker(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority) -> Iterator[BrokerProcess]:
    """A broker that the test may stop, kill and start again."""
    process = make(request.param, tmp_path / "data", authority)
    process.start()
    yield process
    process.stop(signal.SIGKILL)


def name() -> str:
    return f"pos-{secrets.token_hex(3)}"


def test_a_message_goes_up_and_its_answer_comes_down(broker: BrokerProcess) -> None:
    device = name()
    with Client(broker, "coordinator") as coordinator, Client(broker, device) as client:
        assert coordinator.subscribe("atoll/1/dev/+/up/#") == 1
        assert client.subscribe(down(device, "#")) == 1
        assert client.publish(up(device, "hello"), b"hello") == 0
        assert coordinator.next().topic == up(device, "hello")
        assert coordinator.publish(down(device, "ack"), b"seen") == 0
        answer = client.next()
        assert (answer.topic, answer.payload, answer.retain) == (down(device, "ack"), b"seen", False)


def test_a_region_hears_its_own_requests_and_answers_them_and_nothing_else(broker: BrokerProcess) -> None:
    device = name()
    with (
        Client(broker, "coordinator") as coordinator,
        Client(broker, "gateway-eu-west") as gateway,
        Client(broker, device) as client,
    ):
        coordinator.subscribe("atoll/1/#")
        for topic_filter in ("#", "dev/+/up/#", "dev/+/down/#", "dev/+/up/req/eu-west", "dev/+/up/trust/eu-west"):
            gateway.subscribe(f"atoll/1/{topic_filter}")
        client.subscribe(down(device, "#"))
        for channel in ("report", "key", "contribution", "req/ap-south", "trust/ap-south"):
            client.publish(up(device, channel), channel.encode())
        for channel in ("trust/eu-west", "req/eu-west"):
            client.publish(up(device, channel), channel.encode())
        coordinator.publish(down(device, "key"), b"a sealed key")
        coordinator.publish(down("gateway-eu-west", "key"), b"end")
        assert set(gateway.payloads_until(b"req/eu-west")) == {b"trust/eu-west"}
        rounds = (round_topic("acme", "fraud"), round_topic("acme", "fraud", "ap-south"))
        forbidden = (up(device, "report"), down(device, "ack"), down(device, "key"), plan_topic("acme", "fraud"))
        for topic in (*forbidden, *rounds):
            gateway.publish(topic, b"forged")
        assert gateway.publish(up("gateway-eu-west", "key"), b"its own") == 0
        assert gateway.publish(round_topic("acme", "fraud", "eu-west"), b"an announcement") == 0
        assert gateway.publish(down(device, "trust"), b"what is newest") == 0
        assert gateway.publish(down(device, "res"), b"a chunk") == 0
        assert b"forged" not in coordinator.payloads_until(b"a chunk")
        assert client.payloads_until(b"a chunk") == [b"a sealed key", b"what is newest"]


def test_publishing_as_somebody_else_is_refused_and_not_delivered(broker: BrokerProcess) -> None:
    device, victim = name(), name()
    with Client(broker, "coordinator") as coordinator, Client(broker, device) as client:
        coordinator.subscribe("atoll/1/#")
        for topic in (up(victim, "report"), down(victim, "ack"), plan_topic("acme", "fraud"), "atoll/1", "elsewhere"):
            assert client.publish(topic, b"forged") == 0x87
        assert client.publish(up(device, "report"), b"honest") == 0  # the connection stays
        assert coordinator.payloads_until(b"honest") == []


def test_a_spy_with_wildcards_hears_nothing_of_others(broker: BrokerProcess) -> None:
    spy, victim = name(), name()
    with (
        Client(broker, "coordinator") as coordinator,
        Client(broker, victim) as client,
        Client(broker, spy) as listener,
    ):
        coordinator.subscribe("atoll/1/dev/+/up/#")
        for pattern in ("#", "atoll/1/#", "atoll/1/dev/+/down/#", up("+", "#"), down(victim, "key"), down("+", "key")):
            listener.subscribe(pattern)
        assert listener.subscribe(down(spy, "#")) == 1
        assert coordinator.publish(down(victim, "key"), b"secret") == 0
        assert client.publish(up(victim, "report"), b"private") == 0
        assert coordinator.next().payload == b"private"
        assert coordinator.publish(down(spy, "ack"), b"end") == 0
        assert listener.payloads_until(b"end") == []


def test_joining_a_share_group_takes_no_message_from_the_platform(broker: BrokerProcess) -> None:
    thief, victim = name(), name()
    with Client(broker, "coordinator") as coordinator, Client(broker, victim) as client, Client(broker, thief) as other:
        coordinator.subscribe("atoll/1/dev/+/up/#")
        other.subscribe("$share/ingest/atoll/1/dev/+/up/#")
        for index in range(10):
            assert client.publish(up(victim, "report"), b"%d" % index) == 0
        assert [coordinator.next().payload for _ in range(10)] == [b"%d" % index for index in range(10)]


def test_a_borrowed_client_id_neither_disturbs_nor_opens_the_owners_session(broker: BrokerProcess) -> None:
    owner, thief = name(), name()
    with Client(broker, owner, clean_start=False, expiry_seconds=600) as client:
        client.subscribe(down(owner, "#"))
        with tls_socket(broker, thief) as raw:
            raw.sendall(connect_packet(owner, clean_start=False, properties=b"\x11\0\0\xff\xff"))
            answer = raw.recv(256)
            # Refused (embedded), or given a session of its own name (mosquitto): never the owner's (session present).
            assert answer[:1] == b"\x20"
            assert answer[2] == 0
        with Client(broker, "coordinator") as coordinator:
            assert coordinator.publish(down(owner, "ack"), b"still mine") == 0
        assert client.next().payload == b"still mine"
        assert client.disconnects.empty()


def test_retained_messages_come_with_the_subscription_until_cleared(broker: BrokerProcess) -> None:
    device, topic = name(), plan_topic(f"tenant-{secrets.token_hex(3)}", "fraud")
    with Client(broker, "coordinator") as coordinator, Client(broker, device) as client:
        for serial in (b"plan 1", b"plan 2"):
            assert coordinator.publish(topic, serial, retain=True) == 0
        client.subscribe(topic)
        newest = client.next()
        assert (newest.payload, newest.retain) == (b"plan 2", True)
        assert coordinator.publish(topic, b"plan 3", retain=True) == 0
        live = client.next()
        assert (live.payload, live.retain) == (b"plan 3", False)
        client.subscribe(topic)  # a renewed subscription brings it again
        assert client.next().payload == b"plan 3"
        assert coordinator.publish(topic, b"", retain=True) == 0
        assert client.next().payload == b""
    with Client(broker, "coordinator") as coordinator, Client(broker, device) as client:
        client.subscribe(topic)
        client.subscribe(down(device, "#"))
        assert coordinator.publish(down(device, "ack"), b"end") == 0
        assert client.payloads_until(b"end") == []


def test_an_absent_client_gets_its_queue_when_it_is_back(broker: BrokerProcess) -> None:
    device = name()
    with Client(broker, device, clean_start=False, expiry_seconds=DAYS_120) as client:
        assert not client.session_present
        client.subscribe(down(device, "#"))
    with Client(broker, "coordinator") as coordinator:
        for index in range(50):
            assert coordinator.publish(down(device, "ack"), b"%d" % index) == 0
        coordinator.publish(down(device, "ack"), b"not kept", qos=0)
        coordinator.publish(down(device, "ack"), b"end")
    with Client(broker, device, clean_start=False, expiry_seconds=DAYS_120) as client:
        assert client.session_present
        assert client.payloads_until(b"end") == [b"%d" % index for index in range(50)]
    with Client(broker, device, clean_start=True) as client:
        assert not client.session_present


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_queue_subscriptions_and_retained_messages_survive_a_restart(
    own_broker: BrokerProcess, how: signal.Signals
) -> None:
    topic = plan_topic("acme", "fraud")
    with Client(own_broker, "pos-1", clean_start=False, expiry_seconds=DAYS_120) as client:
        client.subscribe(down("pos-1", "#"))
    with Client(own_broker, "coordinator") as coordinator:
        coordinator.publish(topic, b"the plan", retain=True)
        for index in range(20):
            coordinator.publish(down("pos-1", "ack"), b"message %d" % index)
    if how == signal.SIGKILL:
        own_broker.until_saved(b"the plan", b"message 19")  # both promise to lose no more than the last moments
    own_broker.stop(how)
    own_broker.start()
    with Client(own_broker, "pos-1", clean_start=False, expiry_seconds=DAYS_120) as client:
        assert client.session_present
        with Client(own_broker, "coordinator") as coordinator:
            coordinator.publish(down("pos-1", "ack"), b"end")  # the filter is still there, nobody renewed it
        assert client.payloads_until(b"end") == [b"message %d" % index for index in range(20)]
        client.subscribe(topic)
        assert client.next().payload == b"the plan"


def test_a_message_that_was_not_acknowledged_comes_again(broker: BrokerProcess) -> None:
    device = name()
    client = Client(broker, device, clean_start=False, expiry_seconds=600, manual_ack=True)
    client.subscribe(down(device, "#"))
    with Client(broker, "coordinator") as coordinator:
        for payload in (b"one", b"two", b"three"):
            coordinator.publish(down(device, "res"), payload)
        first, second = client.next(), client.next()
        client.paho.ack(first.mid, first.qos)
        client.next()
        assert client.publish(up(device, "hello"), b"") == 0  # the acknowledgement arrived before this did
        client.vanish()
    with Client(broker, device, clean_start=False, expiry_seconds=600) as again:
        repeated = again.next()
        assert (repeated.payload, repeated.dup, repeated.mid) == (b"two", True, second.mid)
        assert again.next().payload == b"three"


def test_receive_maximum_of_the_client_is_kept(broker: BrokerProcess) -> None:
    device = name()
    with (
        Client(broker, device, receive_max=3, manual_ack=True) as client,
        Client(broker, "coordinator") as coordinator,
    ):
        client.subscribe(down(device, "#"))
        for index in range(6):
            assert coordinator.publish(down(device, "res"), b"%d" % index) == 0
        window = [client.next() for _ in range(3)]
        assert client.publish(up(device, "hello"), b"") == 0
        with pytest.raises(queue.Empty):
            client.next(timeout=0.1)
        for message in window:
            client.paho.ack(message.mid, message.qos)
        assert [client.next().payload for _ in range(3)] == [b"3", b"4", b"5"]


def test_a_second_connection_takes_the_session_over(broker: BrokerProcess) -> None:
    device = name()
    first = Client(broker, device, clean_start=False, expiry_seconds=600)
    first.subscribe(down(device, "#"))
    with Client(broker, device, clean_start=False, expiry_seconds=600) as second:
        code = first.disconnects.get(timeout=PATIENCE_SECONDS)
        assert code == 0x8E or broker.kind == "mosquitto"  # which only closes the line (0x80 by paho)
        first.paho.loop_stop()
        assert second.session_present
        with Client(broker, "coordinator") as coordinator:
            coordinator.publish(down(device, "ack"), b"for the second")
        assert second.next().payload == b"for the second"


def test_a_packet_over_the_limit_closes_only_its_sender(broker: BrokerProcess) -> None:
    device, bystander = name(), name()
    with Client(broker, bystander) as other, Client(broker, "coordinator") as coordinator:
        coordinator.subscribe("atoll/1/dev/+/up/#")
        largest = bytes(4 * 1_000_000 + 16_384)  # a contribution of a million parameters
        assert other.publish(up(bystander, "report"), largest) == 0
        assert coordinator.next().payload == largest
        with tls_socket(broker, device) as raw:
            raw.sendall(connect_packet(device))
            assert raw.recv(256)[:1] == b"\x20"
            try:
                raw.sendall(publish_packet(up(device, "report"), bytes(PACKET_BYTES_MAX + 1)))
                answer = raw.recv(256)
                while raw.recv(256):
                    pass
            except OSError:
                answer = b""
            assert answer == b"" or (answer[0], answer[2]) == (0xE0, 0x95)
        assert other.publish(up(bystander, "report"), b"still here") == 0
        assert coordinator.next().payload == b"still here"


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_without_a_certificate_of_ours_there_is_no_connection(broker: BrokerProcess, who: str, tmp_path: Path) -> None:
    if who == "nobody":
        context = broker.authority.client_tls(None)
    else:
        context = broker.authority.client_tls(None)
        context.load_cert_chain(*Authority(tmp_path, "test CA").issue("coordinator"))
    raw = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_SECONDS)
    with pytest.raises(OSError), context.wrap_socket(raw, server_hostname="127.0.0.1") as refused:  # noqa: PT012
        refused.sendall(connect_packet("coordinator"))
        if not refused.recv(16):
            raise ConnectionResetError


@pytest.mark.slow
def test_expired_messages_are_not_delivered_and_do_not_block_the_others(broker: BrokerProcess) -> None:
    device = name()
    with Client(broker, device, clean_start=False, expiry_seconds=600) as client:
        client.subscribe(down(device, "#"))
    with Client(broker, "coordinator") as coordinator:
        for _ in range(25):
            coordinator.publish(down(device, "ack"), b"stale", expiry_seconds=1)
        coordinator.publish(down(device, "ack"), b"fresh", expiry_seconds=600)
        time.sleep(2.1 if broker.kind == "mosquitto" else 1.1)  # mosquitto's clock has whole seconds
        coordinator.publish(down(device, "ack"), b"end")
    with Client(broker, device, clean_start=False, expiry_seconds=600) as client:
        fresh = client.next()
        assert fresh.payload == b"fresh"
        left = vars(fresh.properties)["MessageExpiryInterval"]
        assert 590 <= left < 600  # what is left of it
        assert client.next().payload == b"end"


def test_a_will_is_published_when_the_line_is_cut_and_not_after_a_goodbye(broker: BrokerProcess) -> None:
    device = name()
    with Client(broker, "coordinator") as coordinator:
        coordinator.subscribe(up(device, "#"))
        Client(broker, device, will=(up(device, "gone"), b"polite")).leave()
        Client(broker, device, will=(up(device, "gone"), b"cut")).vanish()
        assert coordinator.next().payload == b"cut"


def test_garbage_costs_nobody_else_anything(broker: BrokerProcess) -> None:
    device = name()
    with Client(broker, device) as client, Client(broker, "coordinator") as coordinator:
        coordinator.subscribe(up(device, "#"))
        open_sockets = []
        for hostile in (b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(4_000), b"\x16\x03\x01\xff\xff", b""):
            raw = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_SECONDS)
            raw.sendall(hostile)
            open_sockets.append(raw)  # left half open
        start = connect_packet("mallory")
        for hostile in (
            secrets.token_bytes(2_000),
            b"\x10\xff\xff\xff\xff\xff",
            b"\x10\xff\xff\xff\x7f" + bytes(500),
            start + start,
            start + b"\xf0\x00",
            start + publish_packet("a/#", b""),
            start + publish_packet(b"\xff\xfe", b""),
            start + b"\x30\x03\x00\xffx",
            start + b"\x82\x05\x00\x01\x00\x00\x09",
            start + b"\x36\x05\x00\x01a\x00\x01",
        ):
            with tls_socket(broker, "mallory") as tls:
                tls.sendall(hostile)
                tls.settimeout(0.1)
                try:
                    while tls.recv(4_096):
                        pass
                except (TimeoutError, ssl.SSLError, OSError):
                    pass
            assert client.publish(up(device, "report"), b"unharmed") == 0
            assert coordinator.next().payload == b"unharmed"
        for raw in open_sockets:
            raw.close()
    assert broker.running


@pytest.mark.slow
def test_sixty_devices_get_a_retained_message_of_50_kb_each(broker: BrokerProcess) -> None:
    topic, payload = plan_topic(f"tenant-{secrets.token_hex(3)}", "fraud"), secrets.token_bytes(50_000)
    names = [name() for _ in range(60)]
    with Client(broker, "coordinator") as coordinator:
        assert coordinator.publish(topic, payload, retain=True) == 0
        clients = [Client(broker, device, clean_start=False, expiry_seconds=600) for device in names]
        for client in clients:
            client.paho.subscribe(topic, qos=1)
        for client in clients:
            assert client.next().payload == payload
        update = secrets.token_bytes(50_000)
        assert coordinator.publish(topic, update, retain=True) == 0
        for client in clients:
            assert client.next().payload == update
            client.leave()
