"""Logging in at Kafka's brokers: a real one with TLS, passwords and access lists, and what is said when it refuses."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_coordinator.kafka_log import KafkaLog, TopicReader
from fl_coordinator.kafka_login import advice, parse_login
from model_delta.errors import Malformed, Unavailable
from model_delta.keys.keyring import EmbeddedKeyring
from tests.fakes.kafka_server import COORDINATOR, READER, Broker


def new_topic() -> str:
    return f"updates-{uuid.uuid4().hex}"


def refused(url: str, login: dict[str, str]) -> str:
    """What a reader is told, which has to be one line without a password in it."""
    reader = TopicReader(url, login, patience_s=2.0)
    with pytest.raises(Unavailable) as caught:
        reader.bounds()
    reader.close()
    text = str(caught.value)
    assert text.startswith(f"updates log {url}: ")
    assert "\n" not in text
    assert login.get("sasl.password", "nothing") not in text
    return text.removeprefix(f"updates log {url}: ")


@pytest.mark.slow
def test_the_coordinator_appends_and_an_aggregator_may_only_read(kafka: Broker) -> None:
    topic = new_topic()
    url = f"kafka://{kafka.login_address}/{topic}"
    log = KafkaLog(url, kafka.login(COORDINATOR))
    offsets = log.append([b"one", b"two"])
    assert "the login may not see it" in refused(url, kafka.login(READER))
    reader = TopicReader(url, kafka.login(READER))
    kafka.allow(READER, topic, "DESCRIBE")
    with pytest.raises(Unavailable, match="the login may not do this"):
        reader.read_from(0)
    kafka.allow(READER, topic, "READ")
    assert reader.read_from(0).records == ((offsets[0], b"one"), (offsets[1], b"two"))
    plain = {**kafka.login(READER), "sasl.mechanism": "PLAIN"}
    assert TopicReader(url, plain).read(offsets[1]) == b"two"
    with pytest.raises(Unavailable, match=r"the login may not do this; allow it .* DESCRIBE_CONFIGS"):
        KafkaLog(url, kafka.login(READER))
    kafka.allow(READER, topic, "DESCRIBE_CONFIGS")
    unable = KafkaLog(url, kafka.login(READER), patience_s=3.0)
    why = r"the login may not do this; .*: CLUSTER_AUTHORIZATION_FAILED: Failed to acquire idempotence PID"
    for rest_s in (0.0, 0.0, 1.5, 1.5):  # the producer is refused when it first asks: before it is used, or meanwhile
        time.sleep(rest_s)
        with pytest.raises(Unavailable, match=why):
            unable.append([b"not yours"])
    log.append([b"three"])
    assert reader.read_from(2, wait_s=5.0).records == ((2, b"three"),)


@pytest.mark.slow
def test_a_certificate_is_a_login_too(kafka: Broker, tmp_path: Path) -> None:
    url = f"kafka://{kafka.certificate_address}/{new_topic()}"
    log = KafkaLog(url, kafka.certificate_login())
    assert log.read(log.append([b"one"])[0]) == b"one"


@pytest.mark.slow
def test_what_the_brokers_refuse_is_said_with_what_to_do(kafka: Broker, tmp_path: Path) -> None:
    foreign = EmbeddedKeyring.create(tmp_path / "keyring", "others")
    (tmp_path / "ca.pem").write_bytes(foreign.ca_pem())
    url, right = f"kafka://{kafka.login_address}/t", kafka.login(COORDINATOR)
    by_certificate = f"kafka://{kafka.certificate_address}/t"
    without = {"security.protocol": "ssl", "ssl.ca.location": str(kafka.ca)}
    cases = {
        "the brokers refused the login; check sasl.mechanism, sasl.username and the password: _AUTHENTICATION: ": [
            (url, {**right, "sasl.password": "wrong-pony"}),
            (url, {**right, "sasl.username": "nobody"}),
            (url, {**right, "sasl.mechanism": "SCRAM-SHA-256"}),
        ],
        "no TLS with the brokers; check ssl.ca.location, and that host and port are of their TLS listener: _SSL: ": [
            (url, {**right, "ssl.ca.location": str(tmp_path / "ca.pem")}),
        ],
        "the brokers refused this side's certificate; check ssl.certificate.location and ssl.key.location: ": [
            (by_certificate, without),
        ],
        "no answer; check host and port, and whether the brokers want TLS or a login (security.protocol): ": [
            (url, {}),
            (f"kafka://{kafka.address}/t", right),
        ],
    }
    every = [(words, *case) for words, found in cases.items() for case in found]
    began = time.monotonic()
    with ThreadPoolExecutor(len(every)) as threads:  # each waits for a second or more
        for (words, *_), told in zip(every, threads.map(lambda one: refused(one[1], one[2]), every), strict=True):
            assert told.startswith(words)
    assert time.monotonic() - began < 60.0


@pytest.mark.parametrize(
    ("properties", "told"),
    [
        ({"sasl.mechanism": "ROT13", "security.protocol": "sasl_ssl"}, "Unsupported SASL mechanism: ROT13; correct"),
        ({"ssl.colour": "green"}, 'No such configuration property: "ssl.colour"; correct'),
        ({"acks": "0"}, "property 'acks'"),
    ],
)
def test_a_property_that_librdkafka_does_not_take_is_malformed(properties: dict[str, str], told: str) -> None:
    for kind in (TopicReader, KafkaLog):
        with pytest.raises(Malformed, match=told):
            kind("kafka://127.0.0.1:1/t", properties, patience_s=0.2)


def test_a_login_is_lines_of_names_and_values() -> None:
    text = "# of the fraud team\n\nsecurity.protocol = sasl_ssl\nsasl.password=a=b #c\n  sasl.username=me  \n"
    assert parse_login(text, "login") == {
        "security.protocol": "sasl_ssl",
        "sasl.password": "a=b #c",
        "sasl.username": "me",
    }
    assert parse_login("", "login") == {}


@pytest.mark.parametrize("line", ["hunter2", "=hunter2", "acks=hunter2", "sasl.username=hunter2"])
def test_a_line_that_is_none_is_refused_by_its_number_and_not_repeated(line: str) -> None:
    with pytest.raises(Malformed, match=r"^login:2: expected ") as caught:
        parse_login(f"sasl.username=me\n{line}\n", "login")
    assert "hunter2" not in str(caught.value)


def test_nothing_is_advised_about_what_is_not_understood() -> None:
    assert advice("_FAIL: something new") == ""
