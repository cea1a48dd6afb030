"""The TUF repository follows the ledger: published versions are vouched for, withdrawn ones no longer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.settings import DataFolder
from atoll.trust import hold_automatically, trust_init
from atoll.trust_publishing import Publishing, trust_of
from atoll.trust_sticks import automatic_sticks
from atoll.vouching import Vouching
from model_delta.digest import digest_of
from model_delta.errors import Untrusted
from model_delta.store import DirectoryStore
from model_delta.trust.client import Trust
from model_delta.trust.fetchers import StoreSource
from model_delta.trust.paths import KIND, version_path
from model_delta.trust.repository import DAY_S
from model_delta.trust.signing import seal_envelope, sign


class Version(NamedTuple):
    manifest: str
    model: str


class FakeLedger:
    """Versions that a test publishes and withdraws."""

    def __init__(self, store: DirectoryStore) -> None:
        self._store = store
        self.versions: list[Version] = []
        self.gone: dict[str, str] = {}

    def publish(self, payload: bytes, model: str = "fraud") -> str:
        digest = digest_of(payload)
        envelope = sign("manifest", payload, [Ed25519PrivateKey.generate()])
        self._store.put("manifest", digest, seal_envelope(envelope))
        self.versions.append(Version(digest, model))
        return version_path("core", "acme", model, digest)

    def releases(self, model: str | None = None) -> list[Version]:
        return [version for version in self.versions if model in (None, version.model)]

    def withdrawn(self, model: str) -> dict[str, str]:
        return self.gone


class Platform:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = DataFolder.open(folder / "data", create=True)
        self.store = DirectoryStore(self.data.child("coordinator") / "store")
        self.ledger = FakeLedger(self.store)

    def ceremony(self, *regions: str) -> None:
        (self.folder / "words").write_text("five random words are enough")
        sticks = [self.folder / name for name in ("ann", "ben", "cho")]
        trust_init(self.data.path, sticks, regions, [self.folder / "words"], as_json=True)

    @property
    def publishing(self) -> Publishing:
        return trust_of(self.data)

    def vouching(self) -> Vouching:
        return Vouching(self.publishing, self.ledger, self.store, "core", self.data.child("trust"))

    def start(self) -> bool:
        """What a coordinator does first; whether it held the ceremony."""
        return hold_automatically(self.publishing, self.data.child("trust"), ["core"], time.time())

    def device(self, now: float) -> Trust:
        root = self.publishing.repository.root_bytes(1)
        trust = Trust(self.folder / "device", root, StoreSource(self.store, KIND))
        trust.refresh(now)
        return trust


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    return Platform(tmp_path)


def test_what_is_published_is_vouched_for_and_what_is_withdrawn_no_longer(platform: Platform) -> None:
    platform.ceremony("core")
    first, other = platform.ledger.publish(b"first"), platform.ledger.publish(b"another model's", "risk")
    vouching, now = platform.vouching(), time.time()
    assert vouching.once(now) == ()
    device = platform.device(now)
    assert device.target(first, now).length == 5
    assert device.target(other, now).digest == digest_of(b"another model's")
    platform.ledger.gone[digest_of(b"first")] = "slow"
    vouching.once(now)
    device = platform.device(now)
    with pytest.raises(Untrusted, match="no role that may vouch for it does"):
        device.target(first, now)
    assert device.target(other, now).length


def test_nothing_changes_while_nothing_changes(platform: Platform) -> None:
    platform.ceremony("core")
    platform.ledger.publish(b"first")
    vouching, now = platform.vouching(), time.time()
    vouching.once(now)
    before = platform.publishing.repository.status()
    vouching.once(now + 60)
    assert platform.publishing.repository.status() == before


def test_versions_from_before_the_ceremony_are_vouched_for_after_it(platform: Platform) -> None:
    path = platform.ledger.publish(b"early")
    vouching, now = platform.vouching(), time.time()
    assert vouching.once(now) == ()
    assert platform.store.names(KIND) == ()
    platform.ceremony("core")
    vouching.once(now)
    assert platform.device(now).target(path, now).length == 5


def test_a_region_that_no_ceremony_named_vouches_for_nothing(platform: Platform) -> None:
    platform.ceremony("eu-west")
    platform.ledger.publish(b"first")
    platform.vouching().once(time.time())
    assert platform.publishing.repository.vouched("core.acme") == frozenset()


def test_it_keeps_fresh_and_names_what_people_have_to_renew(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.ceremony("core")
    path = platform.ledger.publish(b"first")
    vouching, later = platform.vouching(), time.time() + 50 * DAY_S
    assert vouching.once(later) == ("targets",)
    assert vouching.once(later) == ("targets",)
    assert caplog.text.count("to be signed by people soon: targets") == 1
    assert platform.device(later).target(path, later).length == 5


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited for 20 s")


def test_it_goes_on_after_a_failure(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    platform.ceremony("core")
    path = platform.ledger.publish(b"first")
    kept = platform.store.get("manifest", digest_of(b"first"))
    platform.store.remove("manifest", digest_of(b"first"))

    async def scene() -> None:
        running = asyncio.create_task(platform.vouching().run(every_s=0.01))
        await until(lambda: "versions are not vouched for" in caplog.text)
        platform.store.put("manifest", digest_of(b"first"), kept)
        await until(lambda: bool(platform.publishing.vouched("core")))
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(scene())
    assert platform.publishing.vouched("core") == {path}


def test_a_platform_that_starts_before_a_ceremony_holds_one_and_keeps_all_roles_fresh(platform: Platform) -> None:
    assert platform.start()
    assert not platform.start()
    path = platform.ledger.publish(b"first")
    vouching, now = platform.vouching(), time.time()
    assert vouching.once(now) == ()
    device = platform.device(now)
    assert device.target(path, now).length == 5
    for days in range(40, 800, 40):
        assert vouching.once(now + days * DAY_S) == ()
    assert min(vouching.days_left.values()) >= 0.5
    after = now + 760 * DAY_S
    assert platform.device(after).target(path, after).length == 5


def test_new_keys_of_the_keyring_reach_the_targets_by_themselves(platform: Platform) -> None:
    platform.start()
    path = platform.ledger.publish(b"first")
    vouching, now = platform.vouching(), time.time()
    vouching.once(now)
    before = platform.publishing.anchors()
    platform.data.keyring_path.unlink()
    vouching = platform.vouching()
    assert vouching.once(now + 1) == ()
    device = platform.device(now + 1)
    assert device.target(path, now + 1).length == 5
    assert device.anchors("acme", now + 1) == platform.publishing.anchors() != before


def test_a_ceremony_gives_to_people_what_the_platform_held(platform: Platform) -> None:
    platform.start()
    trust = platform.data.child("trust")
    assert len(automatic_sticks(trust)) == 3
    path = platform.ledger.publish(b"first")
    vouching, now = platform.vouching(), time.time()
    vouching.once(now)
    platform.device(now)
    platform.ceremony("core")
    assert automatic_sticks(trust) == ()
    assert vouching.once(now + 60 * DAY_S) == ("targets",)
    assert platform.device(now + 60 * DAY_S).target(path, now + 60 * DAY_S).length == 5
    holders = {key for status in platform.publishing.repository.status()[:2] for key in status.keys}
    assert len(holders) == 6


def test_a_ceremony_before_the_first_start_is_the_platforms(platform: Platform) -> None:
    platform.ceremony("core")
    assert not platform.start()
    assert automatic_sticks(platform.data.child("trust")) == ()
