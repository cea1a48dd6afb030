"""What the SuperLink is started with, and the guard in front of its Control API. Nothing is started here."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fl_coordinator import flower, flower_superlink
from fl_coordinator.flower_middleware import ControlToken
from model_delta.errors import Malformed, Unavailable
from tests.systems import on_linux


def place_in(folder: Path) -> flower_superlink.SuperLinkPlace:
    certificate, key, ca = (folder / name for name in ("server.pem", "server.key", "ca.pem"))
    return flower_superlink.SuperLinkPlace(folder / "flower", 4321, certificate, key, ca)


def test_importing_is_cheap_and_leaves_flower_alone() -> None:
    code = (
        "import sys, fl_coordinator.flower, fl_coordinator.flower_superlink;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('flwr', 'httpx', 'grpc', 'fastapi')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_command_line_is_closed_and_bound_to_loopback(tmp_path: Path) -> None:
    words = flower_superlink.superlink_argv(place_in(tmp_path))
    options = dict(pairwise(words))
    assert options["--host"] == "127.0.0.1"
    assert options["--port"] == "4321"
    assert options["--isolation"] == "subprocess"
    assert options["--database"] == ":flwr-in-memory:"
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation", "--ssl-certfile"} <= set(words)
    assert "--insecure" not in words


def test_the_environment_is_offline_and_keeps_every_file_inside(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    inherited = {
        "PATH": "/usr/bin",
        "https_proxy": "http://proxy.example:3128",
        "FLWR_TELEMETRY_ENABLED": "1",
        "FLWR_INTERNAL_GRPC_FLEET_API": "1",
        "LANG": "C.UTF-8",
    }
    found = flower_superlink.superlink_environment(place, inherited)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["ORT_DISABLE_TELEMETRY"] == "1"
    assert found["LANG"] == "C.UTF-8"
    assert not {"https_proxy", "FLWR_INTERNAL_GRPC_FLEET_API"} & set(found)
    for name in ("FLWR_HOME", "TMPDIR"):
        assert Path(found[name]).is_relative_to(place.folder)
    assert (Path(found["PATH"].split(os.pathsep)[0]) / "flower-superexec").exists()
    assert Path(found["PYTHONPATH"].split(os.pathsep)[0], "fl_coordinator").is_dir()


def test_compiled_modules_go_where_the_supervisor_says_or_into_the_folder(tmp_path: Path) -> None:
    place, off = place_in(tmp_path), {"PYTHONDONTWRITEBYTECODE": "1"}
    found = flower_superlink.superlink_environment(place, {"PYTHONPYCACHEPREFIX": "/elsewhere", **off})
    assert found["PYTHONPYCACHEPREFIX"] == "/elsewhere"
    assert "PYTHONDONTWRITEBYTECODE" not in found
    found = flower_superlink.superlink_environment(place, off)
    assert found.get("PYTHONDONTWRITEBYTECODE") == "1" or Path(found["PYTHONPYCACHEPREFIX"]).is_relative_to(tmp_path)


def test_preparing_twice_keeps_the_token_private_and_the_same(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    flower_superlink.prepare(place)
    token = place.token.read_bytes()
    flower_superlink.prepare(place)
    assert place.token.read_bytes() == token
    assert stat.S_IMODE(place.token.stat().st_mode) == 0o600


def test_a_command_line_tells_whose_superexec_it_is(tmp_path: Path) -> None:
    mine, other = place_in(tmp_path / "mine"), place_in(tmp_path / "other")
    words = [b"flower-superexec", b"--root-certificates", os.fsencode(mine.ca), b"--runtime-api-address"]
    assert flower_superlink.serves(mine, [*words, mine.address.encode()])
    assert not flower_superlink.serves(mine, [*words, b"127.0.0.1:1"])
    assert not flower_superlink.serves(other, [*words, mine.address.encode()])


@on_linux
def test_only_processes_of_this_folder_are_found_and_ended(tmp_path: Path) -> None:
    mine, other = place_in(tmp_path / "mine"), place_in(tmp_path / "other")
    sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    running = [
        subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": str(place.home)}, stdout=subprocess.PIPE)
        for place in (mine, other)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        assert set(flower_superlink.processes_of(mine)) == {running[0].pid}
        assert flower_superlink.end_processes(mine) == [running[0].pid]
        running[0].wait(60)
        assert flower_superlink.processes_of(mine) == {}
        assert running[1].poll() is None
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_a_missing_certificate_file_is_named(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    flower_superlink.prepare(place)
    with pytest.raises(Unavailable, match=r"certificate authority .*ca\.pem"):
        flower.Control(place.address, place.ca, place.token)


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/v1/control/start-run", b"Bearer right", 200),
        ("/v1/control/start-run", b"Bearer wrong", 401),
        ("/v1/control/start-run", None, 401),
        ("/docs", None, 401),
        ("/v1/fleet/pull-messages", None, 200),
        ("/v1/runtime/acquire-task", None, 200),
        ("/v1/fleetish", None, 401),
    ],
)
def test_the_control_api_needs_the_token(path: str, authorization: bytes | None, status: int) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"x")] + ([(b"authorization", authorization)] if authorization else [])
    guard = ControlToken(inner, "right")
    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, None, send))
    assert sent[0]["status"] == status


def test_a_websocket_never_passes_the_guard() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the server")

    asyncio.run(ControlToken(inner, "right")({"type": "websocket", "path": "/v1/fleet/x"}, None, None))


def test_a_node_key_is_drawn_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "node.pem"
    first = flower.node_public_key(path)
    assert flower.node_public_key(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert flower.node_key(path).curve.name == "secp384r1"
    flower.check_public_key(first, "node")


@pytest.mark.parametrize("curve", [None, ec.SECP256K1()])
def test_a_key_that_flower_would_refuse_is_refused_first(tmp_path: Path, curve: ec.EllipticCurve | None) -> None:
    key = rsa.generate_private_key(65537, 2048) if curve is None else ec.generate_private_key(curve)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = tmp_path / "node.pem"
    path.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    with pytest.raises(Malformed, match="NIST curve"):
        flower.node_key(path)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(Malformed, match="NIST curve"):
        flower.check_public_key(public, "node")


@pytest.mark.parametrize("text", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "node.pem").write_bytes(text)
    with pytest.raises(Malformed, match=r"node\.pem"):
        flower.node_key(tmp_path / "node.pem")
    with pytest.raises(Malformed, match="aggregator-9"):
        flower.check_public_key(text, "aggregator-9")
