"""A tenant's keys on a Vault or OpenBao server: the ceremonies, and where the platform finds the server afterwards.

The data folder's `vault.json` (0600) says where the keys are and how the coordinator logs in; while it is there,
nothing of the embedded keyring is used. An administrator's token comes from a file, from standard input (`-`) or from
VAULT_TOKEN, and is written nowhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from atoll.output import columns, show
from atoll.settings import TENANT, ConfigurationError, DataFolder, write_private
from model_delta.errors import Malformed
from model_delta.keys import keyfile
from model_delta.keys.keyring import Keyring
from model_delta.keys.vault import TenantPaths, VaultKeyring
from model_delta.keys.vault_connection import AppRoleLogin, CertificateLogin, Login, TokenLogin, VaultConnection
from model_delta.keys.vault_setup import credentials, setup
from model_delta.keys.wrapping import LEGACY

TOKEN_BYTES_MAX = 4096


class VaultPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a tenant's keys are. With a `role_id` the coordinator logs in by AppRole, otherwise by the certificate and
    key (PEM files) named here."""

    address: str
    tenant: str
    base: str = "atoll"
    ca: str = ""
    role_id: str = ""
    secret_id: str = ""
    certificate: str = ""
    key: str = ""


def place_of(data: DataFolder) -> VaultPlace:
    """What the data folder says. Raises ConfigurationError when the keys are in the embedded keyring, or unreadable."""
    path = data.vault_path
    try:
        return msgspec.json.decode(path.read_bytes(), type=VaultPlace)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: not there; the keys are in the embedded keyring") from None
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigurationError(f"{path}: expected where the keys are, as JSON: {error}") from None


def keyring_at(place: VaultPlace) -> VaultKeyring:
    """The keyring there. Nothing is asked yet. Raises ConfigurationError."""
    paths = _paths(place.tenant, place.base)
    login: Login
    if place.role_id:
        login = AppRoleLogin(paths.approle, place.role_id, place.secret_id)
    else:
        login = CertificateLogin(paths.cert, "coordinator", Path(place.certificate), Path(place.key))
    return VaultKeyring(_connection(place.address, login, place.ca), paths)


def setup_vault(
    data: Path, address: str, token_file: str, *, tenant: str, base: str, ca: str, migrate: bool, as_json: bool
) -> None:
    """Make mounts, keys, policies and logins, and let the platform in `data` use them from its next start on.

    `migrate` brings the keys of the folder's embedded keyring; without it the folder must not have one yet. The folder
    must not be in use. Raises ConfigurationError, AtollError.
    """
    paths = _paths(tenant, base)
    if tenant != TENANT:
        raise ConfigurationError(f"--tenant: expected {TENANT}, the platform's, found {tenant[:64]!r}")
    admin = _connection(address, TokenLogin(_token(token_file)), ca)
    folder = DataFolder.open(data, create=not migrate)
    with folder.locked():
        embedded = folder.keyring_path
        before = place_of(folder) if folder.vault_path.exists() else None
        if before is not None and (before.address, before.tenant, before.base) != (address, tenant, base):
            raise ConfigurationError(
                f"{folder.vault_path}: names {before.address}, tenant {before.tenant}; move that file away first"
            )
        if embedded.exists() and not migrate:
            raise ConfigurationError(f"{embedded}: is there already; run `atoll vault migrate` to bring its keys along")
        if migrate and not embedded.exists():
            raise ConfigurationError(f"{embedded}: expected the embedded keyring to move, found none")
        if migrate:
            _require_present_form(folder)
        steps = setup(admin, paths, moved=keyfile.read(embedded) if migrate else None)
        if before is None:
            found = credentials(admin, paths, "coordinator")
            place = VaultPlace(
                address=address, tenant=tenant, base=base, ca=ca, role_id=found.role_id, secret_id=found.secret_id
            )
            keyring_at(place).versions()  # the login works, before anything depends on it
            write_private(folder.vault_path, msgspec.json.encode(place))
        if migrate:
            embedded.replace(embedded.with_name("keyring.moved"))
    made = [step.what for step in steps if step.made]
    rows = [{"what": step.what, "state": "made" if step.made else "was there"} for step in steps]
    text = columns(rows, ("what", "state"))
    if migrate:
        text += f"\n{embedded.with_name('keyring.moved')}: the keys as they were; destroy it when the platform runs"
    show({"address": address, "tenant": tenant, "made": made, "steps": rows}, text, as_json=as_json)


def vault_status(data: Path, *, as_json: bool) -> None:
    """Ask the server, as the coordinator would, what it holds for this platform. Raises ConfigurationError."""
    folder = DataFolder.open(data)
    place = place_of(folder)
    ring: Keyring = keyring_at(place)
    floor, latest = ring.versions()
    found = {
        "address": place.address,
        "tenant": ring.tenant,
        "wrapping_key_oldest": floor,
        "wrapping_key_newest": latest,
        "roles": sorted(ring.anchors().roles),
        "revoked": len(ring.revoked()),
    }
    show(found, columns([found], list(found)), as_json=as_json)


def _require_present_form(folder: DataFolder) -> None:
    """Wrapped keys of the form before Transit's would not open on the server. Raises ConfigurationError."""
    from fl_coordinator.ledger import Ledger

    path = folder.path / "coordinator" / "ledger.sqlite"
    if not path.exists():
        return
    ledger = Ledger(path)
    try:
        old = [record.name or record.manifest for record in ledger.releases() if record.wrapped_key[:1] == LEGACY]
    finally:
        ledger.close()
    if old:
        raise ConfigurationError(
            f"{path}: {len(old)} artifact keys have an older form; start the platform, run `atoll keys rotate`, stop it"
        )


def _paths(tenant: str, base: str) -> TenantPaths:
    try:
        return TenantPaths(tenant, base)
    except Malformed as error:
        raise ConfigurationError(f"--tenant, --base: {error}") from None


def _connection(address: str, login: Login, ca: str) -> VaultConnection:
    try:
        return VaultConnection(address, login, ca_path=Path(ca) if ca else None)
    except Malformed as error:
        raise ConfigurationError(f"--address: {error}") from None


def _token(source: str) -> str:
    """The administrator's token from a file, `-` for standard input, or VAULT_TOKEN when nothing is named."""
    if not source:
        found = os.environ.get("VAULT_TOKEN", "")
    elif source == "-":
        found = sys.stdin.readline(TOKEN_BYTES_MAX)
    else:
        try:
            with Path(source).open(encoding="utf-8") as file:
                found = file.readline(TOKEN_BYTES_MAX)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--token-file {source}: {type(error).__name__}; name a readable file") from None
    token = found.strip()
    if not token or not token.isprintable() or not token.isascii():
        raise ConfigurationError("administrator's token: expected one in --token-file, or in VAULT_TOKEN, found none")
    return token
