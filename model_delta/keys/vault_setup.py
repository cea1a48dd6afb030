"""The ceremony that gives a tenant its place on a Vault or OpenBao server, and the one that moves an embedded keyring.

Each step looks first and changes only what is missing, so that a ceremony that was cut off is simply repeated. All keys
but one are made on the server. The CA's is made here, in memory, because both engines that use it have to be given it;
it is in no file, and this process ends with the ceremony. A tenant that moves brings its keys along (restored, see
`transit_backup`), so that wrapped records, certificates and the devices' trust anchors stay valid unchanged.

Policies are the files in `policies/`; the word TENANT in them stands for the tenant's folder.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from importlib import resources

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from model_delta.digest import digest_of
from model_delta.errors import Malformed, NotFound, Untrusted
from model_delta.keys.certificates import make_authority
from model_delta.keys.keyfile import KeyFile
from model_delta.keys.keyring import ROLES
from model_delta.keys.transit_backup import ed25519_backup, p256_backup, wrapping_backup
from model_delta.keys.vault import AUTHORITY, WRAPPING, TenantPaths, VaultKeyring, role_key_name
from model_delta.keys.vault_connection import VaultConnection
from model_delta.keys.wrapping import wrap

LOGINS = ("coordinator", "publisher", "rotator", "auditor")
TOKEN_TTL = "1h"
CA_TTL = "87600h"
LOGIN_TTL = "720h"


class Step(msgspec.Struct, frozen=True):
    """One thing that must be there, and whether this run made it."""

    what: str
    made: bool


class Credentials(msgspec.Struct, frozen=True):
    """What an AppRole login needs."""

    role_id: str
    secret_id: str


def policy_name(paths: TenantPaths, login: str) -> str:
    """The name of a tenant's policy. Vault folds names to lower case, tenants are told apart by case as well: hence
    the digest."""
    return f"atoll-{paths.tenant.lower()}-{digest_of(paths.folder.encode())[:12]}-{login}"


def policy_text(paths: TenantPaths, login: str) -> str:
    """The policy of `login` for one tenant, HCL. Raises Malformed for a login that there is none for."""
    if login not in LOGINS:
        raise Malformed(f"login: expected one of {', '.join(LOGINS)}, found {login[:40]!r}")
    text = resources.files("model_delta.keys").joinpath("policies", f"{login}.hcl").read_text(encoding="utf-8")
    return text.replace('"TENANT/', f'"{paths.folder}/')


def setup(
    connection: VaultConnection,
    paths: TenantPaths,
    *,
    moved: KeyFile | None = None,
    clock: Callable[[], float] = time.time,
) -> list[Step]:
    """Make what the tenant needs and lacks; `moved` brings the keys of an embedded keyring. `connection` is an
    administrator's.

    Raises Malformed when keys are to be moved to a tenant that has its own already, AccessDenied, Unavailable.
    """
    if moved is not None and moved.tenant != paths.tenant:
        raise Malformed(f"keyring to move: expected one of {paths.tenant}, found one of {moved.tenant}")
    steps = [*_mounts(connection, paths)]
    steps += _keys(connection, paths, moved, clock())
    steps.append(_authority(connection, paths, moved, clock()))
    if moved is not None:
        steps.append(_revocations(connection, paths, moved))
    steps += _logins(connection, paths)
    return steps


def credentials(connection: VaultConnection, paths: TenantPaths, login: str) -> Credentials:
    """A new secret id of an AppRole login; earlier ones stay valid until they are destroyed."""
    role = f"auth/{paths.approle}/role/{login}"
    role_id = connection.read(f"{role}/role-id").get("role_id")
    secret_id = connection.write(f"{role}/secret-id").get("secret_id")
    return Credentials(str(role_id), str(secret_id))


def _mounts(connection: VaultConnection, paths: TenantPaths) -> list[Step]:
    steps = []
    engines: Mapping[str, Mapping[str, object]] = {
        paths.transit: {"type": "transit"},
        paths.pki: {"type": "pki", "config": {"max_lease_ttl": CA_TTL}},
        paths.kv: {"type": "kv", "options": {"version": "2"}},
    }
    for kind, wanted in (
        ("mounts", engines),
        ("auth", {paths.approle: {"type": "approle"}, paths.cert: {"type": "cert"}}),
    ):
        there = connection.read(f"sys/{kind}")
        for path, options in wanted.items():
            missing = f"{path}/" not in there
            if missing:
                connection.write(f"sys/{kind}/{path}", options)
            steps.append(Step(f"{kind} {path} ({options['type']})", missing))
    return steps


def _keys(connection: VaultConnection, paths: TenantPaths, moved: KeyFile | None, now: float) -> list[Step]:
    wanted: dict[str, tuple[str, Mapping[str, object]]] = {
        WRAPPING: ("", {"type": "aes256-gcm96", "derived": True}),
        **{role_key_name(role): ("", {"type": "ed25519"}) for role in ROLES},
    }
    if moved is not None:
        wanted = {
            name: (backup, kind) for (name, (_, kind)), backup in zip(wanted.items(), _backups(moved, now), strict=True)
        }
    steps = []
    for name, (backup, kind) in wanted.items():
        missing = not _exists(connection, f"{paths.transit}/keys/{name}")
        if missing and backup:
            connection.write(f"{paths.transit}/restore/{name}", {"backup": backup})
        elif missing:
            connection.write(f"{paths.transit}/keys/{name}", {**kind, "exportable": False})
        elif moved is not None and not _is_moved(connection, paths, name, moved):
            raise Malformed(
                f"{paths.transit}: key {name} is there already and is another; use another --base or tenant"
            )
        steps.append(Step(f"key {name}", missing))
    return steps


def _backups(moved: KeyFile, now: float) -> list[str]:
    wrapping = {item.version: item.key for item in moved.wrapping_keys}
    return [
        wrapping_backup(WRAPPING, wrapping, now),
        *(
            ed25519_backup(role_key_name(role), _signing_keys(moved, role), now) if moved.roles.get(role) else ""
            for role in ROLES  # a keyring of before a role was thought of has no key of it: it gets a new one there
        ),
    ]


def _signing_keys(moved: KeyFile, role: str) -> dict[int, ed25519.Ed25519PrivateKey]:
    loaded = [serialization.load_der_private_key(der, None) for der in moved.roles.get(role, ())]
    keys = {number: key for number, key in enumerate(loaded, 1) if isinstance(key, ed25519.Ed25519PrivateKey)}
    if not keys or len(keys) != len(loaded):
        raise Malformed(f"keyring to move: expected Ed25519 keys of role {role}, found {len(loaded)} of another kind")
    return keys


def _is_moved(connection: VaultConnection, paths: TenantPaths, name: str, moved: KeyFile) -> bool:
    """Whether the key that is there is the one that an earlier, cut off, move put there: the wrapping key opens what
    the keyring wraps, signing keys show their public halves."""
    if name == WRAPPING:
        context, probe = "a move to this server", b"a probe, and no key"
        wrapped = wrap({item.version: item.key for item in moved.wrapping_keys}, context, probe)
        try:
            return VaultKeyring(connection, paths).unwrap(context, wrapped) == probe
        except Untrusted:
            return False
    role = name.removeprefix("role-")
    if not moved.roles.get(role):
        return True
    keys = _signing_keys(moved, role)
    mine = {str(number): base64.b64encode(key.public_key().public_bytes_raw()).decode() for number, key in keys.items()}
    found = connection.read(f"{paths.transit}/keys/{name}").get("keys", {})
    return {number: entry.get("public_key") for number, entry in found.items()} == mine


def _authority(connection: VaultConnection, paths: TenantPaths, moved: KeyFile | None, now: float) -> Step:
    """The CA in both engines. Its record in KV is written last: without it nothing was ever certified, so a ceremony
    that was cut off may start over with another key."""
    place = f"{paths.kv}/data/authority"
    step = f"authority of {paths.tenant}"
    if _exists(connection, place):
        if moved is not None:
            found = connection.read(place).get("data") or {}
            if found.get("certificate") != moved.authority_certificate.decode():
                raise Malformed(f"{paths.kv}: the tenant has another CA already; use another --base or tenant")
        return Step(step, False)
    key = _authority_key(moved)
    certificate = moved.authority_certificate if moved is not None else make_authority(key, paths.tenant, now)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    connection.delete(f"{paths.pki}/root")
    connection.write(f"{paths.pki}/config/ca", {"pem_bundle": (pem + certificate).decode()})
    connection.write(
        f"{paths.transit}/restore/{AUTHORITY}", {"backup": p256_backup(AUTHORITY, key, now), "force": True}
    )
    connection.write(place, {"options": {"cas": 0}, "data": {"certificate": certificate.decode()}})
    return Step(step, True)


def _authority_key(moved: KeyFile | None) -> ec.EllipticCurvePrivateKey:
    if moved is None:
        return ec.generate_private_key(ec.SECP256R1())
    key = serialization.load_der_private_key(moved.authority_key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Malformed(f"keyring to move: expected a P-256 CA key, found {type(key).__name__}")
    return key


def _revocations(connection: VaultConnection, paths: TenantPaths, moved: KeyFile) -> Step:
    place = f"{paths.kv}/data/revoked"
    missing = not _exists(connection, place)
    if missing:
        serials = sorted(serial.hex().rjust(40, "0") for serial in moved.revoked)
        connection.write(place, {"options": {"cas": 0}, "data": {"serials": serials}})
    return Step(f"{len(moved.revoked)} revoked serials", missing)


def _logins(connection: VaultConnection, paths: TenantPaths) -> list[Step]:
    """Policies and roles are written every time: a new release of Atoll may need other rights."""
    steps = []
    for login in LOGINS:
        name = policy_name(paths, login)
        connection.write(f"sys/policies/acl/{name}", {"policy": policy_text(paths, login)})
        role = f"auth/{paths.approle}/role/{login}"
        missing = not _exists(connection, role)
        bounds = {"token_policies": [name], "token_ttl": TOKEN_TTL, "token_max_ttl": "24h"}
        connection.write(role, bounds)
        steps.append(Step(f"login {login} with policy {name}", missing))
    issuing = {
        "allowed_domains": ["coordinator"],
        "allow_bare_domains": True,
        "enforce_hostnames": False,
        "server_flag": False,
        "key_type": "ec",
        "key_bits": 256,
        "organization": [paths.tenant],
        "max_ttl": LOGIN_TTL,
    }
    missing = not _exists(connection, f"{paths.pki}/roles/login")
    connection.write(f"{paths.pki}/roles/login", issuing)
    steps.append(Step("issuing of login certificates", missing))
    certificate = (connection.read(f"{paths.kv}/data/authority").get("data") or {}).get("certificate", "")
    role = f"auth/{paths.cert}/certs/coordinator"
    missing = not _exists(connection, role)
    connection.write(
        role,
        {
            "certificate": certificate,
            "allowed_common_names": ["coordinator"],
            "token_policies": [policy_name(paths, "coordinator")],
            "token_ttl": TOKEN_TTL,
            "token_max_ttl": "24h",
        },
    )
    steps.append(Step("certificate login coordinator", missing))
    return steps


def _exists(connection: VaultConnection, path: str) -> bool:
    try:
        connection.read(path)
    except NotFound:
        return False
    return True
