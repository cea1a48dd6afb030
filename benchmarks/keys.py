"""How fast a tenant's artifact keys get a new wrapping key.

`python -m benchmarks.keys [--keys N] [--json]` wraps N keys (default 100,000), rotates, rewraps them in batches with a
progress bar on standard error, and checks a sample. The embedded keyring always; a Vault server on loopback, with its
Transit engine's batches, when there is one (`.ci/vault/build`), beside one request a key for 500 keys. The rate is
stated, not bounded: a server's depends on its machine and its storage; here it is in memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.claims import Claim, run
from model_delta.keys.keyring import EmbeddedKeyring, Keyring
from model_delta.keys.vault import TenantPaths, VaultKeyring
from model_delta.keys.vault_connection import AppRoleLogin, VaultConnection
from model_delta.keys.vault_setup import credentials, setup
from model_delta.keys.wrapping import version_of
from tests.fakes.vault_server import Server, binary, running

KEYS = 100_000
BATCH = 2000
SINGLE = 500
BAR = 40

Records = list[tuple[str, bytes]]


def rewrap_all(ring: Keyring, records: Records, name: str) -> tuple[Records, float]:
    """Every record again under the newest wrapping key, and the seconds it took. Draws a bar on standard error."""
    fresh: Records = []
    started = time.perf_counter()
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        wrapped = ring.rewrap(batch)
        fresh += [(context, data) for (context, _), data in zip(batch, wrapped, strict=True)]
        share = len(fresh) / len(records)
        filled = "#" * round(BAR * share)
        rate = len(fresh) / (time.perf_counter() - started)
        print(f"\r{name} [{filled:<{BAR}}] {share:4.0%} {rate:8,.0f} keys/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return fresh, time.perf_counter() - started


def measure_ring(ring: Keyring, prepared: Records, name: str) -> Claim:
    """Rotate and rewrap; the claim is met when every record is under the new version and a sample opens as before."""
    latest = ring.rotate()
    fresh, seconds = rewrap_all(ring, prepared, name)
    moved = all(version_of(data) == latest for _, data in fresh)
    same = all(ring.unwrap(*fresh[at]) == ring.unwrap(*prepared[at]) for at in range(0, len(fresh), 997))
    baseline = None
    if isinstance(ring, VaultKeyring):
        started = time.perf_counter()
        for record in prepared[:SINGLE]:
            ring.rewrap([record])
        baseline = round(min(SINGLE, len(prepared)) / (time.perf_counter() - started), 1)
    rate = round(len(fresh) / seconds, 1)
    claim = "keys.rewrap" if baseline is None else "keys.rewrap.vault"
    ratio = round(rate / baseline, 4) if baseline else None
    return Claim(claim, rate, f"keys/s ({name})", "stated", baseline, ratio, moved and same)


def claims(count: int = KEYS) -> list[Claim]:
    """The embedded keyring with `count` keys, then the server if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        local = EmbeddedKeyring.create(Path(folder) / "keyring", "acme")
        records = [(name, local.wrap(name, os.urandom(32))) for name in (f"acme/{n:064x}" for n in range(count))]
        at_server = []
        with _server() as server:
            if server is not None:  # the same records, wrapped by the embedded keyring, after a move
                paths = TenantPaths("acme")
                setup(server.admin(), paths, moved=local.contents)
                found = credentials(server.admin(), paths, "coordinator")
                login = AppRoleLogin(paths.approle, found.role_id, found.secret_id)
                at_server.append(
                    measure_ring(VaultKeyring(VaultConnection(server.url, login), paths), records, "Vault")
                )
        return [measure_ring(local, records, "embedded"), *at_server]


def measure(options: argparse.Namespace) -> Sequence[Claim]:
    """As many keys as asked for."""
    return claims(options.keys)


@contextmanager
def _server() -> Iterator[Server | None]:
    if not os.access(binary(), os.X_OK):
        print("no Vault server: run .ci/vault/build to measure one as well", file=sys.stderr)
        yield None
        return
    with running() as server:
        yield server


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=KEYS, help=f"how many wrapped keys (default {KEYS})")
    run("Rewrapping of artifact keys.", measure, parser)


if __name__ == "__main__":
    main()
