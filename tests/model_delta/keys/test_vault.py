"""What only a keyring on a server has: the set-up, the move there, logins with few rights, tenants kept apart."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model_delta.errors import Malformed, NotFound, Unavailable, Untrusted
from model_delta.keys.certificates import device_keys_of, make_request
from model_delta.keys.keyring import ROLES, EmbeddedKeyring
from model_delta.keys.vault import TenantPaths, VaultKeyring
from model_delta.keys.vault_connection import (
    AccessDenied,
    AppRoleLogin,
    CertificateLogin,
    TokenLogin,
    VaultConnection,
)
from model_delta.keys.vault_setup import LOGINS, credentials, policy_name, policy_text, setup
from model_delta.keys.wrapping import KeyVersions
from model_delta.keys.wrapping import wrap as wrap_here
from tests.fakes.vault_server import Server, running
from tests.model_delta.keys.rings import NOW, certified

ACME, GLOBEX = TenantPaths("acme"), TenantPaths("globex")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        for paths in (ACME, GLOBEX):
            setup(found.admin(), paths, clock=lambda: NOW)
        yield found


def test_setting_up_again_makes_nothing_and_changes_no_key(server: Server) -> None:
    paths = TenantPaths("initech")
    first = setup(server.admin(), paths, clock=lambda: NOW)
    assert all(step.made for step in first)
    ring = server.keyring("initech", NOW)
    anchors, authority, wrapped = ring.anchors(), ring.ca_pem(), ring.wrap("a", b"k" * 32)
    again = setup(server.admin(), paths, clock=lambda: NOW + 5)
    assert [step.what for step in again] == [step.what for step in first]
    assert not any(step.made for step in again)
    after = server.keyring("initech", NOW)
    assert (after.anchors(), after.ca_pem(), after.unwrap("a", wrapped)) == (anchors, authority, b"k" * 32)


def test_a_moved_tenant_keeps_records_certificates_and_anchors(server: Server, tmp_path: Path) -> None:
    """Ciphertexts that the embedded keyring made open on the server unchanged, under their versions."""
    local = EmbeddedKeyring.create(tmp_path / "keyring", "hooli", lambda: NOW)
    records = [("hooli/1", local.wrap("hooli/1", b"1" * 32))]
    local.rotate()
    records.append(("hooli/2", local.wrap("hooli/2", b"2" * 32)))
    local.rotate()
    records.append(("hooli/3", local.wrap("hooli/3", b"3" * 32)))
    certificate = certified(local)[2]
    local.revoke(77)
    signed = local.sign("plan", "plan", b"before")
    paths = TenantPaths("hooli")
    setup(server.admin(), paths, moved=local.contents, clock=lambda: NOW)
    assert not any(step.made for step in setup(server.admin(), paths, moved=local.contents, clock=lambda: NOW))
    ring = server.keyring("hooli", NOW)
    assert [ring.unwrap(*record)[:1] for record in records] == [b"1", b"2", b"3"]
    assert (ring.versions(), ring.anchors(), set(ring.revoked())) == (KeyVersions(1, 3), local.anchors(), {77})
    assert ring.verify(signed, "plan", "plan") == local.verify(ring.sign("plan", "plan", b"before"), "plan", "plan")
    assert device_keys_of(certificate, ring.ca_pem(), NOW).common_name == "pos-0001"
    assert device_keys_of(certified(ring, "pos-0002")[2], local.ca_pem(), NOW).common_name == "pos-0002"
    assert local.unwrap("hooli/9", ring.wrap("hooli/9", b"9" * 32)) == b"9" * 32  # and the other way round
    assert ring.rotate() == 4
    ring.trim(4)
    with pytest.raises(Untrusted):
        ring.unwrap(*records[2])


def test_a_tenant_whose_old_versions_were_trimmed_moves_too(server: Server, tmp_path: Path) -> None:
    local = EmbeddedKeyring.create(tmp_path / "keyring", "umbrella", lambda: NOW)
    for _ in range(3):
        local.rotate()
    local.trim(3)
    wrapped = [wrap_here({3: local.contents.wrapping_keys[0].key}, "u/3", b"3" * 32), local.wrap("u/4", b"4" * 32)]
    setup(server.admin(), TenantPaths("umbrella"), moved=local.contents, clock=lambda: NOW)
    ring = server.keyring("umbrella", NOW)
    assert ring.versions() == KeyVersions(3, 4)
    assert (ring.unwrap("u/3", wrapped[0]), ring.unwrap("u/4", wrapped[1])) == (b"3" * 32, b"4" * 32)
    assert ring.rotate() == 5
    ring.trim(5)
    assert ring.versions() == KeyVersions(5, 5)


def test_a_keyring_of_before_a_role_moves_and_gets_the_role_there(server: Server, tmp_path: Path) -> None:
    local = EmbeddedKeyring.create(tmp_path / "keyring", "soylent", lambda: NOW)
    older = msgspec.structs.replace(
        local.contents, roles={role: keys for role, keys in local.contents.roles.items() if role != "baseline"}
    )
    for _ in range(2):
        setup(server.admin(), TenantPaths("soylent"), moved=older, clock=lambda: NOW)
    ring = server.keyring("soylent", NOW)
    assert ring.public_key("plan") == local.public_key("plan")
    assert ring.public_key("baseline") != local.public_key("baseline")


def test_keys_are_not_moved_over_others(server: Server, tmp_path: Path) -> None:
    stranger = EmbeddedKeyring.create(tmp_path / "keyring", "acme", lambda: NOW)
    before = server.keyring("acme", NOW).anchors()
    with pytest.raises(Malformed, match="is there already and is another"):
        setup(server.admin(), ACME, moved=stranger.contents, clock=lambda: NOW)
    with pytest.raises(Malformed, match="expected one of globex, found one of acme"):
        setup(server.admin(), GLOBEX, moved=stranger.contents, clock=lambda: NOW)
    assert server.keyring("acme", NOW).anchors() == before


def test_a_ceremony_cut_off_before_the_ca_was_on_record_is_repeated(server: Server) -> None:
    paths = TenantPaths("stark")
    setup(server.admin(), paths, clock=lambda: NOW)
    server.admin().delete(f"{paths.kv}/metadata/authority")
    made = [step.what for step in setup(server.admin(), paths, clock=lambda: NOW) if step.made]
    assert made == ["authority of stark"]
    ring = server.keyring("stark", NOW)
    assert device_keys_of(certified(ring)[2], ring.ca_pem(), NOW).common_name == "pos-0001"


def test_no_key_can_be_taken_away_or_deleted(server: Server) -> None:
    for connection in (server.admin(), server.login("acme", "coordinator")):
        for name in ("wrapping", "role-release", "authority"):
            for path in (f"export/encryption-key/{name}", f"export/signing-key/{name}", f"backup/{name}"):
                with pytest.raises((Untrusted, Unavailable)):
                    connection.read(f"{ACME.transit}/{path}")
    coordinator = server.login("acme", "coordinator")
    for change in ({"exportable": True}, {"deletion_allowed": True}, {"allow_plaintext_backup": True}):
        with pytest.raises(AccessDenied):
            coordinator.write(f"{ACME.transit}/keys/wrapping/config", change)
    with pytest.raises(AccessDenied):
        coordinator.delete(f"{ACME.transit}/keys/wrapping")


def calls(ring: VaultKeyring, foreign: bytes) -> dict[str, Callable[[], object]]:
    """Every operation of a keyring by name. Each is looked up when it is called."""
    private = ec.generate_private_key(ec.SECP256R1())
    return {
        "new_key": lambda: ring.new_key("c"),
        "wrap": lambda: ring.wrap("c", b"k" * 32),
        "unwrap": lambda: ring.unwrap("c", foreign),
        "rewrap": lambda: ring.rewrap([("c", foreign)]),
        "rotate": lambda: ring.rotate(),
        "trim": lambda: ring.trim(ring.versions().latest),
        "versions": lambda: ring.versions(),
        **{f"sign {role}": partial(lambda role: ring.sign(role, "plan", b"p"), role) for role in ROLES},
        **{f"sign_bytes {role}": partial(lambda role: ring.sign_bytes(role, b"p"), role) for role in ROLES},
        **{f"public_key {role}": partial(lambda role: ring.public_key(role), role) for role in ROLES},
        "anchors": lambda: ring.anchors(),
        "issue_certificate": lambda: ring.issue_certificate(make_request(private, "x"), "x", b"s" * 32),
        "ca_pem": lambda: ring.ca_pem(),
        "revoke": lambda: ring.revoke(x509.random_serial_number()),
        "revoked": lambda: ring.revoked(),
        "revocation_list": lambda: ring.revocation_list(),
    }


OPERATIONS = sorted(calls(None, b""))  # type: ignore[arg-type]


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_tenants_login_does_nothing_to_anothers_keys(server: Server, login: str, operation: str) -> None:
    foreign = server.keyring("globex", NOW).wrap("c", b"k" * 32)
    intruder = VaultKeyring(_login(server, "acme", login), GLOBEX, clock=lambda: NOW)
    with pytest.raises(AccessDenied, match="access denied"):
        calls(intruder, foreign)[operation]()


_connections: dict[tuple[str, str, str], VaultConnection] = {}


def _login(server: Server, tenant: str, login: str) -> VaultConnection:
    place = (server.url, tenant, login)
    if place not in _connections:
        _connections[place] = server.login(tenant, login)
    return _connections[place]


ALLOWED = {
    "coordinator": set(OPERATIONS),
    "publisher": {"new_key", "anchors", "ca_pem", "sign release", "sign_bytes release"}
    | {f"public_key {role}" for role in ROLES},
    "rotator": {"rewrap", "rotate", "versions"},
    "auditor": {"versions", "anchors", "ca_pem", "revoked"} | {f"public_key {role}" for role in ROLES},
}


@pytest.mark.parametrize("login", LOGINS)
def test_a_login_has_the_rights_of_its_work_and_no_more(server: Server, login: str) -> None:
    coordinator = server.keyring("acme", NOW)
    coordinator.rotate()
    own, done = coordinator.wrap("c", b"k" * 32), set()
    for name, call in calls(VaultKeyring(_login(server, "acme", login), ACME, clock=lambda: NOW), own).items():
        try:
            call()
        except AccessDenied:
            continue
        done.add(name)
    assert done == ALLOWED[login]


def test_tenants_told_apart_by_case_alone_share_no_policy(server: Server) -> None:
    """Vault folds the names of policies to lower case."""
    names = {policy_name(TenantPaths(tenant), login).lower() for tenant in ("acme", "Acme") for login in LOGINS}
    assert len(names) == 2 * len(LOGINS)
    setup(server.admin(), TenantPaths("Acme"), clock=lambda: NOW)
    server.keyring("acme", NOW).wrap("c", b"k" * 32)
    with pytest.raises(AccessDenied):
        VaultKeyring(server.login("Acme", "coordinator"), ACME).wrap("c", b"k" * 32)


@pytest.mark.parametrize("login", LOGINS)
def test_a_policy_names_the_tenants_paths_only(login: str) -> None:
    paths = [line.split('"')[1] for line in policy_text(ACME, login).splitlines() if line.startswith("path ")]
    assert paths
    assert all(path.startswith("atoll/acme/") and "*" not in path and "+" not in path for path in paths)
    with pytest.raises(Malformed):
        policy_text(ACME, "root")


def test_a_wrong_secret_and_a_dead_token_are_told_from_a_silent_server(server: Server) -> None:
    found = credentials(server.admin(), ACME, "coordinator")
    for login in (
        AppRoleLogin(ACME.approle, found.role_id, "wrong"),
        AppRoleLogin(GLOBEX.approle, found.role_id, found.secret_id),
        TokenLogin("no-such-token"),
    ):
        with pytest.raises(Untrusted) as failure:
            VaultKeyring(VaultConnection(server.url, login), ACME).versions()
        assert found.secret_id not in str(failure.value)
        assert found.secret_id not in repr(login)
    silent = VaultConnection("http://127.0.0.1:9", TokenLogin("t"), pause=lambda seconds: None)
    with pytest.raises(Unavailable, match="no answer in 4 tries"):
        VaultKeyring(silent, ACME).versions()
    with pytest.raises(NotFound, match="atoll vault setup"):
        VaultKeyring(server.admin(), TenantPaths("nobody")).versions()


def test_a_token_is_renewed_at_half_its_life_and_replaced_when_it_was_revoked(server: Server) -> None:
    clock = [0.0]
    found = credentials(server.admin(), ACME, "coordinator")
    login = AppRoleLogin(ACME.approle, found.role_id, found.secret_id)
    connection = VaultConnection(server.url, login, clock=lambda: clock[0])
    ring = VaultKeyring(connection, ACME)
    ring.versions()
    first = connection._client.token
    clock[0] = 1801.0
    ring.versions()
    assert connection._client.token == first  # renewed, not replaced
    server.admin().write("auth/token/revoke", {"token": first})
    ring.versions()
    assert connection._client.token != first


def test_an_address_without_tls_is_for_this_machine_alone() -> None:
    for url in ("http://vault.example:8200", "ftp://127.0.0.1", "vault", "https://user:pass@vault.example"):
        with pytest.raises(Malformed, match="Vault address"):
            VaultConnection(url, TokenLogin("t"))
    for tenant in ("", "a/b", "../x", "a*", "+"):
        with pytest.raises(Malformed):
            TenantPaths(tenant)


def test_the_revoked_are_remembered_while_the_server_is_away(server: Server) -> None:
    clock = [NOW]
    connection = server.login("acme", "coordinator")
    ring = VaultKeyring(connection, ACME, clock=lambda: clock[0])
    ring.revoke(4711)
    connection._client.adapter.base_uri = "http://127.0.0.1:9"
    connection._pause = lambda seconds: None
    clock[0] += 60
    assert 4711 in ring.revoked()
    blind = VaultKeyring(connection, ACME, clock=lambda: clock[0])
    with pytest.raises(Unavailable):
        blind.revoked()


def test_a_certificate_logs_in_over_tls(tmp_path: Path) -> None:
    """The tenant's PKI engine issues the certificate; another tenant's opens nothing."""
    local = EmbeddedKeyring.create(tmp_path / "server", "server")
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ca.pem").write_bytes(local.ca_pem())
    (tmp_path / "key.pem").write_bytes(_pem(key))
    (tmp_path / "cert.pem").write_bytes(local.issue_certificate(make_request(key, "vault"), "vault", None, server=True))
    with running("-tls-cert", str(tmp_path / "cert.pem"), "-tls-key", str(tmp_path / "key.pem")) as secure:
        admin = VaultConnection(secure.url, TokenLogin(secure.token), ca_path=tmp_path / "ca.pem")
        for paths in (ACME, GLOBEX):
            setup(admin, paths)
            mine = ec.generate_private_key(ec.SECP256R1())
            request = (
                x509.CertificateSigningRequestBuilder()
                .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coordinator")]))
                .sign(mine, hashes.SHA256())
                .public_bytes(serialization.Encoding.PEM)
            )
            asked = {"csr": request.decode(), "common_name": "coordinator", "ttl": "1h"}
            signed = admin.write(f"{paths.pki}/sign/login", asked)["certificate"]
            (tmp_path / f"{paths.tenant}.pem").write_text(signed)
            (tmp_path / f"{paths.tenant}.key").write_bytes(_pem(mine))

        def ring(mount: TenantPaths, tenant: str) -> VaultKeyring:
            login = CertificateLogin(mount.cert, "coordinator", tmp_path / f"{tenant}.pem", tmp_path / f"{tenant}.key")
            return VaultKeyring(VaultConnection(secure.url, login, ca_path=tmp_path / "ca.pem"), ACME)

        assert ring(ACME, "acme").unwrap("c", ring(ACME, "acme").wrap("c", b"k" * 32)) == b"k" * 32
        for mount, tenant in ((ACME, "globex"), (GLOBEX, "globex"), (GLOBEX, "acme")):
            with pytest.raises(Untrusted):
                ring(mount, tenant).wrap("c", b"k" * 32)


def test_every_login_has_its_policy_file_and_every_file_its_login() -> None:
    folder = resources.files("model_delta.keys").joinpath("policies")
    assert {Path(file.name).stem for file in folder.iterdir()} == set(LOGINS)
    settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert "keys/policies/*.hcl" in settings["tool"]["setuptools"]["package-data"]["model_delta"]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
