"""A real Vault server in development mode, on a free loopback port, for as long as a test module needs it.

The binary is built by `.ci/vault/build` into a folder outside the checkout, or named by ATOLL_VAULT_SERVER.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from model_delta.keys.vault import TenantPaths, VaultKeyring
from model_delta.keys.vault_connection import AppRoleLogin, TokenLogin, VaultConnection
from model_delta.keys.vault_setup import credentials
from tests.fakes.real_servers import absent, built

STOP_S = 30
VERSION = "1.14.1"


class Server(NamedTuple):
    """Where it listens, and the root token."""

    url: str
    token: str

    def admin(self) -> VaultConnection:
        """An administrator's connection."""
        return VaultConnection(self.url, TokenLogin(self.token))

    def login(self, tenant: str, role: str) -> VaultConnection:
        """A connection by the AppRole `role` of a tenant."""
        paths = TenantPaths(tenant)
        found = credentials(self.admin(), paths, role)
        return VaultConnection(self.url, AppRoleLogin(paths.approle, found.role_id, found.secret_id))

    def keyring(self, tenant: str, now: float, role: str = "coordinator") -> VaultKeyring:
        """A tenant's keyring whose clock stands at `now`."""
        return VaultKeyring(self.login(tenant, role), TenantPaths(tenant), clock=lambda: now)


def binary() -> Path:
    """Where the server's binary is, if it was built."""
    named = os.environ.get("ATOLL_VAULT_SERVER")
    return Path(named) if named else built("vault", VERSION) / "vault"


def require_binary() -> Path:
    """The binary. Skips the test where there is none, unless ATOLL_REQUIRE_SERVERS=1."""
    path = binary()
    if not os.access(path, os.X_OK):
        absent(f"a Vault server at {path}: run .ci/vault/build")
    return path


@contextmanager
def running(*options: str) -> Iterator[Server]:
    """The server, with `options` for its command line; ended by its process id."""
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [require_binary(), "-root-token", token, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the server ended before it listened"
        yield Server(url, token)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
        if process.stdout is not None:
            process.stdout.close()
