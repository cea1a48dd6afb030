"""The ceremonies of `atoll vault`, and the platform that uses what they leave."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atoll.cli import app
from atoll.platform import open_keyring
from atoll.settings import ConfigurationError, DataFolder
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.keys.vault import VaultKeyring
from tests.fakes.vault_server import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


def call(*arguments: str, answer: str = "") -> str:
    result = CliRunner().invoke(app, [*arguments], input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_new_platform_keeps_its_keys_on_the_server(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    token = tmp_path / "token"
    token.write_text(server.token + "\n")
    options = ("--address", server.url, "--base", "fresh", "--data", str(data), "--json")
    made = json.loads(call("vault", "setup", "--token-file", str(token), *options))["made"]
    assert "authority of acme" in made
    again = json.loads(call("vault", "setup", "--token-file", "-", *options, answer=server.token + "\n"))
    assert again["made"] == []
    place = data / "vault.json"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert server.token not in place.read_text()
    ring = open_keyring(DataFolder.open(data))
    assert isinstance(ring, VaultKeyring)
    assert ring.unwrap("acme/1", ring.wrap("acme/1", b"k" * 32)) == b"k" * 32
    assert not (data / "keyring").exists()
    status = json.loads(call("vault", "status", "--data", str(data), "--json"))
    assert (status["tenant"], status["wrapping_key_newest"], status["revoked"]) == ("acme", 1, 0)


def test_a_platform_that_has_keys_takes_them_along(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = DataFolder.open(data, create=True)
    local = open_keyring(folder)
    wrapped, anchors = local.wrap("acme/1", b"k" * 32), local.anchors()
    token = tmp_path / "admin.token"
    token.write_text(server.token)
    options = ("--address", server.url, "--base", "moved", "--data", str(data), "--token-file", str(token))
    with pytest.raises(ConfigurationError, match="run `atoll vault migrate`"):
        call("vault", "setup", *options)
    assert "destroy it" in call("vault", "migrate", *options)
    ring = open_keyring(folder)
    assert isinstance(ring, VaultKeyring)
    assert (ring.unwrap("acme/1", wrapped), ring.anchors()) == (b"k" * 32, anchors)
    assert not (data / "keyring").exists()
    assert EmbeddedKeyring.open(data / "keyring.moved").anchors() == anchors
    with pytest.raises(ConfigurationError, match="found none"):
        call("vault", "migrate", *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--address": "http://vault.example"}, "--address"),
        ({"--tenant": "globex"}, "--tenant"),
        ({"--base": "a/../b"}, "--tenant, --base"),
        ({"--token-file": "/nonexistent/token"}, "--token-file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(tmp_path: Path, change: dict[str, str], message: str) -> None:
    (tmp_path / "token").write_text("t")
    options = {
        "--address": "http://127.0.0.1:9",
        "--token-file": str(tmp_path / "token"),
        "--data": str(tmp_path / "d"),
    }
    flat = [part for pair in (options | change).items() for part in pair]
    with pytest.raises(ConfigurationError, match=message):
        call("vault", "setup", *flat)
    assert not (tmp_path / "d").exists()


def test_a_damaged_place_is_named(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path, create=True)
    (tmp_path / "vault.json").write_text('{"address": 5}')
    with pytest.raises(ConfigurationError, match=r"vault\.json: expected where the keys are"):
        open_keyring(folder)
    (tmp_path / "vault.json").unlink()
    with pytest.raises(ConfigurationError, match="embedded keyring"):
        call("vault", "status", "--data", str(tmp_path))
