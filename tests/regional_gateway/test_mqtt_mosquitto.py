"""What is written for mosquitto, and that a real one accepts it from a folder with a space in its name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from model_delta.errors import Malformed, Unavailable
from regional_gateway import mosquitto
from tests.regional_gateway.mqtt_stage import Authority, BrokerProcess, Client

INSTALLED = mosquitto.Mosquitto(Path("/opt/mosquitto"), (2, 0, 11))


def fake_mosquitto(folder: Path, says: str) -> str:
    program = folder / "mosquitto"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_finds_a_mosquitto_and_reads_its_version(tmp_path: Path) -> None:
    path = fake_mosquitto(tmp_path, "mosquitto version 2.1.3")
    assert mosquitto.find(path) == mosquitto.Mosquitto(tmp_path / "mosquitto", (2, 1, 3))


@pytest.mark.parametrize("says", ["mosquitto version 1.6.12", "something else"])
def test_leaves_an_old_or_unknown_one_alone(tmp_path: Path, says: str) -> None:
    assert mosquitto.find(fake_mosquitto(tmp_path, says)) is None
    assert mosquitto.find(str(tmp_path / "nothing here")) is None


def test_writes_what_the_fleet_relies_on(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    files = mosquitto.BrokerFiles(authority.ca, *authority.issue("broker", server=True))
    folder = tmp_path / "data"
    command = mosquitto.prepare(
        INSTALLED, folder, files, host="127.0.0.1", port=8883, platform=("coordinator", "gateway-eu-west")
    )
    assert command == ["/opt/mosquitto", "-c", str(folder / "mosquitto.conf")]
    settings = (folder / "mosquitto.conf").read_text().splitlines()
    for line in (
        "listener 8883 127.0.0.1",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        "persistence true",
        "max_inflight_messages 0",
        "max_queued_messages 1000",
        "max_packet_size 5000000",
        "set_tcp_nodelay true",
    ):
        assert line in settings
    assert ("user root" in settings) == (os.geteuid() == 0)
    assert (folder / "acl").read_text().split("\n") == [
        "user coordinator",
        "topic readwrite atoll/1/#",
        "",
        "user gateway-eu-west",
        "topic write atoll/1/dev/+/down/res",
        "topic write atoll/1/dev/+/down/trust",
        "topic write atoll/1/cfg/+/round/+/eu-west",
        "topic read atoll/1/dev/+/up/req/eu-west",
        "topic read atoll/1/dev/+/up/trust/eu-west",
        "",
        "pattern write atoll/1/dev/%u/up/#",
        "pattern read atoll/1/dev/%u/down/#",
        "pattern read atoll/1/cfg/#",
        "",
    ]
    assert (folder / "acl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["pos-0001", "gateway-a b", "gateway-+", "coordinator\ntopic readwrite #"])
def test_gives_the_platforms_rights_to_nobody_else(name: str) -> None:
    with pytest.raises(Malformed, match="platform name"):
        mosquitto.access_file([name])


def test_says_what_is_missing(tmp_path: Path) -> None:
    files = mosquitto.BrokerFiles(tmp_path / "ca.pem", tmp_path / "b.pem", tmp_path / "b.key")
    with pytest.raises(Unavailable, match=r"ca\.pem.*issue the broker's certificate"):
        mosquitto.prepare(INSTALLED, tmp_path, files, host="127.0.0.1", port=8883, platform=())
    with pytest.raises(Malformed, match="1 to 65535"):
        mosquitto.prepare(INSTALLED, tmp_path, files, host="127.0.0.1", port=0, platform=())


def test_a_real_one_starts_from_a_folder_with_a_space(tmp_path: Path) -> None:
    if mosquitto.find() is None:
        assert os.environ.get("ATOLL_REQUIRE_SERVERS") != "1", "mosquitto is required here and was not found"
        pytest.skip("mosquitto is not installed")
    broker = BrokerProcess("mosquitto", tmp_path / "my data", Authority(tmp_path / "my ca"), ["coordinator"])
    broker.start()
    with Client(broker, "coordinator") as client:
        assert client.publish("atoll/1/cfg/acme/plan/fraud", b"plan", retain=True) == 0
    assert broker.stop() == 0
    assert {"sessions.db", "acl", "mosquitto.conf"} <= {path.name for path in (tmp_path / "my data").iterdir()}
    said = [line for line in broker.log.read_text().splitlines() if "unexpected eof" not in line]  # a client that left
    assert not any("Error" in line for line in said)
