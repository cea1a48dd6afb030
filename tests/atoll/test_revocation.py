"""What a process knows of revoked certificates grows with every answer and survives a coordinator that is away."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.control_client import ControlClient
from atoll.enrolment import enrolled_identity
from atoll.platform import (
    BROKER,
    CERTIFICATE_DAYS,
    RENEW_DAYS,
    Layout,
    issue_identity,
    mosquitto_argv,
    open_keyring,
    prepare,
    read_root,
    revocation_list_of,
)
from atoll.revocation import keep_informed, keep_list, reload_when_changed
from atoll.settings import DataFolder, Endpoints
from edge_runtime.identity import Identity
from model_delta.encoding import pack
from model_delta.errors import Unavailable
from model_delta.keys.certificates import days_left, same_keys, serial_of
from regional_gateway import mosquitto
from tests.atoll.platform_process import answer, free_run, listens, platform, until


def test_serials_are_learned_and_kept_while_the_coordinator_is_away() -> None:
    big = (1 << 159) + 1
    answers = [json.dumps({"serials": ["7"]}), "not json", json.dumps({"serials": [str(big)]})]
    seen: list[bytes] = []

    async def story() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            if len(seen) > len(answers):
                asked_on.set()
            body = answers[min(len(seen), len(answers)) - 1]
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            await writer.drain()
            writer.close()

        asked_on = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        revoked: set[int] = {3}
        informed = asyncio.create_task(keep_informed(revoked, f"http://127.0.0.1:{port}", "token", 0.01))
        async with asyncio.timeout(60):
            await asked_on.wait()
            while big not in revoked:  # noqa: ASYNC110 (a set has no event to offer)
                await asyncio.sleep(0.005)
        server.close()
        informed.cancel()
        assert revoked == {3, 7, big}
        assert b"GET /v1/revoked" in seen[0]
        assert b"authorization: bearer token" in seen[0].lower()

    asyncio.run(story())


@contextlib.contextmanager
def mosquitto_on(data: DataFolder, endpoints: Endpoints) -> Iterator["subprocess.Popen[bytes]"]:
    """The platform's mosquitto, listening."""
    process = subprocess.Popen(mosquitto_argv(data, endpoints), stderr=subprocess.DEVNULL)
    try:
        until(lambda: listens(endpoints.broker.port), 60, "mosquitto listens")
        yield process
    finally:
        process.terminate()
        process.wait(60)


def admitted(folder: Path, port: int) -> bool:
    """Whether the broker takes a TLS connection with the certificate in `folder`. TLS 1.2, where a refusal is part of
    the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1"),
        ):
            return True
    except (ssl.SSLError, ConnectionError):
        return False


def require_mosquitto() -> None:
    if mosquitto.find() is None:
        assert os.environ.get("ATOLL_REQUIRE_SERVERS") != "1", "mosquitto is required here and was not found"
        pytest.skip("mosquitto is not installed")


def prepared(folder: Path, broker: str) -> tuple[DataFolder, Endpoints]:
    first = free_run(4)
    ports = iter(range(first, first + 4))
    data = DataFolder.open(folder, create=True)
    return data, prepare(data, Layout(regions=("eu-west",), broker=broker), lambda what: next(ports))


def test_mosquitto_refuses_whoever_was_revoked_while_it_runs(tmp_path: Path) -> None:
    require_mosquitto()
    data, endpoints = prepared(tmp_path / "data", "mosquitto")
    keyring = open_keyring(data)
    folders = {name: issue_identity(data, keyring, name) for name in ("pos-1", "pos-2")}
    port = endpoints.broker.port

    async def story(process: "subprocess.Popen[bytes]") -> None:
        reloads: list[float] = []

        def hang_up() -> None:
            process.send_signal(signal.SIGHUP)
            reloads.append(time.monotonic())

        path = revocation_list_of(data)
        keeping = asyncio.create_task(keep_list(path, keyring.revoked, keyring.revocation_list, 0.02))
        watching = asyncio.create_task(reload_when_changed(path, hang_up, 0.02))
        keyring.revoke(serial_of((folders["pos-1"] / "certificate.pem").read_bytes()))
        async with asyncio.timeout(60):
            while await asyncio.to_thread(admitted, folders["pos-1"], port):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)
        assert len(reloads) <= 3  # and not at every look: once at the start, and once for each of two files
        for task in (keeping, watching):
            task.cancel()

    with mosquitto_on(data, endpoints) as process:
        assert admitted(folders["pos-1"], port)
        asyncio.run(story(process))
        assert admitted(folders["pos-2"], port)
        assert process.poll() is None
    with mosquitto_on(data, endpoints):  # and after a restart
        assert (admitted(folders["pos-1"], port), admitted(folders["pos-2"], port)) == (False, True)


def test_a_certificate_that_runs_out_soon_is_renewed_for_the_same_key(tmp_path: Path) -> None:
    data, _ = prepared(tmp_path / "data", "embedded")
    keyring = open_keyring(data)
    folder = data.identity(BROKER)
    identity = Identity.load(folder, BROKER)
    fresh = identity.certificate_pem
    issue_identity(data, keyring, BROKER, server=True)
    assert identity.certificate_pem == fresh
    soon = keyring.issue_certificate(
        identity.request_pem(), BROKER, identity.sealing_public, days=RENEW_DAYS - 1, server=True
    )
    identity.enrolled(soon, keyring.ca_pem())
    ports = iter(range(free_run(4), 65_000))
    prepare(data, Layout(regions=("eu-west",), broker="embedded"), lambda what: next(ports))
    renewed = identity.certificate_pem
    assert days_left(renewed, time.time()) > CERTIFICATE_DAYS - 2
    assert same_keys(renewed, soon)


def test_an_enrolled_identity_asks_again_in_time_and_goes_on_while_nobody_answers(tmp_path: Path) -> None:
    data, _ = prepared(tmp_path / "data", "embedded")
    keyring = open_keyring(data)
    folder, asked = data.identity("gateway-eu-west"), []

    class Coordinator:
        def post(self, path: str, body: dict[str, Any]) -> dict[str, str]:
            asked.append(path)
            if len(asked) == 2:
                raise Unavailable("coordinator: away")
            days = RENEW_DAYS - 1 if len(asked) == 1 else 400
            sealing = base64.b64decode(body["sealing_public"])
            issued = keyring.issue_certificate(body["csr_pem"].encode(), body["common_name"], sealing, days=days)
            anchors = base64.b64encode(pack(keyring.anchors())).decode()
            root = base64.b64encode(f"root {len(asked)}".encode()).decode()
            ca = keyring.ca_pem().decode()
            return {"certificate_pem": issued.decode(), "ca_pem": ca, "root": root, "anchors": anchors}

    def enrolled() -> float:
        identity = enrolled_identity(folder, "gateway-eu-west", "gateway", Coordinator())  # type: ignore[arg-type]
        return days_left(identity.certificate_pem, time.time())

    assert enrolled() < RENEW_DAYS
    assert enrolled() < RENEW_DAYS  # the coordinator is away
    assert enrolled() > 390
    assert enrolled() > 390
    assert asked == ["/v1/enroll"] * 3
    assert read_root(folder) == b"root 1"
    (folder / "root.json").unlink()  # enrolled by a program of before there was a root
    assert enrolled() > 390
    assert enrolled() > 390
    assert read_root(folder) == b"root 4"


def test_who_is_enrolled_before_the_ceremony_asks_again(tmp_path: Path) -> None:
    data, _ = prepared(tmp_path / "data", "embedded")
    keyring = open_keyring(data)

    class Coordinator:
        def post(self, path: str, body: dict[str, Any]) -> dict[str, str]:
            return {
                "certificate_pem": "",
                "ca_pem": "",
                "root": "",
                "anchors": base64.b64encode(pack(keyring.anchors())).decode(),
            }

    with pytest.raises(Unavailable, match="no root of trust yet"):
        enrolled_identity(data.identity("pos-1"), "pos-1", "device", Coordinator())  # type: ignore[arg-type]
    assert not Identity.load(data.identity("pos-1"), "pos-1").is_enrolled


@pytest.mark.slow
def test_a_device_revoked_by_an_operator_cannot_reach_mosquitto_any_more(tmp_path: Path) -> None:
    require_mosquitto()
    data = tmp_path / "data"
    with platform(data, "mosquitto", port=free_run(4)) as running:
        client = DataFolder.open(data).tokens()["join"]
        folder = DataFolder.open(data).identity("pos-0001")
        enrolled_identity(folder, "pos-0001", "device", ControlClient(running.endpoints["coordinator"], client))
        port = running.endpoints["broker"]["port"]
        assert admitted(folder, port)
        answer(data, "device", "revoke", "pos-0001")
        until(lambda: not admitted(folder, port), 15, "mosquitto refuses pos-0001")
        assert admitted(DataFolder.open(data).identity("coordinator"), port)
