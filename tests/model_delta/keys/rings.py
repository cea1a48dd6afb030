"""Keyrings of every kind, for the tests of what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.distant_keyring import DistantKeyring
from model_delta.keys.certificates import make_request
from model_delta.keys.keyring import EmbeddedKeyring, Keyring
from model_delta.keys.vault import TenantPaths
from model_delta.keys.vault_setup import setup
from tests.fakes.vault_server import running

NOW = 1_790_000_000.0
KINDS = ("embedded", "distant", "vault")


class Rings(NamedTuple):
    """The keyrings of two tenants, and how another process opens the first one's."""

    kind: str
    acme: Keyring
    globex: Keyring
    again: Callable[[], Keyring]


@contextmanager
def rings(kind: str, folder: Path, now: float = NOW) -> Iterator[Rings]:
    """Two tenants' keyrings of one kind, whose clocks stand at `now`."""
    if kind == "embedded":
        acme, globex = (EmbeddedKeyring.create(folder / name, name, lambda: now) for name in ("acme", "globex"))
        yield Rings(kind, acme, globex, lambda: EmbeddedKeyring.open(folder / "acme", lambda: now))
        return
    if kind == "distant":
        with rings("embedded", folder, now) as near:
            acme, globex = DistantKeyring(near.acme), DistantKeyring(near.globex)
            yield Rings(kind, acme, globex, lambda: DistantKeyring(near.again()))
        return
    with running() as server:
        for tenant in ("acme", "globex"):
            setup(server.admin(), TenantPaths(tenant), clock=lambda: now)
        yield Rings(
            kind, server.keyring("acme", now), server.keyring("globex", now), lambda: server.keyring("acme", now)
        )


def certified(ring: Keyring, name: str = "pos-0001", **options: Any) -> tuple[ec.EllipticCurvePrivateKey, bytes, bytes]:
    """(private key, X25519 public bytes, certificate) of a new device."""
    private = ec.generate_private_key(ec.SECP256R1())
    sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return private, sealing, ring.issue_certificate(make_request(private, name), name, sealing, **options)
