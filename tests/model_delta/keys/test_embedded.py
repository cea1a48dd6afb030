"""The embedded keyring's file: older formats, two processes, and records as Transit writes them."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.encoding import pack, unpack_plain
from model_delta.errors import AtollError, Malformed, StorageFull, Untrusted
from model_delta.keys import keyfile
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.keys.wrapping import VERSIONS_MAX, KeyVersions, unwrap, version_of, wrap
from tests.model_delta.models import NOW, keyring

FORMAT_1 = Path(__file__).parents[2] / "vectors" / "keyring.cbor"
CONTEXT, KEY = "acme/fraud/0123", bytes(range(32))
WRAPPED_1 = bytes.fromhex(
    "0129c675641ac9ac2e69d61801d038550748f60c2787d0237c1c6eb104c2c85754d5d955538167824c5f832c7d1faeab81c71ed5d16a939eb34beec25b"
)
"""KEY as the keyring of format 1 in `tests/vectors` wrapped it."""


def opened(folder: Path) -> EmbeddedKeyring:
    path = folder / "keyring"
    shutil.copyfile(FORMAT_1, path)
    path.chmod(0o600)
    return EmbeddedKeyring.open(path, lambda: NOW)


def test_a_file_of_format_1_keeps_everything_when_it_becomes_format_2(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    anchors, authority = ring.anchors(), ring.ca_pem()
    before = unpack_plain(FORMAT_1.read_bytes())
    assert (before["format"], ring.versions()) == (1, KeyVersions(1, 1))
    assert (tmp_path / "keyring").read_bytes() == FORMAT_1.read_bytes()  # reading changes nothing
    ring.revoke(5)
    assert ring.rotate() == 2
    after = unpack_plain((tmp_path / "keyring").read_bytes())
    assert after["format"] == 2
    assert after["wrapping_keys"][0] == {"version": 1, "key": before["wrapping_key"]}
    assert {name: after[name] for name in ("tenant", "roles", "authority_key")} == {
        name: before[name] for name in ("tenant", "roles", "authority_key")
    }
    again = EmbeddedKeyring.open(tmp_path / "keyring", lambda: NOW)
    assert (again.anchors(), again.ca_pem(), again.revoked()) == (anchors, authority, ring.revoked())


def test_a_key_wrapped_under_format_1_still_opens_and_moves_to_the_new_form(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    assert ring.unwrap(CONTEXT, WRAPPED_1) == KEY
    with pytest.raises(Untrusted, match="does not open"):
        ring.unwrap("acme/fraud/0124", WRAPPED_1)
    ring.rotate()
    (moved,) = ring.rewrap([(CONTEXT, WRAPPED_1)])
    assert moved.startswith(b"vault:v2:")
    assert ring.unwrap(CONTEXT, moved) == KEY
    ring.trim(2)
    with pytest.raises(Untrusted, match="expected versions 2 to 2, found 1"):
        ring.unwrap(CONTEXT, WRAPPED_1)


def test_two_processes_do_not_undo_each_others_changes(tmp_path: Path) -> None:
    coordinator, operator = keyring(tmp_path), EmbeddedKeyring.open(tmp_path / "keyring-acme")
    assert (operator.rotate(), coordinator.rotate()) == (2, 3)
    coordinator.revoke(8)
    operator.trim(2)
    found = EmbeddedKeyring.open(tmp_path / "keyring-acme")
    assert (found.versions(), set(found.revoked())) == (KeyVersions(2, 3), {8})


def test_versions_are_bounded(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    contents = unpack_plain(path.read_bytes())
    contents["wrapping_keys"] = [{"version": n, "key": bytes(32)} for n in range(1, VERSIONS_MAX + 1)]
    path.write_bytes(pack(contents))
    with pytest.raises(Malformed, match="trim old ones"):
        ring.rotate()


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [{"version": 0, "key": bytes(32)}],
        [{"version": 2, "key": bytes(32)}, {"version": 1, "key": bytes(32)}],
        [{"version": 1, "key": bytes(32)}, {"version": 1, "key": bytes(32)}],
        [{"version": 1, "key": bytes(31)}],
    ],
)
def test_a_file_whose_wrapping_keys_make_no_sense_is_refused(tmp_path: Path, keys: list[object]) -> None:
    keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    path.write_bytes(pack({**unpack_plain(path.read_bytes()), "wrapping_keys": keys}))
    with pytest.raises(Malformed, match="wrapping keys: expected"):
        EmbeddedKeyring.open(path)


def test_a_rotation_without_room_changes_nothing(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    before = (tmp_path / "keyring-acme").read_bytes()

    def full(_: keyfile.KeyFile) -> keyfile.KeyFile:
        raise StorageFull("no room")

    with pytest.raises(StorageFull):
        keyfile.change(tmp_path / "keyring-acme", full)
    assert (tmp_path / "keyring-acme").read_bytes() == before
    assert ring.versions() == KeyVersions(1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["keyring-acme"]


def test_a_keyring_of_before_a_role_gains_its_key_and_keeps_the_others(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    before = ring.contents

    def older(contents: keyfile.KeyFile) -> keyfile.KeyFile:
        return msgspec.structs.replace(contents, roles={k: v for k, v in contents.roles.items() if k != "director"})

    keyfile.change(path, older)
    opened = EmbeddedKeyring.open(path)
    assert "director" not in opened.anchors().roles
    assert opened.add_missing_roles() == ("director",)
    assert opened.add_missing_roles() == ()
    again = EmbeddedKeyring.open(path)
    assert again.anchors() == opened.anchors() != ring.anchors()
    assert {role: keys for role, keys in again.contents.roles.items() if role != "director"} == {
        role: keys for role, keys in before.roles.items() if role != "director"
    }
    assert again.verify(opened.sign("director", "device-plan", b"p"), "device-plan", "director") == b"p"


def test_the_form_is_transits() -> None:
    """A record spelled out, so that a change of the form is seen: nonce 0..11 under a wrapping key of 32 bytes 7."""
    wrapped = wrap({3: b"\x07" * 32}, "acme/1", b"k" * 32, lambda size: bytes(range(size)))
    assert wrapped == (b"vault:v3:AAECAwQFBgcICQoLffkxaJhNVPS0Pp4FDlrQMcx9EV+t2cTJUz4HfLiSYTfjS7jZP4Gm8j+Ozqf0JmXI")
    prefix, version, body = wrapped.split(b":")
    assert (prefix, version, base64.b64decode(body)[:12]) == (b"vault", b"v3", bytes(range(12)))
    assert len(base64.b64decode(body)) == 12 + 32 + 16
    assert version_of(wrapped) == 3


@given(
    context=st.text(min_size=1, max_size=80),
    key=st.binary(max_size=64),
    versions=st.sets(st.integers(1, 9999), min_size=1),
)
def test_what_was_wrapped_opens(context: str, key: bytes, versions: set[int]) -> None:
    try:
        context.encode()
    except UnicodeEncodeError:
        return
    keys = {version: os.urandom(32) for version in versions}
    assert unwrap(keys, context, wrap(keys, context, key)) == key


@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda data: b"vault:v1:" + base64.b64encode(data)))
def test_hostile_records_are_refused_by_kind(data: bytes) -> None:
    with pytest.raises(AtollError):
        unwrap({1: bytes(32)}, "acme/1", data)
